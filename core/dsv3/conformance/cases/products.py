"""Cases of the matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dsv3.conformance.case import Case, Make, Setting, each, strided, weight
from dsv3.conformance.data import Data
from dsv3.conformance.result import Size
from dsv3.plugin import Quant
from dsv3.quant.fp8 import BLOCK, blocks

# T, N, K and the smallest size: sizes around blocks, sizes that share no factor with 16, V3's own ragged ones.
SHAPES: tuple[tuple[int, int, int, Size], ...] = (
    (1, 128, 128, "quick"), (5, 100, 129, "quick"), (65, 130, 300, "quick"), (3, 576, 256, "quick"), (0, 64, 128, "quick"),
    (2, 129, 640, "small"), (63, 64, 128, "small"), (64, 96, 256, "small"), (127, 40, 136, "small"), (128, 33, 384, "small"),
    (129, 48, 100, "small"), (7, 1, 512, "small"), (4, 257, 1000, "small"), (1, 384, 384, "small"),
    (64, 256, 512, "small"), (4, 512, 1024, "small"),
    (4097, 72, 512, "full"), (8, 256, 7168, "full"), (2, 320, 10944, "full"), (1, 2112, 1536, "full"),
)  # fmt: skip
DISTRIBUTIONS: tuple[tuple[str, Size], ...] = (
    ("outliers", "quick"), ("integers", "quick"), ("onehot", "quick"), ("cancelling", "small"), ("zeros", "small"),
    ("positive", "small"), ("nanrow", "small"), ("small", "small"),
)  # fmt: skip
SCHEMES: tuple[tuple[str, Quant, str], ...] = (
    ("none", "none", "float32"), ("fp8-w8a8", "fp8-w8a8", "float32"), ("fp8-w8a8-ue8m0", "fp8-w8a8", "ue8m0"),
    ("fp8-w8a16", "fp8-w8a16", "float32"), ("int8-w8a8", "int8-w8a8", "float32"), ("int8-w8a16", "int8-w8a16", "float32"),
    ("int4-w4a16", "int4-w4a16", "float32"),
)  # fmt: skip


def _of(distribution: str) -> str:
    """The weights' distribution beside that of the activations."""
    return distribution if distribution in ("integers", "cancelling", "positive") else "normal"


def cases() -> Iterator[Case]:
    yield from _linear()
    yield from _bmm()
    yield from _router()
    yield from _block_scaled()
    yield from _int8()
    yield from _quant_linear()


def _plain(name: str, t: int, n: int, k: int, distribution: str, bias: bool = False) -> Make:
    def make(d: Data, dtype: torch.dtype, s: Setting) -> dict[str, Any]:
        w = d.real("w", _of(distribution), n, k)
        w = w if distribution in ("integers", "cancelling") else w / k**0.5
        made: dict[str, Any] = {"x": d.real("x", distribution, t, k).to(dtype), "weight": w.to(dtype)}
        if name == "linear":
            made["bias"] = d.normal("bias", n).to(dtype) if bias else None
        return made

    return make


def _linear() -> Iterator[Case]:
    for t, n, k, size in SHAPES:
        yield from each("linear", f"t{t}-n{n}-k{k}/normal", _plain("linear", t, n, k, "normal"), size)
    for distribution, size in DISTRIBUTIONS:
        yield from each("linear", f"t9-n72-k300/{distribution}", _plain("linear", 9, 72, 300, distribution), size)
    for t in (1, 6):
        yield from each("linear", f"t{t}-n50-k96/bias", _plain("linear", t, 50, 96, "normal", bias=True), "quick")


def _router() -> Iterator[Case]:
    shapes: tuple[tuple[int, int, int, Size], ...] = (
        (1, 16, 96, "quick"), (65, 256, 200, "quick"), (0, 8, 64, "quick"), (5, 9, 129, "small"), (128, 64, 512, "small"),
        (3, 256, 7168, "full"), (4097, 8, 256, "full"),
    )  # fmt: skip
    for t, e, k, size in shapes:
        yield from each("router_gemm", f"t{t}-e{e}-k{k}/normal", _plain("router_gemm", t, e, k, "normal"), size)
    for distribution, size in DISTRIBUTIONS:
        yield from each("router_gemm", f"t9-e24-k300/{distribution}", _plain("router_gemm", 9, 24, 300, distribution), size)


def _bmm() -> Iterator[Case]:
    shapes: tuple[tuple[int, int, int, int, Size], ...] = (
        (1, 2, 32, 48, "quick"), (5, 3, 20, 33, "quick"), (0, 2, 16, 16, "quick"), (65, 16, 24, 40, "small"),
        (3, 1, 129, 100, "small"), (2, 5, 64, 1, "small"), (4, 128, 128, 512, "full"), (129, 8, 128, 64, "full"),
    )  # fmt: skip

    def make(t: int, h: int, a: int, c: int, distribution: str, view: str) -> Make:
        def arguments(d: Data, dtype: torch.dtype, s: Setting) -> dict[str, Any]:
            x, w = d.real("x", distribution, t, h, a).to(dtype), d.real("w", _of(distribution), h, a, c).to(dtype)
            if view == "uk":  # as the graph has them: W_UK rows inside kv_b, q's first part
                return {"x": strided(x, 4), "weight": strided(w.transpose(1, 2).contiguous(), 0).transpose(1, 2)}
            return {"x": x, "weight": strided(w, 5) if view == "wide" else w}

        return arguments

    for t, h, a, c, size in shapes:
        yield from each("bmm", f"t{t}-h{h}-a{a}-c{c}/normal", make(t, h, a, c, "normal", ""), size)
    for view in ("uk", "wide"):
        yield from each("bmm", f"t6-h4-a24-c40/{view}", make(6, 4, 24, 40, "normal", view), "quick")
    for distribution in ("integers", "onehot", "outliers", "nanrow"):
        yield from each("bmm", f"t7-h3-a40-c24/{distribution}", make(7, 3, 40, 24, distribution, ""))


def _codes(d: Data, name: str, encoding: str, distribution: str, *shape: int) -> Tensor:
    """FP8 operand codes."""
    x = d.real(name, "normal" if distribution == "max" else distribution, *shape)
    if distribution == "max":
        x = torch.where(x > 0, 448.0, -448.0)
    elif distribution not in ("integers", "onehot", "zeros"):
        x = x * 64
    largest = 224.0 if encoding == "float8_e4m3fnuz" else 448.0
    return x.clamp(-largest, largest).to(getattr(torch, encoding))


def _scales(d: Data, name: str, distribution: str, *shape: int) -> Tensor:
    """Scales that differ from block to block: 2^-6 to 2^5 times 1 to 2."""
    if distribution in ("integers", "onehot"):
        return torch.exp2(d.integers(name, -3, 4, *shape).float())
    base = torch.exp2(d.integers(name, -6, 6, *shape).float()) * (1 + d.uniform(f"{name}.m", *shape))
    return base * 2.0**-90 if distribution == "tiny-scales" else base


def _block_scaled() -> Iterator[Case]:
    def make(t: int, n: int, k: int, distribution: str, out: str, encoding: str = "float8_e4m3fn") -> Make:
        def arguments(d: Data, dtype: torch.dtype, s: Setting) -> dict[str, Any]:
            plain = "normal" if distribution == "tiny-scales" else distribution
            return {
                "a": _codes(d, "a", encoding, plain, t, k), "a_scale": _scales(d, "as", distribution, t, blocks(k)),
                "b": _codes(d, "wb", encoding, _of(plain) if plain != "max" else "max", n, k),
                "b_scale": _scales(d, "bs", distribution.replace("tiny-scales", "normal"), blocks(n), blocks(k)),
                "out_dtype": out,
            }  # fmt: skip

        return arguments

    for t, n, k, size in SHAPES:
        for tag, out in (("f32", "float32"), ("bf16", "bfloat16")):
            yield Case("block_scaled_mm", f"t{t}-n{n}-k{k}/normal", tag, make(t, n, k, "normal", out), size)
    for distribution in ("outliers", "integers", "onehot", "max", "zeros", "tiny-scales", "cancelling", "positive"):
        for tag, out in (("f32", "float32"), ("bf16", "bfloat16")):
            name, size = f"t9-n200-k520/{distribution}", "quick" if distribution in ("integers", "outliers") else "small"
            yield Case("block_scaled_mm", name, tag, make(9, 200, 520, distribution, out), size)
    for t, n, k in ((5, 200, 300), (1, 128, 256)):
        for tag, out in (("f32", "float32"), ("bf16", "bfloat16")):
            fnuz = make(t, n, k, "normal", out, "float8_e4m3fnuz")
            yield Case("block_scaled_mm", f"t{t}-n{n}-k{k}/fnuz", tag, fnuz, needs_dtypes=("float8_e4m3fnuz",))


def _int8() -> Iterator[Case]:
    def make(t: int, n: int, k: int, distribution: str, out: str) -> Make:
        def arguments(d: Data, dtype: torch.dtype, s: Setting) -> dict[str, Any]:
            def codes(name: str, *shape: int) -> Tensor:
                if distribution == "max":
                    return torch.where(d.integers(name, 0, 16, *shape) > 0, 127, -127).to(torch.int8)
                if distribution == "onehot" and name == "a":
                    return d.real(name, "onehot", *shape).mul(2).to(torch.int8)
                return d.integers(name, -127, 128, *shape).to(torch.int8)

            sizes = {"a_scale": ("as", t), "b_scale": ("bs", n)}
            scales = {key: _scales(d, name, "normal", rows, 1) for key, (name, rows) in sizes.items()}
            return {"a": codes("a", t, k), "b": codes("b", n, k), **scales, "out_dtype": out}

        return arguments

    for t, n, k, size in SHAPES:
        for tag, out in (("f32", "float32"), ("bf16", "bfloat16")):
            yield Case("int8_scaled_mm", f"t{t}-n{n}-k{k}/normal", tag, make(t, n, k, "normal", out), size)
    for distribution in ("max", "onehot"):
        for tag, out in (("f32", "float32"), ("bf16", "bfloat16")):
            yield Case("int8_scaled_mm", f"t9-n70-k1500/{distribution}", tag, make(9, 70, 1500, distribution, out), "quick")


def _quant_linear() -> Iterator[Case]:
    def make(t: int, n: int, k: int, quant: Quant, fmt: str, distribution: str, grid: str) -> Make:
        def arguments(d: Data, dtype: torch.dtype, s: Setting) -> dict[str, Any]:
            return {"x": d.real("x", distribution, t, k).to(dtype), "w": weight(d, "w", quant, (n, k), dtype, grid, fmt)}

        return arguments

    for name, quant, fmt in SCHEMES:
        for t, n, k, size in SHAPES:
            if name in ("fp8-w8a8-ue8m0", "int8-w8a16", "int4-w4a16") and size != "quick" and (t, n, k) != (4, 257, 1000):
                continue
            yield from each(
                "quant_linear", f"{name}/t{t}-n{n}-k{k}/normal", make(t, n, k, quant, fmt, "normal", "normal"), size
            )
        for distribution, size in DISTRIBUTIONS:
            if quant == "int8-w8a8" and distribution == "nanrow":  # an INT8 number cannot be NaN
                continue
            made = make(9, 200, 300, quant, fmt, distribution, _of(distribution))
            yield from each("quant_linear", f"{name}/t9-n200-k300/{distribution}", made, size)
        if quant.endswith("a8"):
            made = make(6, 64, 2 * BLOCK, quant, fmt, "ties", "normal")
            yield from each("quant_linear", f"{name}/t6-n64-k256/ties", made)
