"""llama.cpp through llama-cpp-python's low-level functions: batches of tokens of several sequences, logits of the last."""

from __future__ import annotations

import time
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as ll

_STEP = 2048  # tokens given at a time; the library's own pieces are of n_ubatch


_said: list[str] = []


def _log(level: int, text: bytes, data: Any) -> None:
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        _said.append(text.decode(errors="replace").strip())


_quiet = ll.llama_log_callback(_log)  # kept: the library calls it as long as it lives


class Engine:
    version = llama_cpp.__version__

    def __init__(self, job: dict[str, Any]) -> None:
        ll.llama_log_set(_quiet, None)
        ll.llama_backend_init()
        params = ll.llama_model_default_params()
        params.n_gpu_layers = 0
        self.threads = job["threads"]
        self.model = ll.llama_model_load_from_file(job["model"].encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {job['model']}: {'; '.join(_said[-3:])}")
        self.vocabulary = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self.model))
        self.context, self.key = None, (0, 0)

    def _open(self, sequences: int, length: int) -> None:
        """A context with room for so many sequences of this length."""
        key = (sequences, -(-length // 256) * 256)
        if self.key == key:
            ll.llama_memory_clear(ll.llama_get_memory(self.context), False)
            return
        if self.context is not None:
            ll.llama_free(self.context)
        params = ll.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_seq_max = key[0] * key[1], _STEP, sequences
        params.n_threads = params.n_threads_batch = self.threads
        self.context, self.key = ll.llama_init_from_model(self.model, params), key
        if not self.context:
            raise RuntimeError(f"llama.cpp gives no context of {key[0]} x {key[1]} tokens: {'; '.join(_said[-3:])}")

    def _feed(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """(token, position, sequence, wants logits) of one batch."""
        batch = ll.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wants) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wants
        code = ll.llama_decode(self.context, batch)
        ll.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode answered {code}: {'; '.join(_said[-3:])}")

    def _chosen(self, row: int) -> int:
        logits = ll.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax())

    def _read(self, prompts: list[list[int]]) -> list[int]:
        """Every sequence's first token."""
        first = []
        for sequence, prompt in enumerate(prompts):
            for at in range(0, len(prompt), _STEP):
                part = prompt[at : at + _STEP]
                ends = at + len(part) == len(prompt)
                self._feed([(t, at + i, sequence, ends and i == len(part) - 1) for i, t in enumerate(part)])
            first.append(self._chosen(-1))
        return first

    def prefill(self, prompts: list[list[int]]) -> tuple[float, list[int]]:
        self._open(len(prompts), len(prompts[0]) + 1)
        start = time.perf_counter()
        first = self._read(prompts)
        return time.perf_counter() - start, first

    def decode(self, prompts: list[list[int]], tokens: int, repeats: int) -> tuple[list[float], list[list[int]]]:
        length = len(prompts[0])
        self._open(len(prompts), length + tokens + 1)
        first = self._read(prompts)
        seconds, ids = [], [[token] for token in first]
        memory = ll.llama_get_memory(self.context)
        for _ in range(repeats):
            for sequence in range(len(prompts)):
                ll.llama_memory_seq_rm(memory, sequence, length, -1)
            ids = [[token] for token in first]
            start = time.perf_counter()
            for n in range(tokens):
                self._feed([(seen[-1], length + n, sequence, True) for sequence, seen in enumerate(ids)])
                for sequence, seen in enumerate(ids):
                    seen.append(self._chosen(sequence))
            seconds.append(time.perf_counter() - start)
        return seconds, ids
