"""From tensors as a checkpoint stores them to the canonical ones of `Prepared`, and to real numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.checkpoint.stored import StoredFormat
from dsv3.quant.fp8 import BLOCK, dequantize_block
from dsv3.quant.int4 import dequantize_group
from dsv3.quant.int8 import dequantize_channel


def canonical_codes(codes: Tensor, stored: StoredFormat, k: int) -> Tensor:
    """Codes of rows of a weight with k columns, as `Prepared` holds them: e4m3fn, i8, or u8 nibbles.

    Words are little-endian and filled from the lowest bits: their bytes are the codes, or pairs of them, in order.
    """
    if stored == "int8-packed":
        return codes.view(torch.uint8)[:, :k].bitwise_xor(0x80).view(torch.int8)
    if stored == "int4":
        return codes.view(torch.uint8)[:, : -(-k // 2)]
    return codes


def real_rows(
    codes: Tensor, scale: Tensor | None, stored: StoredFormat, k: int, start: int, stop: int, dtype: torch.dtype
) -> Tensor:
    """Rows start to stop of a stored weight [N, k] in `dtype`; start is a multiple of 128."""
    part = codes[start:stop]
    if scale is None:
        return part.to(dtype)
    if stored == "fp8":
        return dequantize_block(part, scale[start // BLOCK : -(-stop // BLOCK)], dtype)
    part, scale = canonical_codes(part, stored, k), scale[start:stop].to(torch.float32)
    if stored == "int4":
        return dequantize_group(part, scale, k, dtype)
    return dequantize_channel(part, scale, dtype)
