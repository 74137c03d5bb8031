"""Matrix products: few rows by kernels that decode weights in registers, many by torch's, over decoded tiles of the weight."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dsv3.plugin import Prepared
from dsv3_cpu import int8
from dsv3_cpu.kernels.absorbed import heads
from dsv3_cpu.kernels.product import decoded, grouped
from dsv3_cpu.programs import words_of
from dsv3_cpu.team import run
from dsv3_cpu.views import CODES, FIRST, Array, Weight, dense, flat, flat_words, scratch, scratch_address, tensor_weight, weight

FEW = 16  # rows up to which a weight is decoded row by row, and never kept
_TILE_NUMBERS = 1 << 21  # of a decoded tile


def few_into(y: Tensor, x: Tensor, w: Weight, experts: Array = FIRST, offsets: Array | None = None) -> None:
    """Rows offsets[j] to offsets[j + 1] of y [M, N]: those of x [M, K] by expert experts[j]; both float32 or both bfloat16,
    contiguous. Without offsets: all rows by the first.

    Other rows of y are not written. Work: every expert's weights once, and again for every four more rows.
    """
    rows, width = x.shape
    if offsets is None:
        used, which = 1, _first(rows)
    else:
        used, which = len(experts), words_of(experts, offsets)
    padded = -(-width // w.step) * w.step + w.peaks
    words = (
        *w.words, *which, x.data_ptr(), rows, width, scratch_address(rows * padded), rows, padded, _tile(w.rows * used),
        y.data_ptr(), rows, w.rows,
    )  # fmt: skip
    program = w.programs.get(x.dtype)
    if program is None:
        program = w.programs[x.dtype] = grouped.program(f"{w.signature},{_PRODUCT[x.dtype]}")
    run(program, w.expert_bytes * max(used, rows // 4), words)


_PRODUCT = {dtype: f"i8:1,i8:1,{code}:2,f4:2,i,{code}:2" for dtype, code in ((torch.float32, "f4"), (torch.bfloat16, "u2"))}


def _tile(rows: int) -> int:
    """Rows of a weight that a thread takes at a time, of so many in all: large enough to be worth the preparation of x, small
    enough for threads to end together."""
    return 64 if rows >= 2048 else 32 if rows >= 512 else 16


_kept_bounds: dict[int, tuple[Array, tuple[int, ...]]] = {}


def _first(rows: int) -> tuple[int, ...]:
    """The words of experts and offsets where all rows are the first's."""
    found = _kept_bounds.get(rows)
    if found is None:
        bounds = np.array([0, rows])
        found = _kept_bounds[rows] = bounds, words_of(FIRST, bounds)
    return found[1]


def many_into(y: Tensor, x: Tensor, w: Prepared, expert: int, dtype: torch.dtype) -> None:
    """y [T, N] = x [T, K] by one expert, over tiles of it decoded to float32, and rounded to dtype, that of the product."""
    known = weight(w)
    if w.quant == "int8-w8a8":
        int8.many_into(y, x, known.values[expert], known.scales[expert])
        return
    stored = w.tensors["weight"]
    if stored.dtype == dtype:  # stored as it is multiplied
        y.copy_(torch.mm(x.to(dtype), (stored[expert] if stored.dim() == 3 else stored).t()))
        return
    x = x.to(dtype)
    n, k = known.values.shape[1], x.shape[1]
    step = max(16, min(n, _TILE_NUMBERS // max(1, k)))
    numbers = scratch(step, k)
    for first in range(0, n, step):
        rows = min(step, n - first)
        decoded(4 * rows * k, known.values, known.scales, expert, first, numbers[:rows])
        y[:, first : first + rows] = torch.mm(x, torch.from_numpy(numbers[:rows]).to(dtype).t())


def quant_linear_few(x: Tensor, w: Prepared) -> Tensor:
    """At most FEW rows."""
    x = dense(x)
    y = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype)
    if w.quant == "int8-w8a8":
        int8.rows_into(y, x, weight(w), FIRST, np.array([0, x.shape[0]]))
    else:
        few_into(y, x, weight(w))
    return y


def quant_linear_many(x: Tensor, w: Prepared) -> Tensor:
    """By products in float32."""
    return _many(x, w, torch.float32)


def quant_linear_bf16(x: Tensor, w: Prepared) -> Tensor:
    """Where there are instructions for products of bfloat16."""
    return _many(x, w, torch.bfloat16)


def _many(x: Tensor, w: Prepared, dtype: torch.dtype) -> Tensor:
    y = torch.empty(x.shape[0], w.shape[0])
    many_into(y, x, w, 0, dtype)
    return y.to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The weight in its own dtype, as it is stored; a bias is added before the rounding."""
    if bias is not None:
        return linear(x.to(torch.float32), weight, None).add_(bias).to(x.dtype)
    if x.shape[0] > FEW:
        return _many(x, Prepared("canonical", "none", tuple(weight.shape), {"weight": weight}), torch.float32)
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
            program = _head_programs[key] = heads.program(f"{code}:3,{CODES[weight.dtype]}:1,i,i,i,{code}:3")
        run(program, real.nbytes, (x.data_ptr(), *x.shape, *flat_words(weight), *strides, y.data_ptr(), *y.shape))
        return y
    product = torch.bmm(x.transpose(0, 1).to(torch.float32), weight.to(torch.float32))
    return product.transpose(0, 1).to(x.dtype).contiguous()


_head_programs: dict[tuple[torch.dtype, torch.dtype], int] = {}


def router_gemm(x: Tensor, weight: Tensor) -> Tensor:
    return linear(x.to(torch.float32), weight, None)
