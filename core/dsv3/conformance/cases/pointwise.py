"""Cases of norms, activation, rotation, embedding, sampling, MTP's input and the collective."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dsv3.conformance.case import Case, Make, Setting, each, index, strided
from dsv3.conformance.data import Data
from dsv3.conformance.result import Size

ROWS: tuple[tuple[int, int, Size], ...] = (
    (1, 128, "quick"), (5, 100, "quick"), (0, 64, "quick"), (65, 129, "quick"), (2, 1, "small"), (63, 48, "small"),
    (64, 256, "small"), (127, 33, "small"), (128, 512, "small"), (129, 72, "small"), (3, 1536, "small"), (4097, 64, "full"),
    (17, 7168, "full"),
)  # fmt: skip


def cases() -> Iterator[Case]:
    yield from _rms_norm()
    yield from _add_rms_norm()
    yield from _silu_mul()
    yield from _rope()
    yield from _embedding()
    yield from _sampling()
    yield from _mtp()
    yield from _all_reduce()


def norm_weight(d: Data, name: str, width: int, dtype: torch.dtype) -> Tensor:
    """Around 1, some negative, as trained norms are."""
    return (1 + 0.5 * d.normal(name, width)).to(dtype)


def _rms_norm() -> Iterator[Case]:
    def make(t: int, width: int, distribution: str, eps: float = 1e-6, view: bool = False, scale: float = 1.0) -> Make:
        def arguments(d: Data, dtype: torch.dtype, s: Setting) -> dict[str, Any]:
            x = (d.real("x", distribution, t, width) * scale).to(dtype)
            return {"x": strided(x, 8) if view else x, "weight": norm_weight(d, "w", width, dtype), "eps": eps}

        return arguments

    for t, width, size in ROWS:
        yield from each("rms_norm", f"t{t}-d{width}/normal", make(t, width, "normal"), size)
    for distribution in ("outliers", "zeros", "onehot", "nanrow", "integers"):
        quick: Size = "quick" if distribution in ("outliers", "zeros") else "small"
        yield from each("rms_norm", f"t6-d96/{distribution}", make(6, 96, distribution), quick)
    yield from each("rms_norm", "t5-d64/strided", make(5, 64, "normal", view=True), "quick")
    yield from each("rms_norm", "t5-d64/eps1e-5-small", make(5, 64, "normal", 1e-5, scale=2.0**-8), "quick")
    yield from each("rms_norm", "t5-d64/tiny", make(5, 64, "small"))
    for scale in (64, 256):
        yield from each("rms_norm", f"t5-d200/x{scale}", make(5, 200, "normal", scale=scale))


def _add_rms_norm() -> Iterator[Case]:
    def make(t: int, width: int, distribution: str, eps: float = 1e-6) -> Make:
        def arguments(d: Data, dtype: torch.dtype, s: Setting) -> dict[str, Any]:
            x, residual = d.real("x", distribution, t, width).to(dtype), d.normal("residual", t, width) * 8
            if distribution == "cancelling":
                residual = -x.to(torch.float32) * (1 + 2.0**-6)
            weight = norm_weight(d, "w", width, dtype)
            return {"x": x, "residual": residual.to(dtype), "weight": weight, "eps": eps}

        return arguments

    for t, width, size in ROWS:
        yield from each("add_rms_norm", f"t{t}-d{width}/normal", make(t, width, "normal"), size)
    for distribution in ("outliers", "zeros", "cancelling", "nanrow"):
        yield from each("add_rms_norm", f"t6-d96/{distribution}", make(6, 96, distribution))
    yield from each("add_rms_norm", "t6-d96/eps1e-3", make(6, 96, "small", 1e-3))


def _silu_mul() -> Iterator[Case]:
    def make(t: int, width: int, distribution: str, scale: float = 1.0) -> Make:
        def arguments(d: Data, dtype: torch.dtype, s: Setting) -> dict[str, Any]:
            return {"x": (d.real("x", distribution, t, 2 * width) * scale).to(dtype)}

        return arguments

    for t, width, size in ROWS:
        yield from each("silu_mul", f"t{t}-i{width}/normal", make(t, width, "normal"), size)
    for distribution in ("outliers", "zeros", "nanrow", "integers", "small"):
        yield from each("silu_mul", f"t6-i48/{distribution}", make(6, 48, distribution), "quick")
    for scale in (12, 60):
        yield from each("silu_mul", f"t6-i48/x{scale}", make(6, 48, "normal", scale))


def table(length: int, width: int) -> Tensor:
    """cos and sin of `length` positions at the usual frequencies, f32 [length, width]: exact arithmetic is no matter here, the
    table is an input."""
    frequency = torch.pow(torch.tensor(10000.0, dtype=torch.float64), -torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1).to(torch.float32)


def _rope() -> Iterator[Case]:
    def make(t: int, heads: int, width: int, interleaved: bool, kind: str = "", wide: bool = False) -> Make:
        def arguments(d: Data, dtype: torch.dtype, s: Setting) -> dict[str, Any]:
            x = d.real("x", "outliers" if kind == "outliers" else "normal", t, heads, width).to(dtype)
            positions = d.integers("positions", 0, 5000, t)
            if kind == "zero":
                positions = positions * 0
            cos_sin = table(5000, width)
            cos_sin = cos_sin if dtype != torch.float64 else cos_sin.to(dtype)
            if kind == "strided":
                x = strided(x, 6)
            return {"x": x, "positions": index(positions, wide), "cos_sin": cos_sin, "interleaved": interleaved}

        return arguments

    shapes: tuple[tuple[int, int, int, Size], ...] = (
        (1, 1, 64, "quick"), (5, 3, 8, "quick"), (0, 2, 16, "quick"), (65, 16, 32, "small"), (2, 1, 2, "small"),
        (129, 2, 10, "small"), (4, 128, 64, "full"), (4097, 1, 64, "full"),
    )  # fmt: skip
    for t, heads, width, size in shapes:
        for name, interleaved in (("pairs", True), ("halves", False)):
            yield from each("apply_rope", f"t{t}-h{heads}-p{width}/{name}", make(t, heads, width, interleaved), size)
    for kind in ("strided", "zero", "outliers"):
        yield from each("apply_rope", f"t7-h4-p16/{kind}", make(7, 4, 16, True, kind), "quick")
    yield from each("apply_rope", "t7-h4-p16/int64", make(7, 4, 16, True, wide=True))


def _embedding() -> Iterator[Case]:
    def make(t: int, vocab: int, width: int, wide: bool = False) -> Make:
        def arguments(d: Data, dtype: torch.dtype, s: Setting) -> dict[str, Any]:
            ids = d.integers("ids", 0, vocab, t)
            ids[: min(t, 3)] = torch.tensor([0, vocab - 1, 0])[: min(t, 3)]
            return {"ids": index(ids, wide), "table": d.normal("table", vocab, width).to(dtype)}

        return arguments

    for t, vocab, width in ((1, 7, 64), (5, 100, 33), (0, 10, 16), (65, 300, 128), (129, 64, 100)):
        yield from each("embedding", f"t{t}-v{vocab}-h{width}", make(t, vocab, width), "quick")
    yield from each("embedding", "t6-v50-h40/int64", make(6, 50, 40, True))


def _sampling() -> Iterator[Case]:
    def make(rows: int, vocab: int, kind: str) -> Make:
        def arguments(d: Data, dtype: torch.dtype, s: Setting) -> dict[str, Any]:
            logits = d.normal("logits", rows, vocab) * (4 if kind != "flat" else 0.0)
            temperature = torch.tensor([0.0, 0.5, 1.0, 2.0])[d.integers("t", 0, 4, rows)]
            if kind == "greedy":
                temperature = temperature * 0
            if kind == "ties":
                temperature, logits = temperature * 0, d.integers("logits", 0, 3, rows, vocab).float()
            if kind == "flat":
                temperature = temperature + 1
            if kind == "masked":
                logits[d.uniform("mask", rows, vocab) < 0.7] = float("-inf")
                logits[:, vocab // 2] = 1.0
            if kind == "large":
                logits = logits * 2500
            seeds = d.integers("seeds", -(2**31), 2**31, rows) * (2**31) + d.integers("seeds.low", 0, 2**31, rows)
            positions = index(d.integers("positions", 0, 200000, rows))
            return {"logits": logits.to(dtype), "seeds": seeds, "positions": positions, "temperature": temperature}

        return arguments

    for kind in ("mixed", "greedy", "ties", "flat", "masked", "large"):
        for rows, vocab in ((1, 50), (7, 1000), (0, 20), (33, 129)):
            size: Size = "quick" if vocab != 129 else "small"
            yield from each("gumbel_argmax", f"s{rows}-v{vocab}/{kind}", make(rows, vocab, kind), size)
    yield from each("gumbel_argmax", "s3-v129280/mixed", make(3, 129280, "mixed"), "full")


def _mtp() -> Iterator[Case]:
    def make(t: int, width: int, distribution: str) -> Make:
        def arguments(d: Data, dtype: torch.dtype, s: Setting) -> dict[str, Any]:
            return {
                "embedding": d.real("e", distribution, t, width).to(dtype) * 0.1,
                "hidden": d.normal("h", t, width).to(dtype) * 4,
                "enorm": norm_weight(d, "en", width, dtype), "hnorm": norm_weight(d, "hn", width, dtype),
                "eh_proj": (d.normal("w", width, 2 * width) / width**0.5).to(dtype), "eps": 1e-6,
            }  # fmt: skip

        return arguments

    for t, width, size in ((1, 64, "quick"), (5, 100, "quick"), (0, 32, "quick"), (65, 129, "small"), (3, 1024, "full")):
        yield from each("mtp_combine", f"t{t}-h{width}/normal", make(t, width, "normal"), size)  # type: ignore[arg-type]
    for distribution in ("outliers", "zeros"):
        yield from each("mtp_combine", f"t6-h72/{distribution}", make(6, 72, distribution))


def _all_reduce() -> Iterator[Case]:
    def make(t: int) -> Make:
        return lambda d, dtype, s: {"x": d.normal("x", t, 40).to(dtype), "group": None}

    for t in (0, 1, 5):
        yield from each("all_reduce", f"t{t}-h40/one-rank", make(t), "quick")
