"""`evaluate`: texts to windows, windows to per-token scores, scores to figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dsv3.checkpoint.progress import tokens_progress
from dsv3.engine.options import is_integer
from dsv3.errors import UsageError
from dsv3.eval.results import Difference, Evaluation, FileRow, Histogram, PositionRow, Rated
from dsv3.eval.score import Scores, score
from dsv3.eval.stream import Stream, Windows, cut, encode
from dsv3.eval.texts import Text

if TYPE_CHECKING:
    from dsv3.engine.model import Model

WINDOW = 256
_POSITIONS = 32  # groups of positions at most
_EDGES = np.logspace(-8, 2, 41)  # of the KL histogram, four to a power of ten


def evaluate(
    model: Model,
    texts: Sequence[Text],
    *,
    against: Model | None = None,
    window: int = WINDOW,
    tokens: int | None = None,
    mtp: bool = True,
    progress: bool | None = None,
) -> Evaluation:
    """How well a model predicts texts, and how far it is from another one with the same tokenizer.

    Documents of all texts, encoded as BOS + tokens + EOS, are one stream; it is cut into consecutive windows of `window`
    inputs, each cold, and every input's next token is scored. A last part shorter than a window is dropped; a stream shorter
    than one is a single short window. tokens: predict at most the first so many. mtp: score the first MTP module too, where
    there is one: rows 0 to window - 2 of a window, at positions 1 to window - 1. progress: None shows it on a terminal.

    UsageError for a wrong argument, a model without tokenizer or weights, too little text, or two models with different tokens.
    """
    _check(window, tokens)
    models = [model] if against is None else [model, against]
    streams = [_stream(m, texts) for m in models]
    if against is not None:
        _same_tokens(model, against, streams)
    stream = streams[0].first(tokens)
    windows = cut(stream, window, min(m.config.max_position_embeddings for m in models))
    with tokens_progress("scoring", windows.tokens, progress) as advance:
        scores, kl = score(models, windows, mtp, advance)
    rated = [_rated(m, s, stream) for m, s in zip(models, scores, strict=True)]
    return Evaluation(
        window=windows.size,
        windows=windows.count,
        tokens=windows.tokens,
        bytes_per_token=float(stream.nbytes.mean()),
        model=rated[0],
        against=rated[1] if against is not None else None,
        difference=None if kl is None else _difference(scores[0], scores[1], kl),
        files=_files(texts, stream, windows, scores, kl),
        positions=_positions(scores, kl),
    )


def _check(window: Any, tokens: Any) -> None:
    if not is_integer(window) or window < 2:
        raise UsageError(f"window is {window!r}; expected at least 2 tokens")
    if tokens is not None and (not is_integer(tokens) or tokens < 2):
        raise UsageError(f"tokens is {tokens!r}; expected at least 2")


def _stream(model: Model, texts: Sequence[Text]) -> Stream:
    if model.device.type == "meta":
        raise UsageError("a model on device 'meta' has shapes but no weights; load it on a real device")
    return encode(model, texts)


def _same_tokens(model: Model, against: Model, streams: Sequence[Stream]) -> None:
    """UsageError unless a token id means the same to both."""
    sizes = [m.config.vocab_size for m in (model, against)]
    words = [m.tokenizer.vocabulary if m.tokenizer else {} for m in (model, against)]
    if sizes[0] != sizes[1]:
        why = f"vocabularies of {sizes[0]} and {sizes[1]} tokens"
    elif words[0] != words[1]:
        why = "other tokens in their tokenizer.json"
    elif not np.array_equal(streams[0].ids, streams[1].ids):
        why = "tokenizers that cut the same text differently"
    else:
        return
    names = " and ".join(m.placement().model for m in (model, against))
    raise UsageError(f"{names} cannot be compared token by token: {why}; give two checkpoints with the same tokenizer")


def _rated(model: Model, scores: Scores, stream: Stream) -> Rated:
    placement, loss = model.placement(), float(scores.loss.mean())
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(loss))
    return Rated(
        name=placement.model,
        placement=placement.summary,
        dtype=placement.dtype,
        quant=placement.quant,
        kv_dtype=placement.kv_dtype,
        weight_bytes=model.weight_bytes,
        tokens_per_s=scores.tokens_per_s,
        loss=loss,
        perplexity=perplexity,
        bits_per_byte=_bits(loss, stream.nbytes),
        mtp_loss=None if scores.mtp_loss is None else float(scores.mtp_loss.mean()),
        mtp_acceptance=None if scores.accepted is None else float(scores.accepted.mean()),
    )


def _bits(loss: float, nbytes: NDArray[np.float64]) -> float:
    return loss / float(np.log(2)) / float(nbytes.mean())


def _difference(this: Scores, other: Scores, kl: NDArray[np.float64]) -> Difference:
    more, base = (this.loss - other.loss).mean(axis=1), float(other.loss.mean())
    counts, _ = np.histogram(np.clip(kl, _EDGES[0], _EDGES[-1]), _EDGES)
    error = _error(more)
    return Difference(
        kl=float(kl.mean()),
        kl_error=_error(kl.mean(axis=1)),
        kl_median=float(np.median(kl)),
        kl_99=float(np.quantile(kl, 0.99)),
        kl_max=float(kl.max()),
        kl_histogram=Histogram(_EDGES.tolist(), counts.tolist()),
        agreement=float((this.best == other.best).mean()),
        loss_percent=100 * float(more.mean()) / base,
        loss_percent_error=None if error is None else 100 * error / base,
    )


def _error(means: NDArray[np.float64]) -> float | None:
    """Standard error of the mean of windows, which are nearly independent as their tokens are not."""
    return float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else None


def _files(
    texts: Sequence[Text], stream: Stream, windows: Windows, scores: Sequence[Scores], kl: NDArray[np.float64] | None
) -> list[FileRow]:
    """A row per text of which the stream has any token."""
    rows, owner = [], windows.owner
    for n, text in enumerate(texts):
        nbytes, mine = stream.nbytes[stream.owner == n], owner == n
        if not len(nbytes):
            continue
        name, count, size = text.name, int(mine.sum()), float(nbytes.mean())
        if not count:
            rows.append(FileRow(name, 0, size, None, None))
            continue
        loss = [float(s.loss.reshape(-1)[mine].mean()) for s in scores]
        row = FileRow(name, count, size, loss[0], _bits(loss[0], nbytes))
        if kl is not None:
            same = float((scores[0].best == scores[1].best).reshape(-1)[mine].mean())
            mean = float(kl.reshape(-1)[mine].mean())
            row = FileRow(name, count, size, row.loss, row.bits_per_byte, loss[1], _bits(loss[1], nbytes), mean, same)
        rows.append(row)
    return rows


def _positions(scores: Sequence[Scores], kl: NDArray[np.float64] | None) -> list[PositionRow]:
    size = scores[0].loss.shape[1]
    groups = np.array_split(np.arange(size), min(size, _POSITIONS))
    rows = []
    for group in groups:
        span = slice(int(group[0]), int(group[-1]) + 1)
        means = [float(s.loss[:, span].mean()) for s in scores]
        more = () if kl is None else (means[1], float(kl[:, span].mean()))
        rows.append(PositionRow(span.start, span.stop - 1, means[0], *more))
    return rows
