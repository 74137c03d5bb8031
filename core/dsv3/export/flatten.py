"""An operator's torch arguments and results as the named arrays of its model, and its scalars as attributes.

Input names: a tensor is its argument (`x`), a prepared weight `w.weight` and `w.scale`, a cache `cache_ckv`, `cache_kpe` and
`cache_scale`, a member of a mapping `weights.q_a.weight`. Arguments that are None are left out. Outputs have the names of
the specification; a name that an input has too gets `_out`. A mutated cache is returned: `cache_ckv_out`, ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3.errors import UsageError
from dsv3.export.dtypes import to_numpy
from dsv3.ops import spec
from dsv3.plugin import LatentCache, Prepared

Arrays = dict[str, np.ndarray[Any, Any]]


def tensors_of(op: str, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor by its name in the model, in the order of the operator's arguments."""
    return {name: tensor for p in spec(op).parameters for name, tensor in _leaves(p, arguments.get(p))}


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Prepared):
        if value.layout != "canonical":
            raise UsageError(f"{name} is in layout {value.layout!r}; unprepare it first: models take canonical weights")
        for member in ("weight", "scale"):
            if member in value.tensors:
                yield f"{name}.{member}", value.tensors[member]
    elif isinstance(value, LatentCache):
        planes = {"ckv": value.ckv, "kpe": value.kpe, "scale": value.scale}
        yield from ((f"{name}_{plane}", tensor) for plane, tensor in planes.items() if tensor is not None)
    elif isinstance(value, Mapping):
        for member in value:
            yield from _leaves(f"{name}.{member}", value[member])


def attributes_of(op: str, arguments: Mapping[str, Any]) -> dict[str, int | float | str]:
    """The scalar arguments, defaults filled in; flags as 0 and 1."""
    known = spec(op)
    values = {name: arguments.get(name, known.defaults.get(name)) for name in known.parameters}
    found: dict[str, int | float | str] = {}
    for name, value in values.items():
        if isinstance(value, bool):
            found[name] = int(value)
        elif isinstance(value, int | float | str):
            found[name] = value
    return found


def op_inputs(op: str, arguments: Mapping[str, Any]) -> Arrays:
    """The model's inputs, copied: call it before an operator that writes to its cache."""
    return {name: to_numpy(tensor) for name, tensor in tensors_of(op, arguments).items()}


def output_names(op: str, arguments: Mapping[str, Any]) -> list[str]:
    """The model's outputs in order: those of the operator, then the planes of a mutated cache."""
    known, inputs = spec(op), tensors_of(op, arguments)
    made = [f"{t.path}_out" if t.path in inputs else t.path for t in known.line.outputs]
    return made + [f"{name}_out" for p in known.mutates for name, _ in _leaves(p, arguments[p])]


def output_tensors(op: str, arguments: Mapping[str, Any], outputs: Any) -> dict[str, Tensor]:
    """What the operator returned, and its caches as they are now, by output name."""
    many = [] if outputs is None else [outputs] if isinstance(outputs, Tensor) else list(outputs)
    many += [tensor for p in spec(op).mutates for _, tensor in _leaves(p, arguments[p])]
    return dict(zip(output_names(op, arguments), many, strict=True))


def op_outputs(op: str, arguments: Mapping[str, Any], outputs: Any) -> Arrays:
    """`output_tensors` as arrays: call it after the operator, whose caches are in `arguments`."""
    return {name: to_numpy(tensor) for name, tensor in output_tensors(op, arguments, outputs).items()}


def meta_arguments(value: Any) -> Any:
    """Arguments as meta tensors: enough for shapes and dtypes."""
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, Prepared):
        return Prepared(value.layout, value.quant, value.shape, meta_arguments(value.tensors), value.scale_fmt)
    if isinstance(value, LatentCache):
        return LatentCache(*(meta_arguments(t) for t in (value.ckv, value.kpe, value.scale)))
    if isinstance(value, Mapping):
        return {name: meta_arguments(v) for name, v in value.items()}
    return value
