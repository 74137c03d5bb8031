"""What an evaluation finds. All of it goes to JSON as it stands here; that is the schema."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from dsv3 import __version__


@dataclass(frozen=True)
class Rated:
    """A model and how well it predicts. loss, mtp_loss: nats per token. bits_per_byte: loss / ln 2 over the bytes per token of
    the text. mtp_acceptance: share of the MTP module's guesses that are the token the model itself chooses next. mtp_*: None
    where it was not measured. weight_bytes: of all weights as kept, loaded MTP modules among them. tokens_per_s: inputs over
    the time of forward and head, first step aside."""

    name: str
    placement: str
    dtype: str
    quant: str
    kv_dtype: str
    weight_bytes: int
    tokens_per_s: float
    loss: float
    perplexity: float
    bits_per_byte: float
    mtp_loss: float | None
    mtp_acceptance: float | None


@dataclass(frozen=True)
class Histogram:
    """counts[i] values lie between edges[i] and edges[i + 1]; the first and last count take what lies outside too."""

    edges: list[float]
    counts: list[int]


@dataclass(frozen=True)
class Difference:
    """How the model differs from the other, P the other's and Q the model's distribution of a token. kl: mean of KL(P || Q) in
    nats, and the largest, median and 99th percentile over all tokens. agreement: share of tokens where both think the same
    token most likely. loss_percent: the model's loss above the other's, in percent of it. *_error: one standard error of the
    mean over windows; None for a single window."""

    kl: float
    kl_error: float | None
    kl_median: float
    kl_99: float
    kl_max: float
    kl_histogram: Histogram
    agreement: float
    loss_percent: float
    loss_percent_error: float | None


@dataclass(frozen=True)
class FileRow:
    """One text. tokens: predicted of it. against_*, kl (mean over its tokens), agreement: None without another model. All
    figures but name, tokens and bytes_per_token are None where no token of it was predicted."""

    name: str
    tokens: int
    bytes_per_token: float
    loss: float | None
    bits_per_byte: float | None
    against_loss: float | None = None
    against_bits_per_byte: float | None = None
    kl: float | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class PositionRow:
    """Means over the tokens at inputs first..last of their window; against_loss, kl: None without another model."""

    first: int
    last: int
    loss: float
    against_loss: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """window: inputs of each; windows: how many; tokens: predicted, windows * window. bytes_per_token: of the texts, documents'
    UTF-8 bytes over their tokens with BOS and EOS. difference, against: None without another model."""

    window: int
    windows: int
    tokens: int
    bytes_per_token: float
    model: Rated
    against: Rated | None
    difference: Difference | None
    files: list[FileRow]
    positions: list[PositionRow]
    version: str = field(default=__version__)

    @property
    def labels(self) -> tuple[str, str]:
        """What tells the two models apart: name and scheme, else the cache's format, else only their order; "" for no other."""
        this, other = self.model, self.against
        if other is None:
            return f"{this.name} {this.quant}", ""
        first, second = (f"{r.name} {r.quant}" for r in (this, other))
        if first != second:
            return first, second
        if this.kv_dtype != other.kv_dtype:
            return f"{first} {this.kv_dtype}", f"{second} {other.kv_dtype}"
        return f"{first} (1)", f"{second} (2)"

    def to_json(self) -> dict[str, Any]:
        """The fields under their names, nested; null for what is None or not finite (the perplexity of a hopeless model)."""
        return {"kind": "dsv3 eval", "schema": 1, **_plain(asdict(self))}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
