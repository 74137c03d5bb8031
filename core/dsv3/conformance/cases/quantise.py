"""Cases of quantisation: activations, weights, and the change of encoding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dsv3.conformance.case import Case, Make, Setting, each
from dsv3.conformance.cases.pointwise import norm_weight
from dsv3.conformance.data import Data
from dsv3.conformance.result import Size
from dsv3.quant.fp8 import blocks

FORMATS = (("e4m3fn", "float8_e4m3fn", ()), ("e4m3fnuz", "float8_e4m3fnuz", ("float8_e4m3fnuz",)))
SHAPES: tuple[tuple[int, int, Size], ...] = (
    (1, 128, "quick"), (5, 300, "quick"), (0, 128, "quick"), (65, 256, "quick"), (2, 100, "small"), (129, 384, "small"),
    (3, 1, "small"), (64, 129, "small"), (7, 1000, "small"), (4097, 128, "full"), (16, 7168, "full"),
)  # fmt: skip
KINDS = ("outliers", "zeros", "ties", "small", "large", "integers", "onehot", "positive")


def cases() -> Iterator[Case]:
    yield from _act_quant()
    yield from _quant_int8()
    yield from _fused()
    yield from _dequant()
    yield from _fnuz()


def _values(distribution: str) -> Any:
    def make(d: Data, dtype: torch.dtype, t: int, k: int) -> Tensor:
        x = d.real("x", distribution, t, k)
        if distribution == "normal" and t > 1:  # rows of very different size: one scale for all is far off
            x = x * torch.exp2(d.integers("x.row", -8, 9, t, 1).float())
        largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
        return x.clamp(-largest, largest).to(dtype)

    return make


def _act_quant() -> Iterator[Case]:
    def make(t: int, k: int, kind: str, encoding: str, fmt: str, group: int = 128, floor: float = 1e-4) -> Make:
        def arguments(d: Data, dtype: torch.dtype, s: Setting) -> dict[str, Any]:
            x = _values(kind)(d, dtype, t, k)
            return {"x": x, "group": group, "dtype": encoding, "scale_fmt": fmt, "amax_floor": floor}

        return arguments

    for short, encoding, needs in FORMATS:
        for fmt in ("float32", "ue8m0"):
            for t, k, size in SHAPES:
                made = make(t, k, "normal", encoding, fmt)
                yield from each("act_quant", f"{short}-{fmt}/t{t}-k{k}/normal", made, size, needs_dtypes=needs)
            for kind in KINDS:
                quick: Size = "quick" if kind in ("ties", "zeros", "large") else "small"
                made = make(6, 300, kind, encoding, fmt)
                yield from each("act_quant", f"{short}-{fmt}/t6-k300/{kind}", made, quick, needs_dtypes=needs)
    for group in (64, 32):
        made = make(5, 200, "normal", "float8_e4m3fn", "float32", group)
        yield from each("act_quant", f"e4m3fn-float32/t5-k200/group{group}", made)
    for floor in (1e-10, 1.0):
        made = make(5, 200, "small", "float8_e4m3fn", "float32", floor=floor)
        yield from each("act_quant", f"e4m3fn-float32/t5-k200/floor{floor:g}", made)
    for fmt in ("float32", "ue8m0"):
        made = make(5, 300, "nanrow", "float8_e4m3fn", fmt)
        yield from each("act_quant", f"e4m3fn-{fmt}/t5-k300/nanrow", made)


def _quant_int8() -> Iterator[Case]:
    def make(t: int, k: int, kind: str, floor: float = 1e-10) -> Make:
        def arguments(d: Data, dtype: torch.dtype, s: Setting) -> dict[str, Any]:
            if kind == "ties":  # halves of a scale that is a power of two
                x = d.integers("x", -126, 127, t, k).float() + 0.5
                x[:, ::7] = 127.0
                return {"x": (x * torch.exp2(d.integers("x.row", -3, 4, t, 1).float())).to(dtype), "amax_floor": floor}
            if kind == "lowest":  # the row's largest magnitude is negative: -127, never -128
                x = d.uniform("x", t, k)
                x[:, ::5] = -x[:, ::5] - 1
                return {"x": x.to(dtype), "amax_floor": floor}
            return {"x": _values(kind)(d, dtype, t, k), "amax_floor": floor}

        return arguments

    for t, k, size in SHAPES:
        yield from each("quant_int8", f"t{t}-k{k}/normal", make(t, k, "normal"), size)
    for kind in (*KINDS, "lowest"):
        quick: Size = "quick" if kind in ("ties", "zeros", "lowest") else "small"
        yield from each("quant_int8", f"t6-k300/{kind}", make(6, 300, kind), quick)
    yield from each("quant_int8", "t6-k300/floor1", make(6, 300, "small", 1.0))


def _fused() -> Iterator[Case]:
    """rms_norm_quant and silu_mul_quant."""

    def norm(t: int, k: int, kind: str, encoding: str, fmt: str, group: int) -> Make:
        def arguments(d: Data, dtype: torch.dtype, s: Setting) -> dict[str, Any]:
            weight = norm_weight(d, "w", k, dtype)
            return {
                "x": _values(kind)(d, dtype, t, k), "weight": weight, "eps": 1e-6, "group": group, "dtype": encoding,
                "scale_fmt": fmt,
            }  # fmt: skip

        return arguments

    def silu(t: int, k: int, kind: str, encoding: str, fmt: str, group: int) -> Make:
        def arguments(d: Data, dtype: torch.dtype, s: Setting) -> dict[str, Any]:
            x = _values("normal" if kind == "normal" else kind)(d, dtype, t, 2 * k)
            return {"x": x, "group": group, "dtype": encoding, "scale_fmt": fmt}

        return arguments

    for op, make in (("rms_norm_quant", norm), ("silu_mul_quant", silu)):
        for short, encoding, needs in FORMATS:
            for fmt in ("float32", "ue8m0"):
                for t, k, size in SHAPES[:7]:
                    made = make(t, k, "normal", encoding, fmt, 128)
                    yield from each(op, f"{short}-{fmt}/t{t}-k{k}/normal", made, size, needs_dtypes=needs)
                for kind in ("outliers", "zeros"):
                    made = make(6, 300, kind, encoding, fmt, 128)
                    yield from each(op, f"{short}-{fmt}/t6-k300/{kind}", made, needs_dtypes=needs)
        yield from each(op, "e4m3fn-float32/t5-k200/group64", make(5, 200, "normal", "float8_e4m3fn", "float32", 64))


def _dequant() -> Iterator[Case]:
    def make(n: int, k: int, out: str, kind: str) -> Make:
        def arguments(d: Data, dtype: torch.dtype, s: Setting) -> dict[str, Any]:
            codes = d.integers("codes", 0, 256, n, k).to(torch.uint8)
            if kind != "nan":
                codes = torch.where((codes & 0x7F) == 0x7F, codes - 1, codes)
            scale = torch.exp2(d.integers("s", -8, 9, blocks(n), blocks(k)).float()) * (
                1 + d.uniform("m", blocks(n), blocks(k))
            )
            scale = scale * 2.0**-118 if kind == "tiny-scales" else scale
            return {"weight": codes.view(torch.float8_e4m3fn), "scale": scale, "dtype": out}

        return arguments

    outputs = (("f32", "float32"), ("bf16", "bfloat16"))
    for n, k, size in ((128, 128, "quick"), (300, 200, "quick"), (100, 129, "quick"), (576, 256, "small"), (1, 1, "small"),
                       (129, 384, "small"), (384, 384, "small"), (2112, 1000, "full")):  # fmt: skip
        for tag, out in outputs:
            yield Case("dequant_block", f"n{n}-k{k}/normal", tag, make(n, k, out, "normal"), size)  # type: ignore[arg-type]
    for kind in ("nan", "tiny-scales"):
        for tag, out in outputs:
            yield Case("dequant_block", f"n200-k300/{kind}", tag, make(200, 300, out, kind))


def _fnuz() -> Iterator[Case]:
    def make(*shape: int, every: bool = False) -> Make:
        def arguments(d: Data, dtype: torch.dtype, s: Setting) -> dict[str, Any]:
            codes = d.integers("codes", 0, 256, *shape).to(torch.uint8)
            if every:
                codes = torch.arange(256).to(torch.uint8).view(shape)
            codes = torch.where((codes & 0x7F) == 0x7F, torch.full_like(codes, 0x80), codes)
            return {"weight": codes.view(torch.float8_e4m3fn), "scale": d.uniform("s", *shape[:-2], 2, 3) + 2.0**-20}

        return arguments

    for name, shape in (("n100-k70", (100, 70)), ("e3-n40-k33", (3, 40, 33)), ("n0-k16", (0, 16))):
        yield Case("fn_to_fnuz", name, "f32", make(*shape), "quick")
    yield Case("fn_to_fnuz", "all-codes", "f32", make(16, 16, every=True), "quick")
