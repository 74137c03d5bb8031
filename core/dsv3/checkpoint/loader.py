"""From a checked checkpoint into the weight tree: one tensor at a time, converted in slices, prepared once when complete."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3.checkpoint.memory import zeros
from dsv3.checkpoint.progress import bytes_progress
from dsv3.checkpoint.reader import Array, Reader, check_contents, check_copy, check_replicas
from dsv3.checkpoint.stored import WEIGHTS
from dsv3.checkpoint.unpack import canonical_codes, real_rows
from dsv3.checkpoint.validate import Item, LoadPlan
from dsv3.graph.weights import ModelWeights, walk
from dsv3.plugin import Prepared
from dsv3.quant import SCHEMES, canonical, quantize
from dsv3.quant.fp8 import BLOCK

Prepare = Callable[[str, Prepared], Prepared]
_SLICE = 1 << 17  # numbers converted at a time: bounds what a conversion, and the allocator after it, holds beside the weights
_LARGE = 1 << 24  # bytes


def load_weights(
    weights: ModelWeights,
    plan: LoadPlan,
    reader: Reader,
    device: torch.device,
    prepare: Prepare,
    checked: bool = False,
    progress: bool | None = None,
    what: str = "loading weights",
) -> None:
    """Fill the tree of meta tensors; values that are real already are filled in place.

    prepare(path, weight) is called once for every complete weight and returns what the tree shall hold. checked: the
    contents were checked already. what: the progress bar's text.
    """
    slots = {path: (owner, name) for path, owner, name, _ in walk(weights)}
    pending = Counter(item.expected.into for item in plan.items)
    with bytes_progress(what, plan.nbytes, progress) as advance:
        # Large tensors first: each is there twice while it is copied, which later would come on top of everything else.
        for item in sorted(plan.items, key=lambda item: item.entry.nbytes < _LARGE):
            array = reader.array(item.entry)
            scale = None if item.scale is None else reader.array(item.scale)
            if not checked:
                check_contents(item.entry, array)
                check_replicas(item.entry, reader)
                if item.scale is not None and scale is not None:
                    check_contents(item.scale, scale, scale=True)
                    check_replicas(item.scale, reader)
            path = item.expected.into
            owner, name = slots[path]
            _place(_real(owner, name, device), item, as_tensor(array), None if scale is None else as_tensor(scale))
            pending[path] -= 1
            if pending[path] == 0:
                value = getattr(owner, name)
                setattr(owner, name, prepare(path, value) if isinstance(value, Prepared) else value)
            for read in (item.entry, item.scale):
                if read is not None:
                    reader.release(read)
            advance(item.entry.nbytes + (item.scale.nbytes if item.scale else 0))
        for copy, original in plan.copies:
            if not checked:
                check_copy(copy, original, reader)
            advance(copy.nbytes)
    _assert_complete(weights)


def as_tensor(array: Array) -> Tensor:
    """A torch view of an array; bits become the types that numpy lacks."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.view({np.uint16: torch.bfloat16, np.uint8: torch.float8_e4m3fn}.get(array.dtype.type, tensor.dtype))


def _real(owner: Any, name: str, device: torch.device) -> Tensor | Prepared:
    """The tree's value, allocated on the device the first time it is needed, as zeros: what pads FP8 weights."""
    value = getattr(owner, name)
    if isinstance(value, Prepared):
        if not value.tensors["weight"].is_meta:
            return value
        dtype = value.tensors["weight"].dtype
        if SCHEMES[value.quant].weights == "fp8":
            like: Mapping[str, Tensor] = value.tensors
        else:
            like = canonical(value.quant, value.shape, dtype, torch.device("meta"))
        value = replace(value, tensors={k: zeros(tuple(t.shape), t.dtype, device) for k, t in like.items()})
    elif value.is_meta:
        value = zeros(tuple(value.shape), value.dtype, device)
    setattr(owner, name, value)
    return value


def _place(target: Tensor | Prepared, item: Item, source: Tensor, scale: Tensor | None) -> None:
    """Copy or convert one checkpoint tensor into its place."""
    if isinstance(target, Tensor):
        target.copy_(source)
        return
    tensors = dict(target.tensors)
    if item.expected.expert is not None:
        tensors = {name: t[item.expected.expert] for name, t in tensors.items()}
    first = target.shape[-2] // 2 if item.expected.half == "up" else 0
    rows, cols = item.expected.shape
    if target.quant == "none" and scale is None:
        tensors["weight"][first : first + rows, :cols].copy_(source)
        return
    if SCHEMES[target.quant].weights == WEIGHTS[item.stored]:
        assert scale is not None
        _write(tensors, {"weight": canonical_codes(source, item.stored, cols), "scale": scale}, first)
        return
    work = torch.float64 if tensors["weight"].dtype == torch.float64 else torch.float32
    for at, stop in _slices(rows, cols):
        part = real_rows(source, scale, item.stored, cols, at, stop, work)
        _write(tensors, quantize(part, target.quant, target.scale_fmt), first + at)


def _write(tensors: Mapping[str, Tensor], parts: Mapping[str, Tensor], row: int) -> None:
    for name, part in parts.items():
        whole = tensors[name]
        scale_rows = name == "scale" and whole.shape[0] != tensors["weight"].shape[0]
        at = row // BLOCK if scale_rows else row
        if part.element_size() == 1:  # as bytes: copying between FP8 tensors would go through float32
            whole, part = whole.view(torch.uint8), part.view(torch.uint8)
        whole[at : at + part.shape[0], : part.shape[1]].copy_(part)


def _slices(rows: int, cols: int) -> Iterator[tuple[int, int]]:
    """Row ranges of whole blocks, about _SLICE numbers each."""
    step = max(1, _SLICE // max(cols, 1) // BLOCK) * BLOCK
    for at in range(0, rows, step):
        yield at, min(at + step, rows)


def _assert_complete(weights: ModelWeights) -> None:
    derived = ("w_uk", "w_uv")  # views of kv_b, made by the caller
    for path, _, name, value in walk(weights):
        tensors = value.tensors.values() if isinstance(value, Prepared) else (value,)
        if name not in derived and any(t.is_meta for t in tensors):
            raise AssertionError(f"{path} was not assigned: the plan and the weight tree disagree")
