"""Quantisation of activations, dequantisation of weights, and the change of FP8 encoding for AMD's gfx942."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsv3.errors import OperatorError, nearest
from dsv3.ops.spec import primitive
from dsv3.quant.fp8 import dequantize_block, power_of_two_at_least

# Largest quantised magnitude. e4m3fnuz could hold 240, but 224 = 448 / 2 keeps activations on the scale of converted weights.
FP8_MAX = {"float8_e4m3fn": 448.0, "float8_e4m3fnuz": 224.0, "float8_e5m2": 57344.0}


def torch_dtype(name: str) -> torch.dtype:
    """ "bfloat16" -> torch.bfloat16; OperatorError for a name that torch does not know."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        known = [n for n in vars(torch) if isinstance(getattr(torch, n), torch.dtype)]
        raise OperatorError(f"torch has no dtype {name!r}{nearest(name, known)}")
    return found


@primitive("x[T,K] -> q[T,K]:dtype scale[T,ceil(K/group)]:F32")
def act_quant(
    x: Tensor,
    group: int = 128,
    dtype: str = "float8_e4m3fn",
    scale_fmt: str = "float32",
    amax_floor: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """Per-token, per-group FP8 quantisation of activations, in float32.

    x [T, K] -> q [T, K] in `dtype`, scale f32 [T, ceil(K/group)] = max(max|group|, amax_floor) / largest (448 for e4m3fn, 224
    for e4m3fnuz), rounded up to a power of two for scale_fmt "ue8m0". q = x / scale (a division) rounded to nearest even and
    saturated. The last group may be ragged. A NaN makes its whole group NaN. Source: DeepSeek-V3 technical report, 3.3.2.

    Invariants:
    - a group of zeros gives q = 0 and a scale that is positive and finite
    - scaling x by a power of two, above the floor, scales the scale by it and leaves q
    - "ue8m0": the scale is a power of two, and not below max|group| / largest
    - where x / scale is a tie, the even code
    """
    if dtype not in FP8_MAX:
        raise OperatorError(f"act_quant: dtype {dtype!r} is not an FP8 type it knows: {', '.join(FP8_MAX)}")
    if scale_fmt not in ("float32", "ue8m0"):
        raise OperatorError(f"act_quant: scale_fmt {scale_fmt!r} is neither 'float32' nor 'ue8m0'")
    if group < 1 or not amax_floor >= 0:
        raise OperatorError(f"act_quant: group {group} must be positive and amax_floor {amax_floor} not negative")
    t, k = x.shape
    groups = -(-k // group)
    largest = FP8_MAX[dtype]
    work = pad(x.to(torch.float32), (0, groups * group - k)).view(t, groups, group)
    scale = work.abs().amax(dim=-1).clamp_min(amax_floor) / largest
    if scale_fmt == "ue8m0":
        scale = power_of_two_at_least(scale)
    q = (work / _divisor(scale)[..., None]).clamp(-largest, largest)
    return q.view(t, groups * group)[:, :k].contiguous().to(torch_dtype(dtype)), scale


def _divisor(scale: Tensor) -> Tensor:
    """The scale; 1 where it is 0, which only a floor of 0 over zeros gives, and zeros stay zero."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


@primitive("x[T,K] -> q[T,K]:i8 scale[T,1]:F32")
def quant_int8(x: Tensor, amax_floor: float = 1e-10) -> tuple[Tensor, Tensor]:
    """Per-token symmetric INT8 quantisation of activations, in float32.

    x [T, K] -> q i8 [T, K] in [-127, 127], scale f32 [T, 1] = max(max|row|, amax_floor) / 127; q = x / scale rounded half to
    even.

    Invariants:
    - -128 never occurs
    - a row of zeros gives q = 0 and a scale that is positive and finite
    - scaling x by a power of two, above the floor, scales the scale by it and leaves q
    """
    work = x.to(torch.float32)
    amax = work.abs().amax(dim=-1, keepdim=True) if x.shape[1] else work.new_zeros(x.shape[0], 1)
    scale = amax.clamp_min(amax_floor) / 127
    return torch.round(work / _divisor(scale)).clamp(-127, 127).to(torch.int8), scale


@primitive("weight[N,K]:f8 scale[ceil(N/128),ceil(K/128)]:f32 -> y[N,K]:dtype")
def dequant_block(weight: Tensor, scale: Tensor, dtype: str = "bfloat16") -> Tensor:
    """W[n, k] = code[n, k] * scale[n // 128, k // 128], rounded once to dtype.

    weight FP8 [N, K], scale f32 [ceil(N/128), ceil(K/128)] -> [N, K]. The checkpoint calls the scale `weight_scale_inv`, but
    it multiplies. Blocks are counted by 128, the last of each axis may be ragged. Source: DeepSeek-V3 weight documentation.

    Invariants:
    - scaling a block's scale by a power of two scales its values by it exactly
    """
    return dequantize_block(weight, scale, torch_dtype(dtype))


@primitive("weight[...]:f8 scale[...]:f32 -> weight'[...]:fnuz scale'[...]:F32")
def fn_to_fnuz(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3fn of any shape -> e4m3fnuz with the same bits, -0 (0x80) to 0x00, and doubled scales: exact.

    The fnuz encoding has exponent bias 8 instead of 7, so equal bits mean half the value. The NaN codes 0x7F and 0xFF would
    turn into numbers: OperatorError names how many there are.

    Invariants:
    - code times scale is unchanged for all 254 codes that are numbers
    """
    if weight.dtype != torch.float8_e4m3fn:
        raise OperatorError(f"fn_to_fnuz: weight is {weight.dtype}; expected float8_e4m3fn")
    bits = weight.contiguous().view(torch.uint8)
    if not bits.is_meta:
        nan_codes = int(((bits & 0x7F) == 0x7F).sum())
        if nan_codes:
            raise OperatorError(f"fn_to_fnuz: {nan_codes} NaN codes (0x7F or 0xFF) have no fnuz equivalent; reject the weight")
    bits = torch.where(bits == 0x80, torch.zeros_like(bits), bits)
    return bits.view(torch.float8_e4m3fnuz), scale * 2
