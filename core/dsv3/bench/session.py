"""A batch of sequences of random tokens, driven step by step through the calls that the generation loop makes."""

from __future__ import annotations

import time

import torch

from dsv3.bench.cost import Cost, step_cost
from dsv3.bench.routed import routed, seen_by_moe
from dsv3.engine.cache import Run
from dsv3.engine.engine import PREFILL_TOKENS
from dsv3.engine.model import Model
from dsv3.engine.options import MAX_BATCH
from dsv3.errors import UsageError


def random_ids(vocabulary: int, count: int, seed: int) -> list[int]:
    """Token ids, evenly chosen; the same for the same arguments, whatever engine they are for."""
    generator = torch.Generator().manual_seed(seed)
    return [int(i) for i in torch.randint(2, vocabulary, (count,), generator=generator).tolist()]


class Session:
    """`batch` sequences of `context` random tokens each, and room for `tokens` more. Decoding starts from the same context each
    time: what an earlier run wrote behind it is overwritten.

    eager: steps are never replayed as graphs. prompts: of `context` ids each; None: random ones. first: every sequence's token
    after its prompt; decoded: it and all that the last `decode` gave, for each sequence.
    """

    def __init__(
        self, model: Model, batch: int, context: int, tokens: int, eager: bool = False, prompts: list[list[int]] | None = None
    ) -> None:
        limit = model.config.max_position_embeddings
        if context + tokens > limit:
            raise UsageError(f"a context of {context} and {tokens} more are over the {limit} positions of this model")
        if batch > MAX_BATCH:
            raise UsageError(f"a batch of {batch}; this engine decodes at most {MAX_BATCH} sequences together")
        prompts = prompts or [random_ids(model.config.vocab_size, context, seed) for seed in range(batch)]
        self.model, self.context, self.eager = model, context, eager
        self.prompts = prompts
        self.cache = model.new_cache([context + tokens + 1] * batch)
        self.first: list[int] = []
        self.decoded: list[list[int]] = []

    def prefill(self) -> float:
        """Seconds from the prompts to every sequence's first token."""
        start, self.first = time.perf_counter(), []
        per_step = max(1, PREFILL_TOKENS // self.context)
        for at in range(0, len(self.prompts), per_step):
            group, done = list(enumerate(self.prompts))[at : at + per_step], 0
            while done < self.context:
                take = min(PREFILL_TOKENS, self.context - done)
                runs = [Run(row, prompt[done : done + take], done) for row, prompt in group]
                hidden, _ = self.model.forward(self.cache, runs, False)
                done += take
            ends = torch.arange(1, len(group) + 1, device=hidden.device) * take - 1
            logits = self.model.head(hidden[ends])
            self.first += self._greedy(logits, self.context)
        return time.perf_counter() - start

    def decode(self, steps: int) -> list[float]:
        """Seconds of each step, from the last tokens to the next, chosen greedily."""
        last, times = list(self.first), []
        self.decoded = [[token] for token in last]
        for n in range(steps):
            start = time.perf_counter()
            last = self.step(last, n)
            times.append(time.perf_counter() - start)
            for seen, token in zip(self.decoded, last, strict=True):
                seen.append(token)
        return times

    def step(self, last: list[int], n: int) -> list[int]:
        """The next token of every sequence after the n-th."""
        at = self.context + n
        runs = self._runs(last, at)
        if self.eager:
            hidden, logits = self.model.forward(self.cache, runs, True)[0], None
        else:
            hidden, _, logits = self.model.decode(self.cache, runs)
        if logits is None:
            logits = self.model.head(hidden)
        return self._greedy(logits, at + 1)

    def _greedy(self, logits: torch.Tensor, position: int) -> list[int]:
        rows = logits.shape[0]
        ids: list[int] = self.model.draw(logits, [0] * rows, [position] * rows, [0.0] * rows).tolist()
        return ids

    def _runs(self, last: list[int], at: int) -> list[Run]:
        return [Run(row, [token], at) for row, token in enumerate(last)]

    def distinct(self, n: int = 0) -> list[int]:
        """Different experts that the n-th decode step visits in each MoE layer, by the router's reference on what the layer is
        really given."""
        with seen_by_moe(self.model) as seen:
            self.model.forward(self.cache, self._runs(self.first, self.context + n), True)
        return [routed(arguments) for arguments in seen]

    def cost(self, n: int = 0) -> Cost:
        """Of the n-th decode step, with the experts that the first one visits."""
        lengths = [self.context + n + 1] * len(self.prompts)
        queries = [1] * len(self.prompts)
        distinct = self.distinct()
        return step_cost(self.model.config, self.model.graph.w, self.cache.layers, queries, lengths, True, distinct)

    def prefill_cost(self) -> Cost:
        """Of the prompts, as if they were one step."""
        lengths = [self.context] * len(self.prompts)
        return step_cost(self.model.config, self.model.graph.w, self.cache.layers, lengths, lengths, False)
