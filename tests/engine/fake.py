"""A model whose next token is a hash of everything the cache says came before: one wrong entry, and the text is another.

Hidden states are numbers of contexts: the tokens that were read back from the cache, page by page. The MTP module's entries
remember which token and which context they were made of, and are compared with what the request knows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsv3.engine.cache import Run
from dsv3.engine.sample import Row

VOCABULARY = 11
EOS = 0


def next_token(context: Sequence[int], seed: int) -> int:
    """What the model says after a context."""
    word = hashlib.blake2b(repr((tuple(context), seed % 3)).encode(), digest_size=4).digest()
    return int.from_bytes(word, "little") % VOCABULARY


def alone(prompt: Sequence[int], limit: int, seed: int, ignore_eos: bool) -> list[int]:
    """The tokens that a request must get, whatever else happens."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + limit:
        token = next_token(tokens, seed)
        if token == EOS and not ignore_eos:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


class FakeCache:
    def __init__(self, pages: int, size: int) -> None:
        self.pages: dict[int, list[int]] = {}
        self.size, self.total = size, pages
        self.main: dict[int, int] = {}
        self.mtp: dict[int, tuple[int, tuple[int, ...]]] = {}

    def grow(self, total: int) -> None:
        self.total = total

    def slot(self, row: int, position: int) -> int:
        block = self.pages[row][position // self.size]
        assert block < self.total
        return block * self.size + position % self.size


class FakeExecutor:
    """fault: what is done wrong on purpose, to see that it is noticed."""

    def __init__(self, page_size: int = 4, fault: str = "") -> None:
        self.page_size, self.fault = page_size, fault
        self.contexts: list[tuple[int, ...]] = []
        self.rows = 0

    def paged_cache(self, pages: int) -> FakeCache:
        return FakeCache(pages, self.page_size)

    def _numbers(self, contexts: list[tuple[int, ...]]) -> Tensor:
        first = len(self.contexts)
        self.contexts += contexts
        return torch.arange(first, len(self.contexts))[:, None]

    def _of(self, numbers: Tensor) -> list[tuple[int, ...]]:
        return [self.contexts[int(n)] for n in numbers[:, 0]]

    def decode(self, cache: FakeCache, runs: Sequence[Run]) -> tuple[Tensor, Tensor, None]:
        return *self.forward_mixed(cache, runs, []), None

    def forward_mixed(self, cache: FakeCache, few: Sequence[Run], many: Sequence[Run]) -> tuple[Tensor, Tensor]:
        found = []
        for run in (*few, *many):
            assert run.position >= 0 and run.ids
            self.rows += len(run.ids)
            for n, token in enumerate(run.ids):
                slot = cache.slot(run.row, run.position + n)
                if n >= run.unwritten:
                    cache.main[slot] = token
                assert cache.main[slot] == token, "what is not written again is there already"
            for n in range(len(run.ids)):
                found.append(tuple(cache.main[cache.slot(run.row, p)] for p in range(run.position + n + 1)))
        numbers = self._numbers(found)
        return numbers, numbers

    def mtp_mixed(self, cache: FakeCache, few: Sequence[Run], many: Sequence[Run], states: Tensor) -> Tensor:
        found = []
        contexts = iter(self._of(states))
        for run in (*few, *many):
            for n, token in enumerate(run.ids):
                position, context = run.position + n, next(contexts)
                assert len(context) == position, "the state is that of the position before"
                slot = cache.slot(run.row, position)
                if n >= run.unwritten:
                    cache.mtp[slot] = token, context
                whole = (*context, token)
                for p in range(1, position + 1):
                    held = cache.mtp[cache.slot(run.row, p)]
                    assert held == (whole[p], whole[:p]), "an entry of the MTP module is of another text"
                found.append(whole)
        return self._numbers(found)

    def head(self, hidden: Tensor) -> Tensor:
        return hidden

    def choose(self, logits: Tensor, rows: Sequence[Row]) -> tuple[Tensor, list[int]]:
        ids = []
        for context, row in zip(self._of(logits), rows, strict=True):
            known = [*row.request.tokens, *row.ahead]
            assert len(context) == len(known) == row.position, "the row is the one before the token's place"
            if self.fault != "blind":
                assert list(context) == known, "the cache holds another text"
            ids.append(next_token(context, row.request.seed))
        return logits, ids


class Guessing(FakeExecutor):
    """One whose MTP module is often right. It is told from the model by who asks: drafts are guessed with drafts or after a
    step, tokens are chosen within one."""

    def __init__(self, page_size: int = 4, right: int = 70, fault: str = "") -> None:
        super().__init__(page_size, fault)
        self.right = right
        self._guesses: set[int] = set()

    def mtp_mixed(self, cache: FakeCache, few: Sequence[Run], many: Sequence[Run], states: Tensor) -> Tensor:
        numbers = super().mtp_mixed(cache, few, many, states)
        self._guesses.update(int(n) for n in numbers[:, 0])
        return numbers

    def choose(self, logits: Tensor, rows: Sequence[Row]) -> tuple[Any, list[int]]:
        final, ids = super().choose(logits, rows)
        for n, number in enumerate(logits[:, 0].tolist()):
            if number in self._guesses and (31 * number + 7) % 100 >= self.right:
                ids[n] = (ids[n] + 1) % VOCABULARY
        return final, ids
