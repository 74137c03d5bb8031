"""How a linear's weight is stored in each number format: names, dtypes and shapes of its tensors. No torch.

| format | tensors beside each other, for a linear `X` of [N, K] |
| --- | --- |
| none | `X.weight` |
| fp8 | `X.weight` F8_E4M3 [N, K], `X.weight_scale_inv` F32 [ceil(N/128), ceil(K/128)]: DeepSeek's |
| int8 | `X.weight` I8 [N, K], `X.weight_scale` [N, 1]: "int-quantized" of compressed-tensors |
| int8-packed | `X.weight_packed` I32 [N, ceil(K/4)], bytes q + 128, `X.weight_scale` [N, 1]: "pack-quantized" |
| int4 | `X.weight_packed` I32 [N, ceil(K/8)], nibbles q + 8 from the lowest, `X.weight_scale` [N, ceil(K/128)]: the same |

Packed weights have `X.weight_shape` I64 [2] with them, which this program writes and does not need.
"""

from __future__ import annotations

from typing import Literal

StoredFormat = Literal["none", "fp8", "int8", "int8-packed", "int4"]
BLOCK = 128
INTEGER: tuple[StoredFormat, ...] = ("int8", "int8-packed", "int4")
PACKED: tuple[StoredFormat, ...] = ("int8-packed", "int4")
# What `Prepared` calls the number format of the weights.
WEIGHTS: dict[StoredFormat, str] = {"none": "none", "fp8": "fp8", "int8": "int8", "int8-packed": "int8", "int4": "int4"}
# Codes to a 32-bit word.
_PER_WORD = {"int8-packed": 4, "int4": 8}


def weight_name(name: str, stored: StoredFormat) -> str:
    """The tensor that holds the codes of the linear whose weight is called `name` ("....weight")."""
    return f"{name}_packed" if stored in PACKED else name


def scale_name(name: str, stored: StoredFormat) -> str:
    """The tensor that holds its scales."""
    return f"{name}_scale_inv" if stored == "fp8" else f"{name}_scale"


def shape_name(name: str) -> str:
    """The tensor that holds a packed weight's logical shape."""
    return f"{name}_shape"


def weight_dtype(stored: StoredFormat) -> str:
    """safetensors' name of the codes' dtype; only of formats that have codes."""
    return {"fp8": "F8_E4M3", "int8": "I8"}.get(stored, "I32")


def weight_shape(shape: tuple[int, ...], stored: StoredFormat) -> tuple[int, ...]:
    """Shape of the codes of a weight [N, K]."""
    n, k = shape
    return (n, -(-k // _PER_WORD[stored])) if stored in PACKED else (n, k)


def scale_shape(shape: tuple[int, ...], stored: StoredFormat) -> tuple[int, ...]:
    """Shape of the scales of a weight [N, K]."""
    n, k = shape
    if stored == "fp8":
        return (-(-n // BLOCK), -(-k // BLOCK))
    return (n, -(-k // BLOCK)) if stored == "int4" else (n, 1)
