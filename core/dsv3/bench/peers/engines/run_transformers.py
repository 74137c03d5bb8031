"""Hugging Face transformers: its DeepseekV3ForCausalLM, with its own cache."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache


class Engine:
    version = transformers.__version__

    def __init__(self, job: dict[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        transformers.logging.set_verbosity_error()
        dtype = getattr(torch, job["dtype"])
        self.model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, local_files_only=True).train(False)

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]]) -> tuple[float, list[int]]:
        start = time.perf_counter()
        _, first = self._read(prompts)
        return time.perf_counter() - start, first.flatten().tolist()

    def _read(self, prompts: list[list[int]]) -> tuple[Any, Any]:
        cache = DynamicCache(config=self.model.config)
        out = self.model(torch.tensor(prompts), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.past_key_values, out.logits[:, -1:].argmax(-1)

    @torch.inference_mode()
    def decode(self, prompts: list[list[int]], tokens: int, repeats: int) -> tuple[list[float], list[list[int]]]:
        cache, first = self._read(prompts)
        seconds = []
        ids: list[Any] = []
        for _ in range(repeats):
            last, ids = first, []
            start = time.perf_counter()
            for _ in range(tokens):
                last = self.model(last, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
                ids.append(last)
            seconds.append(time.perf_counter() - start)
            cache.crop(-tokens)  # back to the prompts
        return seconds, torch.cat([first, *ids], dim=1).tolist()
