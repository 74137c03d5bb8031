"""All weights of a model as plain numbers in one file, written through a memory map: no more than a slice is in memory."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3.checkpoint.layout import open_checkpoint
from dsv3.checkpoint.loader import load_weights
from dsv3.checkpoint.reader import Reader
from dsv3.checkpoint.validate import plan_load
from dsv3.errors import Dsv3Error
from dsv3.export.dtypes import code, torch_name
from dsv3.export.packages import onnx
from dsv3.graph.config import ModelConfig
from dsv3.graph.weights import ModelWeights, meta_weights, walk
from dsv3.graph.yarn import cos_sin_table
from dsv3.plugin import Prepared

_PAGE = 4096  # runtimes map external data at page boundaries
_VIEWS = ("w_uk", "w_uv")  # of kv_b


@dataclass(frozen=True)
class Stored:
    """One tensor of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def initializer(self, file: str) -> Any:
        """The tensor as an ONNX initializer with external data."""
        tensor = onnx().TensorProto(name=self.name, data_type=code(self.dtype), dims=self.shape)
        tensor.data_location = onnx().TensorProto.EXTERNAL
        for key, value in (("location", file), ("offset", self.offset), ("length", self.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


def write_weights(path: Path, folder: Path, c: ModelConfig, dtype: str, progress: bool | None) -> dict[str, Stored]:
    """Read the checkpoint in `folder` tensor by tensor, dequantised to `dtype`, into the new file `path`.

    Returns what is where, by the name in the weight tree ("layers.0.attn.q_a"; "cos_sin" is the table of angles). MTP modules
    are left out. CheckpointError for a damaged checkpoint, Dsv3Error if the disk is too small.
    """
    plan = plan_load(c, open_checkpoint(folder), folder, False)
    weights = meta_weights(c, getattr(torch, dtype), "none", cos_sin_table(c, "meta"), mtp=False)
    stored, total = _places(weights)
    _allocate(path, total)
    whole = torch.from_file(str(path), shared=True, size=total, dtype=torch.uint8)
    for name, owner, field, value in list(walk(weights)):
        if field not in _VIEWS:
            place = _view(whole, stored[name])
            setattr(owner, field, _with_weight(value, place) if isinstance(value, Prepared) else place)
    weights.cos_sin.copy_(cos_sin_table(c, "cpu"))
    load_weights(
        weights, plan, Reader(), torch.device("cpu"), lambda _, weight: weight, progress=progress, what="exporting weights"
    )
    return stored


def _places(weights: ModelWeights) -> tuple[dict[str, Stored], int]:
    stored, at = {}, 0
    for name, _, field, value in walk(weights):
        if field in _VIEWS:
            continue
        tensor = value.tensors["weight"] if isinstance(value, Prepared) else value
        nbytes = tensor.numel() * tensor.element_size()
        stored[name] = Stored(name, torch_name(tensor), tuple(tensor.shape), at, nbytes)
        at += -(-nbytes // _PAGE) * _PAGE
    return stored, at


def _allocate(path: Path, total: int) -> None:
    """Reserve the space first: a disk that fills up under a memory map ends the process."""
    free = shutil.disk_usage(path.parent).free
    if free < total:
        raise Dsv3Error(
            f"{path.parent}: {total / 1e9:.1f} GB needed for the weights, {free / 1e9:.1f} GB free; choose another disk"
        )
    with path.open("wb") as f:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(f.fileno(), 0, total)
        else:
            f.truncate(total)


def _view(whole: Tensor, s: Stored) -> Tensor:
    return whole[s.offset : s.offset + s.nbytes].view(getattr(torch, s.dtype)).view(s.shape)


def _with_weight(value: Prepared, tensor: Tensor) -> Prepared:
    return Prepared(value.layout, value.quant, value.shape, {"weight": tensor}, value.scale_fmt)
