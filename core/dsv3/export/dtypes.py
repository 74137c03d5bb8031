"""One dtype under its names in torch, numpy (with ml_dtypes for what numpy lacks) and ONNX."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv3.errors import UsageError, nearest

if TYPE_CHECKING:
    from torch import Tensor

# torch's name -> ONNX's element type (onnx.TensorProto.DataType, fixed by the format)
CODES = {
    "float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "float64": 11, "bfloat16": 16,
    "float8_e4m3fn": 17, "float8_e4m3fnuz": 18, "float8_e5m2": 19, "float8_e5m2fnuz": 20,
}  # fmt: skip
NAMES = {number: name for name, number in CODES.items()}
# Types that numpy lacks, with the integers that hold their bits.
_BITS = {name: "uint16" if name == "bfloat16" else "uint8" for name in CODES if name.startswith(("bfloat16", "float8"))}


def code(dtype: str) -> int:
    """ONNX's element type; UsageError for a dtype that no operator has."""
    if dtype not in CODES:
        raise UsageError(f"dtype {dtype!r} has no place in an ONNX model here{nearest(dtype, CODES)}")
    return CODES[dtype]


def numpy_dtype(dtype: str) -> Any:
    """The numpy dtype; ml_dtypes's where numpy has none."""
    return np.dtype(getattr(importlib.import_module("ml_dtypes"), dtype) if dtype in _BITS else dtype)


def bits_dtype(dtype: str) -> str | None:
    """The integer type of the bits of a type that numpy lacks, None for the others."""
    return _BITS.get(dtype)


def torch_name(tensor: Tensor) -> str:
    """The dtype's name."""
    return str(tensor.dtype).removeprefix("torch.")


def to_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The tensor's data as a contiguous array of its own, bit for bit."""
    import torch

    name, plain = torch_name(tensor), tensor.detach().cpu().contiguous()
    bits = _BITS.get(name)
    if bits is None:
        return plain.numpy().copy()
    return plain.view(getattr(torch, bits)).numpy().copy().view(numpy_dtype(name))
