"""Per-token scores of one model, or of two side by side: window by window, so that logits are never kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsv3.engine.cache import Run
from dsv3.engine.engine import PREFILL_TOKENS
from dsv3.errors import Dsv3Error
from dsv3.eval.stream import Windows

if TYPE_CHECKING:
    from dsv3.engine.model import Model

_CPU_TOKENS = 512  # in a step: more gains nothing there, and progress is seldom seen
_BLOCK = 1 << 22  # logits that are in float64 at a time


@dataclass(frozen=True)
class Scores:
    """What one model says of every predicted token. loss [windows, size] in nats; best: the token it thinks most likely.
    mtp_loss, accepted [windows, size - 1]: of the MTP module's rows, and whether its guess is what the model itself chooses
    there; None without a module. tokens_per_s: inputs over the time of forward, head and copying the logits to the host."""

    loss: NDArray[np.float64]
    best: NDArray[np.int64]
    mtp_loss: NDArray[np.float64] | None
    accepted: NDArray[np.bool_] | None
    tokens_per_s: float


@torch.inference_mode()
def score(
    models: Sequence[Model], windows: Windows, mtp: bool, advance: Callable[[int], None]
) -> tuple[list[Scores], NDArray[np.float64] | None]:
    """Scores of one or two models, and of two KL(second || first) [windows, size] in nats, in float64 from float32 logits.

    Every window is cold. advance: called with the number of inputs just done. Dsv3Error for NaN logits.
    """
    sides = [_Side(model, mtp) for model in models]
    divergence: list[NDArray[np.float64]] = []
    most = min(_CPU_TOKENS if model.device.type == "cpu" else PREFILL_TOKENS for model in models)
    for rows in windows.batches(most):
        for side in sides:
            side.begin(rows)
        for at in range(0, windows.size, most):
            stop = min(at + most, windows.size)
            logits = [side.main(at, stop) for side in sides]
            if len(logits) == 2:
                divergence += [_kl(p, q) for p, q in zip(_blocks(logits[1]), _blocks(logits[0]), strict=True)]
            del logits  # before the MTP modules' are made
            for side in sides:
                side.drafts(at, min(stop, windows.size - 1))
            advance((stop - at) * len(rows))
    shape = (windows.count, windows.size)
    return [side.scores(shape) for side in sides], np.concatenate(divergence).reshape(shape) if divergence else None


class _Side:
    """One model on its way through the windows. A step holds either several whole windows or a part of one, so that what comes
    out of the steps, joined, is in the order of the text."""

    def __init__(self, model: Model, mtp: bool) -> None:
        self.model, self.mtp = model, mtp and bool(model.graph.mtp)
        self.timed: list[tuple[int, float]] = []
        self.loss: list[NDArray[np.float64]] = []
        self.best: list[NDArray[np.int64]] = []
        self.mtp_loss: list[NDArray[np.float64]] = []
        self.guess: list[NDArray[np.int64]] = []

    def begin(self, rows: NDArray[np.int64]) -> None:
        """Take up windows [B, size + 1], each a sequence with an empty cache."""
        self.rows = rows
        self.cache = self.model.new_cache([rows.shape[1] - 1] * len(rows))

    def main(self, at: int, stop: int) -> Tensor:
        """Feed inputs at..stop of every window; their logits [B * (stop - at), V] on the host."""
        start = time.perf_counter()
        hidden, self.states = self.model.forward(self.cache, self._runs(at, stop), False)
        logits = self._host(self.model.head(hidden))
        self.timed.append((len(logits), time.perf_counter() - start))
        self._keep(logits, self.rows[:, at + 1 : stop + 1], self.loss, self.best)
        return logits

    def drafts(self, at: int, stop: int) -> None:
        """Score the MTP module's rows at..stop: row i takes hidden state i and token i + 1, at that token's position, and
        predicts token i + 2."""
        if not self.mtp or stop <= at:
            return
        states = self.states.unflatten(0, (len(self.rows), -1))[:, : stop - at].flatten(0, 1)
        hidden = self.model.mtp_forward(self.cache, self._runs(at + 1, stop + 1), states, False)
        self._keep(self._host(self.model.head(hidden)), self.rows[:, at + 2 : stop + 2], self.mtp_loss, self.guess)

    def scores(self, shape: tuple[int, int]) -> Scores:
        """All that was seen, as [windows, size]."""
        best = np.concatenate(self.best).reshape(shape)
        loss = accepted = None
        if self.mtp:
            later = (shape[0], shape[1] - 1)
            loss = np.concatenate(self.mtp_loss).reshape(later)
            accepted = np.concatenate(self.guess).reshape(later) == best[:, 1:]
        timed = self.timed[1:] or self.timed  # kernels compile in the first step
        speed = sum(n for n, _ in timed) / sum(seconds for _, seconds in timed)
        return Scores(np.concatenate(self.loss).reshape(shape), best, loss, accepted, speed)

    def _runs(self, at: int, stop: int) -> list[Run]:
        return [Run(row, ids.tolist(), at) for row, ids in enumerate(self.rows[:, at:stop])]

    def _host(self, logits: Tensor) -> Tensor:
        return logits.to("cpu", torch.float64 if logits.dtype == torch.float64 else torch.float32)

    def _keep(
        self, logits: Tensor, targets: NDArray[np.int64], losses: list[NDArray[np.float64]], best: list[NDArray[np.int64]]
    ) -> None:
        wanted = torch.from_numpy(np.ascontiguousarray(targets).reshape(-1))
        for block, ids in zip(_blocks(logits), wanted.split(_rows(logits)), strict=True):
            found = -_log_softmax(block).gather(-1, ids[:, None])[:, 0].numpy()
            if np.isnan(found).any():
                raise Dsv3Error(
                    f"{self.model.placement().model} produced NaN logits: a damaged checkpoint, or a kernel at fault; try "
                    "--backend reference, or --dtype float32"
                )
            losses.append(found)
            best.append(block.numpy().argmax(-1))  # the lowest id on ties, as the greedy sampler has it


def _rows(logits: Tensor) -> int:
    return max(1, _BLOCK // logits.shape[-1])


def _blocks(logits: Tensor) -> Iterator[Tensor]:
    return iter(logits.split(_rows(logits)))


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.to(torch.float64), dim=-1)


def _kl(p: Tensor, q: Tensor) -> NDArray[np.float64]:
    """KL(p || q) [T] of logits [T, V]: sum of p * (log p - log q); never below zero but for rounding."""
    log_p, log_q = _log_softmax(p), _log_softmax(q)
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0).numpy()
