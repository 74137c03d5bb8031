"""Does a checkpoint hold what its configuration says? Every expected tensor is assigned exactly once, before any data
is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dsv3.checkpoint import stored
from dsv3.checkpoint.header import fault
from dsv3.checkpoint.layout import Entry
from dsv3.checkpoint.stored import INTEGER, PACKED, StoredFormat
from dsv3.graph.config import ModelConfig
from dsv3.graph.names import Expected, copy_names, expected_tensors, ignorable

_REAL = ("BF16", "F32")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Item:
    """A tensor to load: what it is, where it is, and, if it is quantised, its scales and the format of its codes."""

    expected: Expected
    entry: Entry
    scale: Entry | None = None
    stored: StoredFormat = "none"


@dataclass
class LoadPlan:
    """`items` go into the model, in file order; `copies` are pairs (copy, original) that must hold the same bytes."""

    items: list[Item] = field(default_factory=list)
    copies: list[tuple[Entry, Entry]] = field(default_factory=list)

    def stored_real(self, first_layer: int) -> bool:
        """Whether some linear of the layers from `first_layer` on is stored unquantised; kv_b_proj does not count."""
        linears = (i for i in self.items if i.expected.kind == "linear" and not i.expected.into.endswith(".kv_b"))
        return any(i.scale is None and i.expected.layer >= first_layer for i in linears)

    @property
    def nbytes(self) -> int:
        """Bytes that loading reads."""
        copies = sum(a.nbytes for a, _ in self.copies)
        return copies + sum(i.entry.nbytes + (i.scale.nbytes if i.scale else 0) for i in self.items)


def plan_load(config: ModelConfig, entries: Mapping[str, Entry], folder: Path, mtp: bool = True) -> LoadPlan:
    """Match the checkpoint with the configuration. CheckpointError for the first tensor that is missing, extra, or of the wrong
    shape or dtype. With mtp False the MTP modules may be there or not, and are not loaded."""
    plan = LoadPlan()
    used: set[str] = set()
    copies = copy_names(config)
    for e in expected_tensors(config):
        skip = not mtp and e.layer >= config.num_hidden_layers
        kind = _format(e, entries, config)
        entry = entries.get(stored.weight_name(e.name, kind)) or entries.get(copies.get(e.name, ""))
        if entry is None:
            if skip or e.kind == "copy":
                continue
            raise _missing(e, config, entries, folder)
        used.add(entry.name)
        scale = _check(e, entry, entries, kind)
        if scale is not None:
            used.add(scale.name)
        if kind in PACKED and (shape := entries.get(stored.shape_name(e.name))) is not None:
            _check_shape(shape, shape.name, (2,))
            used.add(shape.name)
        if skip:
            continue
        if e.kind == "copy":
            original = entries.get(e.copy_of)
            if original is not None:
                plan.copies.append((entry, original))
        else:
            plan.items.append(Item(e, entry, scale, kind))
    for name, entry in entries.items():
        if name not in used and not ignorable(name):
            raise _extra(name, entry, config)
    plan.items.sort(key=lambda i: (i.entry.file.name, i.entry.parts[0].info.start))
    return plan


def _missing(e: Expected, c: ModelConfig, entries: Mapping[str, Entry], folder: Path) -> Exception:
    remedy = "download the missing shard, or correct config.json"
    if e.layer >= c.num_hidden_layers:
        remedy = "download it, or set num_nextn_predict_layers to 0 in config.json to run without MTP"
    where = folder if not entries else next(iter(entries.values())).file
    return fault(where, e.name, f"a tensor {list(e.shape)}", "none", remedy)


def _extra(name: str, entry: Entry, c: ModelConfig) -> Exception:
    remedy = "correct config.json: it does not describe this checkpoint"
    m = _LAYER.match(name)
    if m and int(m[1]) >= c.num_hidden_layers + c.num_nextn_predict_layers:
        remedy = f"set num_hidden_layers (now {c.num_hidden_layers}) or num_nextn_predict_layers (now "
        remedy += f"{c.num_nextn_predict_layers}) in config.json to what the checkpoint holds"
    return fault(entry.file, name, "no such tensor in this model", f"{entry.dtype} {list(entry.shape)}", remedy)


def _check_shape(entry: Entry, name: str, shape: tuple[int, ...]) -> None:
    if entry.shape != shape:
        remedy = "correct config.json, or download the file again"
        raise fault(entry.file, name, f"shape {list(shape)}", str(list(entry.shape)), remedy)


def _format(e: Expected, entries: Mapping[str, Entry], c: ModelConfig) -> StoredFormat:
    """How a tensor should be stored. MTP modules of quantised checkpoints are sometimes left in bf16; kv_b_proj may be, in
    integer formats: it is never multiplied in them."""
    method: StoredFormat = c.quant_method  # type: ignore[assignment]
    if e.kind != "linear" or method == "none":
        return "none"
    entry = entries.get(e.name)
    may_be_real = e.layer >= c.num_hidden_layers or (method in INTEGER and e.name.endswith(".kv_b_proj.weight"))
    return "none" if may_be_real and entry is not None and entry.dtype in _REAL else method


def _check(e: Expected, entry: Entry, entries: Mapping[str, Entry], kind: StoredFormat) -> Entry | None:
    """The scales of a tensor that is stored as it should be."""
    _check_shape(entry, entry.name, e.shape if kind == "none" else stored.weight_shape(e.shape, kind))
    allowed = ("F32",) if e.kind == "f32" else _REAL if kind == "none" else (stored.weight_dtype(kind),)
    if entry.dtype not in allowed:
        remedy = "convert the checkpoint to a supported dtype"
        if kind != "none" or entry.dtype in ("F8_E4M3", "I8", "I32"):
            remedy = "correct quantization_config in config.json, or convert the checkpoint again"
        raise fault(entry.file, entry.name, " or ".join(allowed), entry.dtype, remedy)
    if kind == "none":
        for name in (stored.scale_name(entry.name, "fp8"), stored.scale_name(entry.name, "int8")):
            if (scale := entries.get(name)) is not None:
                raise fault(scale.file, name, "no scales beside an unquantised weight", "some", "convert it again")
        return None
    name, shape = stored.scale_name(e.name, kind), stored.scale_shape(e.shape, kind)
    scale = entries.get(name)
    if scale is None:
        raise fault(entry.file, name, f"scales {list(shape)}", "none", "download the missing shard")
    _check_shape(scale, name, shape)
    kinds = ("F32",) if kind == "fp8" else _REAL
    if scale.dtype not in kinds:
        raise fault(scale.file, name, " or ".join(kinds), scale.dtype, "convert the scales to float32")
    return scale
