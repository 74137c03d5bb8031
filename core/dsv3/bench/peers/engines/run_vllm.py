"""vLLM's offline interface. It gives no step of its own to time: decoding is what more tokens take beyond one."""

from __future__ import annotations

import time
from typing import Any

import vllm
from vllm import LLM, SamplingParams


class Engine:
    version = vllm.__version__

    def __init__(self, job: dict[str, Any]) -> None:
        longest = max(len(w["prompts"][0]) + w["tokens"] for w in job["workloads"])
        most = max(len(w["prompts"]) for w in job["workloads"])
        import torch  # here: where vLLM is missing, that is what has to be said

        # On a CPU this is a share of all memory, and vLLM refuses to start if that much is not free.
        share = {} if torch.cuda.is_available() else {"gpu_memory_utilization": 0.5}
        self.llm = LLM(
            **share,
            model=job["model"], dtype=job["dtype"], skip_tokenizer_init=True, max_model_len=longest + 16, max_num_seqs=most,
            max_num_batched_tokens=max(2048, longest + 16), enable_prefix_caching=False, disable_log_stats=True,
        )  # fmt: skip

    def _run(self, prompts: list[list[int]], tokens: int) -> tuple[float, list[list[int]]]:
        chosen = SamplingParams(temperature=0.0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False)
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        start = time.perf_counter()
        out = self.llm.generate(given, chosen, use_tqdm=False)
        return time.perf_counter() - start, [list(o.outputs[0].token_ids) for o in out]

    def prefill(self, prompts: list[list[int]]) -> tuple[float, list[int]]:
        seconds, ids = self._run(prompts, 1)
        return seconds, [row[0] for row in ids]

    def decode(self, prompts: list[list[int]], tokens: int, repeats: int) -> tuple[list[float], list[list[int]]]:
        seconds = []
        ids: list[list[int]] = []
        for _ in range(repeats):
            one, _ = self._run(prompts, 1)
            all_, ids = self._run(prompts, tokens + 1)
            seconds.append(all_ - one)
        return seconds, ids
