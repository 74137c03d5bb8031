"""`quantization_config` of config.json: DeepSeek's for FP8, compressed-tensors' for INT8 and INT4; read and written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv3.errors import UnsupportedModel
from dsv3.graph.fields import Fields

# What stays unquantised in a checkpoint of ours, in compressed-tensors' way of naming modules. kv_b_proj is never multiplied in
# an integer format: it is dequantised at load, for absorption.
IGNORED = ("lm_head", "re:.*mlp\\.gate$", "re:.*kv_b_proj$", "re:.*eh_proj$", "re:.*shared_head\\.head$")
_GROUP = 128
# compressed-tensors' format and bits -> how the codes are stored.
_FORMATS = {("int-quantized", 8): "int8", ("pack-quantized", 8): "int8-packed", ("pack-quantized", 4): "int4"}
_BITS = {"int8": 8, "int8-packed": 8, "int4": 4}


class Quantization:
    """How the linears of a checkpoint are stored. method: as `checkpoint.stored` names it; scale_fmt: of FP8 activations;
    activations: whether INT8 weights are meant to meet INT8 activations."""

    def __init__(self, method: str = "none", scale_fmt: str = "float32", activations: bool = True) -> None:
        self.method, self.scale_fmt, self.activations = method, scale_fmt, activations


def read(f: Fields) -> Quantization:
    """From the fields of a config.json; UnsupportedModel names what is not supported."""
    table = f.table("quantization_config") or f.table("compression_config")
    if table is None:
        return Quantization()
    method = table.text("quant_method", "unnamed")
    if method == "fp8":
        return _fp8(table)
    if method == "compressed-tensors":
        return _integer(table)
    known = "fp8 with 128x128 blocks, and compressed-tensors with INT8 channels or INT4 groups of 128, are"
    raise UnsupportedModel(f"{table.source}: quant_method {method!r} is not supported; {known}")


def _fp8(table: Fields) -> Quantization:
    for name, wanted in (("weight_block_size", [128, 128]), ("fmt", "e4m3"), ("activation_scheme", "dynamic")):
        value = table.values.get(name, wanted if name != "weight_block_size" else None)
        if value != wanted:
            raise UnsupportedModel(f"{table.source}: {name} {value!r} is not supported; {wanted!r} is")
    scale_fmt = table.values.get("scale_fmt") or "float32"
    if scale_fmt not in ("float32", "float", "ue8m0"):
        raise UnsupportedModel(f"{table.source}: scale_fmt {scale_fmt!r} is not supported; float32 and ue8m0 are")
    return Quantization("fp8", "ue8m0" if scale_fmt == "ue8m0" else "float32")


def _integer(table: Fields) -> Quantization:
    groups = table.table("config_groups")
    if groups is None or len(groups.values) != 1:
        raise UnsupportedModel(f"{table.source}: one group in config_groups is supported; this has {_count(groups)}")
    name = next(iter(groups.values))
    group = groups.table(name)
    if group is None:
        raise groups.wrong(name, None, "an object")
    for source, absent in ((table, "transform_config"), (group, "output_activations")):
        if source.values.get(absent):
            raise UnsupportedModel(f"{source.source}: {absent} {source.values[absent]!r:.80} is not supported; none is")
    sparsity = table.table("sparsity_config")
    if sparsity is not None and sparsity.values.get("format", "dense") != "dense":
        raise UnsupportedModel(f"{sparsity.source}: format {sparsity.values['format']!r} is not supported; 'dense' is")
    if group.values.get("targets") != ["Linear"]:
        raise UnsupportedModel(f"{group.source}: targets {group.values.get('targets')!r} is not supported; ['Linear'] is")
    weights = group.table("weights")
    if weights is None:
        raise UnsupportedModel(f"{group.source}: no weights; activations alone cannot be quantised")
    bits = weights.integer("num_bits")
    form = table.values.get("format") or group.values.get("format")
    method = _FORMATS.get((str(form), bits))
    if method is None:
        listed = ", ".join(f"{name} with {n} bits" for name, n in _FORMATS)
        raise UnsupportedModel(f"{table.source}: format {form!r} with {bits} bits is not supported; {listed} are")
    wanted: dict[str, Any] = {"type": "int", "symmetric": True, "strategy": "channel"}
    if method == "int4":
        wanted |= {"strategy": "group", "group_size": _GROUP}
    _expect(weights, wanted)
    if weights.values.get("actorder") not in (None, False, "static", "weight"):
        raise UnsupportedModel(
            f"{weights.source}: actorder {weights.values['actorder']!r} is not supported; columns in order are"
        )
    inputs = group.table("input_activations")
    if inputs is not None:
        if method == "int4":
            raise UnsupportedModel(f"{inputs.source}: quantised activations with INT4 weights are not supported")
        _expect(inputs, {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True})
    return Quantization(method, activations=inputs is not None)


def _count(groups: Fields | None) -> int:
    return 0 if groups is None else len(groups.values)


def _expect(table: Fields, wanted: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        found = table.values.get(name)
        if found != value:
            raise UnsupportedModel(f"{table.source}: {name} {found!r} is not supported; {value!r} is")


def write(q: Quantization) -> dict[str, Any] | None:
    """The `quantization_config` of a checkpoint that is stored so; None if it is not quantised."""
    if q.method == "none":
        return None
    if q.method == "fp8":
        table = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
        return {**table, "scale_fmt": "ue8m0"} if q.scale_fmt == "ue8m0" else table
    four = q.method == "int4"
    weights: dict[str, Any] = {"num_bits": _BITS[q.method], "type": "int", "symmetric": True, "dynamic": False}
    weights |= {"strategy": "group", "group_size": _GROUP} if four else {"strategy": "channel", "group_size": None}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    form = next(name for (name, _), method in _FORMATS.items() if method == q.method)
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs if q.activations and not four else None,
        "output_activations": None,
        "format": form,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(IGNORED),
        "kv_cache_scheme": None,
    }
