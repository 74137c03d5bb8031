"""dsv3 itself, through the calls of its generation loop."""

from __future__ import annotations

from typing import Any

import dsv3
from dsv3.bench.session import Session


class Engine:
    version = dsv3.__version__

    def __init__(self, job: dict[str, Any]) -> None:
        self.model = dsv3.load(job["model"], threads=job["threads"], mtp=False, check=False, **job["options"])
        self.session: Session | None = None

    def _session(self, prompts: list[list[int]], tokens: int) -> Session:
        return Session(self.model, len(prompts), len(prompts[0]), tokens, prompts=prompts)

    def prefill(self, prompts: list[list[int]]) -> tuple[float, list[int]]:
        session = self._session(prompts, 1)
        return session.prefill(), session.first

    def decode(self, prompts: list[list[int]], tokens: int, repeats: int) -> tuple[list[float], list[list[int]]]:
        session = self._session(prompts, tokens)
        session.prefill()
        seconds = [sum(session.decode(tokens)) for _ in range(repeats)]
        return seconds, session.decoded
