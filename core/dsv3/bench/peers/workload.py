"""What all engines are given: prompts of random ids, and how many tokens to decode behind them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsv3.bench.session import random_ids
from dsv3.errors import UsageError

DEFAULT = ("prefill-512", "prefill-2048", "decode-b1-32", "decode-b1-2048", "decode-b8-32")


@dataclass(frozen=True)
class Workload:
    """tokens: decoded after the prompts of `context` tokens each; 0 for a prefill, which ends with the first token."""

    name: str
    batch: int
    context: int
    tokens: int

    @property
    def processed(self) -> int:
        """The tokens whose number per second is the figure."""
        return self.batch * (self.tokens or self.context)

    def job(self, vocabulary: int) -> dict[str, Any]:
        """For the engine's process."""
        prompts = [random_ids(vocabulary, self.context, seed) for seed in range(self.batch)]
        return {"name": self.name, "tokens": self.tokens, "prompts": prompts}


def parse(names: Sequence[str], tokens: int) -> list[Workload]:
    """From "prefill-512" and "decode-b8-2048"; UsageError for anything else."""
    found = []
    for name in names:
        if m := re.fullmatch(r"prefill-([1-9]\d*)", name):
            found.append(Workload(name, 1, int(m[1]), 0))
        elif m := re.fullmatch(r"decode-b([1-9]\d*)-([1-9]\d*)", name):
            found.append(Workload(name, int(m[1]), int(m[2]), tokens))
        else:
            raise UsageError(f"workload {name!r} is neither prefill-N nor decode-bB-N, such as {', '.join(DEFAULT[2:])}")
    return found
