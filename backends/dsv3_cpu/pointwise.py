"""Norms, the gated activation, rotation."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3_cpu.programs import Kernel, float_word
from dsv3_cpu.team import run
from dsv3_cpu.views import CODES, array, dense, indices, kept, kept_words, made

# How much more work a number is than the bytes it takes, where an activation or a rotation is computed.
ACTIVATION = 8
_rms_norm, _add_rms_norm, _silu_mul, _rope = (
    Kernel(f"pointwise.{name}") for name in ("rms_norm", "add_rms_norm", "silu_mul", "rope")
)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = dense(x)
    y = torch.empty_like(x)
    norm, size = kept_words(weight), x.shape
    key = (1, x.dtype, weight.dtype)
    program = _programs.get(key)
    if program is None:
        code = CODES[x.dtype]
        program = _programs[key] = _rms_norm.program(f"{code}:2,{CODES[weight.dtype]}:1,f,{code}:2")
    run(program, 4 * size.numel(), (x.data_ptr(), *size, *norm, float_word(eps), y.data_ptr(), *size))
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, residual = dense(x), dense(residual)
    y, total = torch.empty_like(x), torch.empty_like(x)
    norm, size = kept_words(weight), x.shape
    key = (2, x.dtype, weight.dtype)
    program = _programs.get(key)
    if program is None:
        code = CODES[x.dtype]
        program = _programs[key] = _add_rms_norm.program(f"{code}:2,{code}:2,{CODES[weight.dtype]}:1,f,{code}:2,{code}:2")
    words = (
        x.data_ptr(), *size, residual.data_ptr(), *size, *norm, float_word(eps), y.data_ptr(), *size, total.data_ptr(), *size,
    )  # fmt: skip
    run(program, 4 * size.numel(), words)
    return y, total


_programs: dict[tuple[int, torch.dtype, torch.dtype], int] = {}


def silu_mul(x: Tensor) -> Tensor:
    y, out = made((x.shape[0], x.shape[1] // 2), x.dtype)
    values = array(x)
    _silu_mul(ACTIVATION * values.nbytes, values, out)
    return y


def apply_rope(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
    y, out = made(tuple(x.shape), x.dtype)
    values = array(x)
    _rope(ACTIVATION * values.nbytes, values, indices(positions), kept(cos_sin), interleaved, out)
    return y
