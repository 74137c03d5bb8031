"""An operator as an ONNX model: one node of our domain, and a function that says what it is in standard operators.

A runtime that knows the node runs its own kernel; any other runs the function. The function is made for the arguments'
dtypes, fixed sizes and scalars; sizes that change from step to step (tokens, sequences, pages) stay free.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dsv3.errors import UsageError
from dsv3.export.builder import OPSET, Graph, Value
from dsv3.export.dtypes import code, torch_name
from dsv3.export.emit import EMITTERS
from dsv3.export.emit.arguments import Cache, Weight
from dsv3.export.flatten import attributes_of, meta_arguments, output_names, output_tensors, tensors_of
from dsv3.export.packages import onnx
from dsv3.ops import spec
from dsv3.ops.spec import STEP_DIMS
from dsv3.plugin import LatentCache, Prepared

DOMAIN = "ai.dsv3"
VERSION = 1
IR_VERSION = 10
# Dimensions of the specifications that change between steps. A cache's page size does not.
DYNAMIC = (STEP_DIMS - {"page_size", "slots"}) | {"T", "Tq", "M"}
Sizes = tuple[int | str, ...]


def op_model(op: str, arguments: Mapping[str, Any]) -> Any:
    """The model of one operator for arguments like these (torch tensors, `Prepared`, `LatentCache`, numbers).

    Inputs and outputs are named as `flatten` says. UsageError for an operator, dtype or argument that has no model.
    """
    known = spec(op)
    arguments = {**known.defaults, **arguments}
    known.bind(arguments)
    if arguments.get("group") is not None and op == "all_reduce":
        raise UsageError("all_reduce: ONNX has no collectives; only group None can be exported")
    helper = onnx().helper
    inputs, outputs, attributes = tensors_of(op, arguments), output_names(op, arguments), attributes_of(op, arguments)
    node = helper.make_node(op, list(inputs), outputs, name=op, domain=DOMAIN, **attributes)
    body = _function(op, arguments, outputs, list(attributes))
    sizes = _input_sizes(op, arguments)
    graph = helper.make_graph(
        [node],
        op,
        [_typed(name, t, sizes.get(name)) for name, t in inputs.items()],
        _outputs(op, arguments, sizes),
        doc_string=known.signature,
    )
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, functions=[body], opset_imports=imports, ir_version=IR_VERSION, producer_name="dsv3")


def _typed(name: str, tensor: torch.Tensor, sizes: Sizes | None) -> Any:
    return onnx().helper.make_tensor_value_info(name, code(torch_name(tensor)), sizes or tuple(tensor.shape))


def _function(op: str, arguments: Mapping[str, Any], outputs: list[str], attributes: list[str]) -> Any:
    g = Graph()
    values = {name: _symbol(g, name, value) for name, value in arguments.items()}
    made = EMITTERS[op](g, **values)
    many = [] if made is None else [made] if isinstance(made, Value) else list(made)
    for name in spec(op).mutates:
        cache = values[name]
        many += [plane for plane in (cache.ckv, cache.kpe, cache.scale) if plane is not None]
    helper = onnx().helper
    last = [helper.make_node("Identity", [v.name], [name]) for v, name in zip(many, outputs, strict=True)]
    inputs = list(tensors_of(op, arguments))
    imports = [helper.make_opsetid("", OPSET)]
    doc = f"{op}, version {spec(op).since}, in standard operators"
    return helper.make_function(DOMAIN, op, inputs, outputs, [*g.nodes, *last], imports, attributes, doc_string=doc)


def _symbol(g: Graph, name: str, value: Any) -> Any:
    """An argument as the emitters take it."""
    if isinstance(value, torch.Tensor):
        return Value(g, name, torch_name(value), tuple(value.shape))
    if isinstance(value, Prepared):
        parts = {k: _symbol(g, f"{name}.{k}", t) for k, t in value.tensors.items()}
        return Weight(value.quant, value.shape, parts["weight"], parts.get("scale"), value.scale_fmt)
    if isinstance(value, LatentCache):
        ckv, kpe, scale = (_symbol(g, f"{name}_{k}", getattr(value, k)) for k in ("ckv", "kpe", "scale"))
        return Cache(ckv, kpe, scale, page_size=value.ckv.shape[1], rank=value.ckv.shape[2], rope=value.kpe.shape[2])
    if isinstance(value, Mapping):
        return {k: _symbol(g, f"{name}.{k}", v) for k, v in value.items()}
    return value


def _input_sizes(op: str, arguments: Mapping[str, Any]) -> dict[str, Sizes]:
    """The sizes of the inputs, with names for those that change from call to call."""
    found: dict[str, Sizes] = {}
    for term in spec(op).line.inputs:
        value = term.find(arguments)
        if value is None or term.any_shape or term.kind == "{":
            continue
        names = tuple(_size(dim.text, size) for dim, size in zip(term.dims, term.shape_of(value), strict=True))
        if term.kind == "[":
            found[term.path] = names
            continue
        for plane in ("ckv", "kpe", "scale"):
            if (tensor := getattr(value, plane)) is not None:
                found[f"{term.path}_{plane}"] = (names[0], *tensor.shape[1:])
    return found


def _size(text: str, size: int) -> int | str:
    parts = set(text.replace("*", " ").replace("+", " ").split())
    return text if parts & DYNAMIC else size


def _outputs(op: str, arguments: Mapping[str, Any], inputs: Mapping[str, Sizes]) -> list[Any]:
    known, meta = spec(op), meta_arguments(arguments)
    tensors = output_tensors(op, meta, known.meta(meta))
    sizes: dict[str, Sizes] = {}
    for name, term in zip(tensors, known.line.outputs, strict=False):
        if not term.any_shape:
            sizes[name] = tuple(_size(d.text, s) for d, s in zip(term.dims, tensors[name].shape, strict=True))
    for cache in known.mutates:
        sizes |= {f"{name}_out": size for name, size in inputs.items() if name.startswith(f"{cache}_")}
    return [_typed(name, tensor, sizes.get(name)) for name, tensor in tensors.items()]
