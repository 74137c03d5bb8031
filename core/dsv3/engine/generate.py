"""The batched generation loop: prefill in chunks, then one step for all sequences at a time, with MTP drafts if asked."""

from __future__ import annotations

import time
from collections.abc import Iterator
from collections.abc import Sequence as Many
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsv3.engine.cache import Run
from dsv3.engine.options import MAX_BATCH
from dsv3.engine.sequence import Sequence

if TYPE_CHECKING:
    from dsv3.engine.model import Model

PREFILL_TOKENS = 2048
Event = tuple[Sequence, str]


def generate(model: Model, sequences: Many[Sequence], draft: bool) -> Iterator[Event]:
    """Run all sequences to their end, MAX_BATCH at a time; yields (sequence, new text) as text appears."""
    for first in range(0, len(sequences), MAX_BATCH):
        batch = [s for s in sequences[first : first + MAX_BATCH] if not s.done]
        if batch:
            yield from _Batch(model, batch, draft).run()


class _Batch:
    def __init__(self, model: Model, sequences: list[Sequence], draft: bool) -> None:
        self.model, self.sequences, self.draft = model, sequences, draft
        for row, sequence in enumerate(sequences):
            sequence.row = row
        # One slot more: a draft is written past the last token that can be accepted.
        self.cache = model.lease_cache([len(s.prompt) + s.limit + 1 for s in sequences])

    def run(self) -> Iterator[Event]:
        try:
            yield from self._prefill()
            while active := [s for s in self.sequences if not s.done]:
                yield from self._decode(active)
        finally:
            self.model.give_back(self.cache)

    def _prefill(self) -> Iterator[Event]:
        """All prompts, in steps of at most PREFILL_TOKENS; a sequence's first token is chosen as soon as its prompt is in."""
        todo = [(s, 0) for s in self.sequences]
        while todo:
            room, runs, owners, rest = PREFILL_TOKENS, [], [], []
            for sequence, at in todo:
                take = min(room, len(sequence.prompt) - at)
                if take:
                    sequence.prefilled = sequence.prefilled or time.perf_counter()
                    runs.append(Run(sequence.row, sequence.prompt[at : at + take], at))
                    owners.append(sequence)
                    room -= take
                if at + take < len(sequence.prompt):
                    rest.append((sequence, at + take))
            todo = rest
            yield from self._step(runs, owners, absorbed=False)

    def _decode(self, active: list[Sequence]) -> Iterator[Event]:
        runs = []
        for s in active:
            ids = [s.last] if s.draft is None else [s.last, s.draft]
            s.drafted += len(ids) - 1
            runs.append(Run(s.row, ids, s.length - 1))
        yield from self._step(runs, active, absorbed=True)

    def _step(self, runs: list[Run], owners: list[Sequence], absorbed: bool) -> Iterator[Event]:
        """Forward, choose a token after every run that reaches its sequence's end, verify drafts, draft anew."""
        logits: Tensor | None = None
        if absorbed:
            hidden, for_mtp, logits = self.model.decode(self.cache, runs)
        else:
            hidden, for_mtp = self.model.forward(self.cache, runs, False)
        ends, rows = _bounds(runs), []
        for run, s, end in zip(runs, owners, ends, strict=True):
            new = run.position + len(run.ids) - s.length
            if new >= 0:  # the last known token was fed, and perhaps a draft after it
                rows.append((s, range(end - new - 1, end)))
        tokens = self._choose(hidden, logits, rows)
        kept: dict[int, int] = {}
        for s, span in rows:
            s.steps += 1
            s.graph_steps += logits is not None
            guess, shown = s.draft, ""
            for n, row in enumerate(span):
                shown += s.append(tokens[row])
                kept[s.row] = n + 1
                if s.done or guess != tokens[row]:
                    break
                s.accepted += 1 if n + 1 < len(span) else 0
            if shown:
                yield s, shown
        if self.draft:
            self._draft(runs, owners, for_mtp, kept, absorbed)

    def _choose(self, hidden: Tensor, logits: Tensor | None, rows: list[tuple[Sequence, range]]) -> dict[int, int]:
        """The token that the model chooses after each row. logits: of all rows, where the step gave them."""
        flat = [row for _, span in rows for row in span]
        if not flat:
            return {}
        owners = [s for s, span in rows for _ in span]
        positions = [s.length + n for s, span in rows for n in range(len(span))]
        picked = torch.tensor(flat, device=hidden.device)
        chosen = self.model.head(hidden[picked]) if logits is None else logits[picked]
        return dict(zip(flat, self.model.sample(chosen, owners, positions), strict=True))

    def _draft(self, runs: list[Run], owners: list[Sequence], hidden: Tensor, kept: dict[int, int], absorbed: bool) -> None:
        """Feed the MTP module every token that was accepted, and let it guess the next.

        Its row for a token takes the hidden state of the position before, and its entry lives at the token's own position.
        """
        mtp_runs, ends = [], []
        picked: list[int] = []
        for run, s, end in zip(runs, owners, _bounds(runs), strict=True):
            first = end - len(run.ids)
            known = s.length - 1 - run.position  # rows whose next token is known
            count = min(len(run.ids), known)
            s.draft = None
            if s.done or count <= 0:
                continue
            ids = [s.token(run.position + 1 + n) for n in range(count)]
            mtp_runs.append(Run(s.row, ids, run.position + 1))
            picked += range(first, first + count)
            wants = s.row in kept and s.limit - len(s.ids) >= 2
            ends.append((s, len(picked) - 1) if wants else None)
        if not mtp_runs:
            return
        states = hidden[torch.tensor(picked, device=hidden.device)]
        out = self.model.mtp_forward(self.cache, mtp_runs, states, absorbed)
        drafting = [e for e in ends if e is not None]
        if drafting:
            logits = self.model.head(out[torch.tensor([row for _, row in drafting], device=out.device)])
            guesses = self.model.sample(logits, [s for s, _ in drafting], [s.length for s, _ in drafting])
            for (s, _), guess in zip(drafting, guesses, strict=True):
                s.draft = guess


def _bounds(runs: Many[Run]) -> list[int]:
    """One past each run's last row in the flat batch."""
    ends, total = [], 0
    for run in runs:
        total += len(run.ids)
        ends.append(total)
    return ends
