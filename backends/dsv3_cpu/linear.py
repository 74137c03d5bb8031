"""Matrix products: few rows by kernels that decode weights in registers, many by torch's, over decoded tiles of the weight."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dsv3.plugin import Prepared
from dsv3_cpu import int8
from dsv3_cpu.programs import Kernel, words_of
from dsv3_cpu.team import hold, run, tile_of
from dsv3_cpu.views import (
    CODES,
    DEFAULT,
    FIRST,
    Array,
    Config,
    Weight,
    dense,
    flat,
    flat_words,
    scratch_address,
    scratch_tensor,
    tensor_weight,
    weight,
)

FEW = 32  # rows up to which a weight is decoded row by row, and never kept
_TILE_NUMBERS = 1 << 21  # of a decoded tile
_LONG_WORK = 1 << 32  # multiplications that take far longer than making code for them
_grouped, _spelled, _heads = Kernel("product.grouped"), Kernel("spell.spelled"), Kernel("absorbed.heads")


def few_into(
    y: Tensor,
    x: Tensor,
    w: Weight,
    experts: Array = FIRST,
    offsets: Array | None = None,
    tile: int | None = None,
    snapped: bool = False,
) -> None:
    """Rows offsets[j] to offsets[j + 1] of y [M, N]: those of x [M, K] by expert experts[j]; both float32 or both bfloat16,
    contiguous. Without offsets: all rows by the first. tile: see `tile_of`. snapped: x as its INT8 codes have it.

    Other rows of y are not written. Work: every expert's weights once, and again for every four more rows.
    """
    rows, width = x.shape
    if offsets is None:
        used, which = 1, _first(rows)
    else:
        used, which = len(experts), words_of(experts, offsets)
        hold(experts, offsets)
    code, padded = w.arranged(width, x.dtype)
    words = (
        *w.words, *which, x.data_ptr(), rows, width, scratch_address(rows * padded), rows, padded, tile_of(w.rows * used, tile),
        int(snapped), y.data_ptr(), rows, w.rows,
    )  # fmt: skip
    program = w.programs.get(x.dtype)
    if program is None:
        program = w.programs[x.dtype] = _grouped.program(f"{w.signature},{_PRODUCT[x.dtype].replace('?', code)}")
    run(program, w.expert_bytes * max(used, rows // 4), words)


_PRODUCT = {dtype: f"i8:1,i8:1,{code}:2,?:2,i,i,{code}:2" for dtype, code in ((torch.float32, "f4"), (torch.bfloat16, "u2"))}


_kept_bounds: dict[int, tuple[Array, tuple[int, ...]]] = {}


def _first(rows: int) -> tuple[int, ...]:
    """The words of experts and offsets where all rows are the first's."""
    found = _kept_bounds.get(rows)
    if found is None:
        bounds = np.array([0, rows])
        found = _kept_bounds[rows] = bounds, words_of(FIRST, bounds)
    return found[1]


def many_into(y: Tensor, x: Tensor, w: Prepared, expert: int) -> None:
    """y [T, N] = x [T, K] by one expert, in the dtype of x, which is that of the product too: over tiles of the weight written
    out in it."""
    known = weight(w)
    t = x.shape[0]
    if x.dtype == torch.bfloat16 and t * known.rows * x.shape[1] < _LONG_WORK and (rows := padded_rows(t)) > t:
        wider, found = x.new_zeros(rows, x.shape[1]), y.new_empty(rows, y.shape[1])
        wider[:t] = x
        many_into(found, wider, w, expert)
        y[:] = found[:t]
        return
    stored = w.tensors["weight"]
    if stored.dtype == x.dtype:  # stored as it is multiplied
        torch.mm(x, (stored[expert] if stored.dim() == 3 else stored).t(), out=y)
        return
    n, k = known.rows, x.shape[1]
    step = max(16, min(n, _TILE_NUMBERS // max(1, k)))
    for first in range(0, n, step):
        rows = min(step, n - first)
        tile = written_out(known, expert, first, rows, k, x.dtype)
        if rows == n:
            torch.mm(x, tile.t(), out=y)
        else:
            y[:, first : first + rows] = torch.mm(x, tile.t())


def padded_rows(rows: int) -> int:
    """How many rows a bfloat16 product of so many is done with: up to an eighth more, or to the next 16.

    oneDNN makes code anew for each number of rows, which takes a millisecond, and keeps it for a thousand of them."""
    step = max(16, 1 << max(0, rows.bit_length() - 4))
    return -(-rows // step) * step


def written_out(w: Weight, expert: int, first: int, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Rows of a weight as real numbers [rows, width], in memory that the next call uses again."""
    address = scratch_address(rows * width)
    key = ("spelled", dtype)
    program = w.programs.get(key)
    if program is None:
        program = w.programs[key] = _spelled.program(f"{w.signature},i,i,{CODES[dtype]}:2")
    run(program, 4 * rows * width, (*w.words, expert, first, address, rows, width))
    return scratch_tensor(rows, width, dtype)


def quant_linear_few(x: Tensor, w: Prepared, config: Config = DEFAULT) -> Tensor:
    """At most FEW rows. config: tile, see `tile_of`."""
    x = dense(x)
    y = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype)
    few_into(y, x, weight(w), tile=config.get("tile"), snapped=w.quant == "int8-w8a8")
    return y


def quant_linear_many(x: Tensor, w: Prepared) -> Tensor:
    """By products in float32."""
    if w.quant == "int8-w8a8":
        y = torch.empty(x.shape[0], w.shape[0])
        int8.many_into(y, x, weight(w).values[0], weight(w).scales[0])
        return y.to(x.dtype)
    return _many(x.to(torch.float32), w).to(x.dtype)


def quant_linear_bf16(x: Tensor, w: Prepared) -> Tensor:
    """Where there are instructions for products of bfloat16."""
    return _many(x, w)


def _many(x: Tensor, w: Prepared) -> Tensor:
    y = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype)
    many_into(y, x, w, 0)
    return y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The weight in its own dtype, as it is stored; a bias is added before the rounding."""
    if bias is not None:
        return linear(x.to(torch.float32), weight, None).add_(bias).to(x.dtype)
    if x.shape[0] > FEW:
        return quant_linear_many(x, Prepared("canonical", "none", tuple(weight.shape), {"weight": weight}))
    x = dense(x)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    few_into(y, x, tensor_weight(weight))
    return y


def bmm(x: Tensor, weight: Tensor) -> Tensor:
    """Few rows where the absorbed weights lie, as they lie; many by torch, in float32."""
    strides = weight.stride()
    if x.shape[0] <= FEW and 1 in strides[1:] and weight.numel():
        x, real = dense(x), flat(weight)
        y = torch.empty(x.shape[0], weight.shape[0], weight.shape[2], dtype=x.dtype)
        key = (x.dtype, weight.dtype)
        program = _head_programs.get(key)
        if program is None:
            code = CODES[x.dtype]
            program = _head_programs[key] = _heads.program(f"{code}:3,{CODES[weight.dtype]}:1,i,i,i,{code}:3")
        run(program, real.nbytes, (x.data_ptr(), *x.shape, *flat_words(weight), *strides, y.data_ptr(), *y.shape))
        return y
    product = torch.bmm(x.transpose(0, 1).to(torch.float32), weight.to(torch.float32))
    return product.transpose(0, 1).to(x.dtype).contiguous()


_head_programs: dict[tuple[torch.dtype, torch.dtype], int] = {}


def router_gemm(x: Tensor, weight: Tensor) -> Tensor:
    return linear(x.to(torch.float32), weight, None)
