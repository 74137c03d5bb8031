"""Prepared weights as inputs of a model: the facts a model depends on, and the way from stored codes to float32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsv3_onnxruntime.emit.quantise import BLOCK, fp8, int8
from dsv3_onnxruntime.graph import FLOAT, Graph


@dataclass(frozen=True)
class Weight:
    """What a model is specialised on besides dtypes. ragged_n, ragged_k: N or K modulo 128; sizes themselves are dynamic."""

    quant: str
    ragged_n: int
    ragged_k: int
    scale_fmt: str = "float32"

    @property
    def odd(self) -> bool:
        return bool(self.ragged_k % 2)

    @property
    def padding(self) -> int:
        """What is missing to a whole block along K."""
        return -self.ragged_k % BLOCK


def dequantise(g: Graph, w: Weight, codes: str, scale: str | None) -> str:
    """codes and scale of one canonical [N, K] weight -> float32 [N, K], exact but for the one product with the scale."""
    if w.quant == "none":
        return g.cast(codes, FLOAT)
    assert scale is not None
    if w.quant.startswith("int8"):
        return g.op("Mul", g.cast(codes, FLOAT), scale)
    if w.quant.startswith("int4"):
        return _int4(g, w, codes, scale)
    return fp8_blocks(g, g.cast(codes, FLOAT), scale, bool(w.ragged_n), bool(w.ragged_k))


def fp8_blocks(g: Graph, values: str, scale: str, ragged_n: bool, ragged_k: bool) -> str:
    """values [N, K] times scale [ceil(N/128), ceil(K/128)] of its 128x128 block."""
    rows, cols = g.size(scale, 0), g.size(scale, 1)
    block = g.ints(BLOCK)
    grid = g.op("Concat", rows, block, cols, block, axis=0)
    tall = g.op("Unsqueeze", scale, g.ints(1, 3))
    if not ragged_n and not ragged_k:
        return g.op("Reshape", g.op("Mul", g.op("Reshape", values, grid), tall), g.shape(values))
    flat = g.op("Concat", g.op("Mul", rows, block), g.op("Mul", cols, block), axis=0)
    spread = g.op("Reshape", g.op("Expand", tall, grid), flat)
    return g.op("Mul", values, g.op("Slice", spread, g.ints(0, 0), g.shape(values), g.ints(0, 1)))


def columns(g: Graph, values: str, scale: str, padding: int) -> str:
    """values [N, K] times scale [N, ceil(K/128)] of its group of 128 along K."""
    tall = g.op("Unsqueeze", scale, g.ints(2))
    if not padding:
        return g.op("Reshape", g.op("Mul", g.op("Reshape", values, g.ints(0, -1, BLOCK)), tall), g.shape(values))
    spread = g.op("Expand", tall, g.op("Concat", g.shape(scale), g.ints(BLOCK), axis=0))
    spread = g.op("Reshape", spread, g.ints(0, -1))
    return g.op("Mul", values, g.op("Slice", spread, g.ints(0), g.size(values, 1), g.ints(1)))


def _int4(g: Graph, w: Weight, packed: str, scale: str) -> str:
    """Low nibble first, nibble = q + 8."""
    low = g.op("BitwiseAnd", packed, g.const(15, np.uint8))
    high = g.op("BitShift", packed, g.const(4, np.uint8), direction="RIGHT")
    last = g.ints(2)
    both = g.op("Concat", g.op("Unsqueeze", low, last), g.op("Unsqueeze", high, last), axis=2)
    codes = g.op("Sub", g.cast(g.op("Reshape", both, g.ints(0, -1)), FLOAT), g.const(8.0))
    if w.odd:
        codes = g.op("Slice", codes, g.ints(0), g.ints(-1), g.ints(1))
    return columns(g, codes, scale, w.padding)


def product(g: Graph, x: str, w: Weight, codes: str, scale: str | None, encoding: int) -> str:
    """x [T, K] @ W^T in float32, through one canonical weight whose codes have the element type `encoding`."""
    if w.quant == "int8-w8a8":
        assert scale is not None
        q, s = int8(g, x, 1e-10)
        return int8_product(g, q, s, codes, scale)
    if w.quant == "fp8-w8a8":
        q, s = fp8(g, x, encoding, BLOCK, w.padding, w.scale_fmt, 1e-4)
        x = columns(g, g.cast(q, FLOAT), s, w.padding)
    return g.op("Gemm", x, dequantise(g, w, codes, scale), transB=1)


def int8_product(g: Graph, a: str, a_scale: str, b: str, b_scale: str) -> str:
    """a i8 [T, K] @ b i8 [N, K]^T, exact in int32, then times a_scale [T, 1], then times b_scale [N, 1]."""
    total = g.cast(g.op("MatMulInteger", a, g.op("Transpose", b, perm=[1, 0])), FLOAT)
    return g.op("Mul", g.op("Mul", total, a_scale), g.op("Transpose", b_scale, perm=[1, 0]))
