"""Weights as the vendor's products read them.

- "nz", of int8-w8a8, experts or not: {"weight" i8 [.., K, N], on an NPU in FRACTAL_NZ, "scale" f32 [.., N]}.
- "int4", of int4-w4a16: {"weight" i32 [K, N/8] from the vendor's packing, "antiquant" bf16 [K/128, N], which is "scale"
  rounded, "scale" f32 [N, K/128]}.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from dsv3.plugin import Prepared
from dsv3.quant.int4 import pack, unpack
from dsv3_ascend import cpu, npu, vendor


def _vendor(emulated: bool) -> ModuleType:
    return cpu if emulated else npu


def to_nz(weight: Prepared, emulated: bool) -> Prepared:
    """A canonical INT8 weight, transposed and in FRACTAL_NZ."""
    tensors = weight.tensors
    codes = _vendor(emulated).to_nz(tensors["weight"].transpose(-1, -2).contiguous())
    return replace(weight, layout="nz", tensors={"weight": codes, "scale": tensors["scale"].squeeze(-1).contiguous()})


def from_nz(weight: Prepared) -> Prepared:
    """The inverse of `to_nz`."""
    codes = vendor.of(weight.tensors["weight"]).to_nd(weight.tensors["weight"])
    tensors = {"weight": codes.transpose(-1, -2).contiguous(), "scale": weight.tensors["scale"].unsqueeze(-1).contiguous()}
    return replace(weight, layout="canonical", tensors=tensors)


def to_int4(weight: Prepared, emulated: bool) -> Prepared:
    """A canonical INT4 weight [N, K] in the vendor's packing; K is a multiple of 128 and N of 8."""
    codes = unpack(weight.tensors["weight"], weight.shape[-1]).to(torch.int32).t().contiguous()
    scale = weight.tensors["scale"]
    tensors = {
        "weight": _vendor(emulated).int4_pack(codes),
        "antiquant": scale.t().to(torch.bfloat16).contiguous(),
        "scale": scale,
    }
    return replace(weight, layout="int4", tensors=tensors)


def from_int4(weight: Prepared) -> Prepared:
    """The inverse of `to_int4`. Which nibble holds which of eight numbers is the vendor's secret: packing 0 to 7 tells, and
    packing the result again proves it."""
    packed = weight.tensors["weight"]
    pack_again = vendor.of(packed).int4_pack
    codes = _unpacked(packed, pack_again)
    if not torch.equal(pack_again(codes), packed):
        raise ValueError("the vendor's INT4 packing is not one of eight neighbours at a time: it cannot be undone")
    tensors = {"weight": pack(codes.t().contiguous().to(torch.int8)), "scale": weight.tensors["scale"]}
    return replace(weight, layout="canonical", tensors=tensors)


def _unpacked(packed: Tensor, pack_again: Callable[[Tensor], Tensor]) -> Tensor:
    """i32 [K, N/8] -> i32 [K, N] in [-8, 7]."""
    probe = pack_again(torch.arange(8, dtype=torch.int32, device=packed.device)[None])
    nibbles = [(int(probe) >> shift) & 7 for shift in range(0, 32, 4)]
    shifts = torch.tensor([4 * nibbles.index(i) for i in range(8)], dtype=torch.int32, device=packed.device)
    found = (packed[..., None] >> shifts) & 15
    return torch.where(found > 7, found - 16, found).flatten(-2)


LAYOUTS: dict[str, tuple[Callable[[Prepared, bool], Prepared], Callable[[Prepared], Prepared]]] = {
    "nz": (to_nz, from_nz),
    "int4": (to_int4, from_int4),
}
