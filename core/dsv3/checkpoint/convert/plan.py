"""The files of a conversion and the units that fill them. Nothing is read but headers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from dsv3.checkpoint.calibrate.migrate import Shift
from dsv3.checkpoint.convert.linear import Linear
from dsv3.checkpoint.convert.ranks import check_split, part_of, rank_of
from dsv3.checkpoint.convert.target import Target
from dsv3.checkpoint.convert.unit import Cast, Copy, Output, Shifted, Unit
from dsv3.checkpoint.demo_layout import to_demo
from dsv3.checkpoint.layout import SINGLE, Entry
from dsv3.checkpoint.stored import StoredFormat, scale_name
from dsv3.checkpoint.validate import Item, LoadPlan
from dsv3.graph.config import ModelConfig
from dsv3.graph.names import Expected

SHARD_BYTES = 5 << 30
_ORDER = ("F64", "I64", "F32", "I32", "BF16", "F8_E4M3", "I8")


@dataclass
class OutFile:
    """A file to write, and the units that fill it, in the order in which they read the source."""

    name: str
    units: list[Unit] = field(default_factory=list)
    layer: int | None = None  # of a file that holds one layer; -1: what belongs to none
    metadata: bool = True  # what Hugging Face's loaders ask for; the demo's files have none

    @property
    def outputs(self) -> list[Output]:
        """In the order of their data: that of safetensors' own writer, wide dtypes first, then by name. A file that it wrote
        comes back from another layout byte for byte."""
        found = [output for unit in self.units for output in unit.outputs]
        return sorted(found, key=lambda output: (_ORDER.index(output.dtype), output.name))

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(output.nbytes for output in self.outputs)


def plan_files(
    config: ModelConfig, plan: LoadPlan, target: Target, sharded: bool, shifts: Mapping[str, Shift] | None = None
) -> list[OutFile]:
    """The files to write. sharded: the source has an index; its partition into files is kept where the layout is. shifts: of
    outlier channels, by tensor.

    UsageError for a split over ranks that is impossible.
    """
    items = [*plan.items, *(_copy_item(copy) for copy, _ in plan.copies)]
    if not target.mtp:
        items = [i for i in items if i.expected.layer < config.num_hidden_layers]
    items.sort(key=lambda i: (i.entry.file.name, i.entry.parts[0].info.start))
    if target.to == "demo":
        check_split(config, items, target.ranks)
        experts = config.n_routed_experts or 0
        return [_rank_file(items, experts, rank, target.ranks) for rank in range(target.ranks)]
    to, scale_fmt = target.stored(config), target.scale_fmt or "float32"
    pairs = [(i.entry.file.name, unit) for i in items for unit in _units(i, target, to, scale_fmt, shifts or {})]
    if target.by_layer:
        return _layers([unit for _, unit in pairs])
    if sharded:
        files: dict[str, OutFile] = {}
        for name, unit in pairs:
            files.setdefault(name, OutFile(name)).units.append(unit)
        return list(files.values())
    return _shards([unit for _, unit in pairs])


def _copy_item(entry: Entry) -> Item:
    return Item(Expected(entry.name, entry.shape, "copy", "", layer=_layer(entry.name)), entry)


def _layer(name: str) -> int:
    """Of a tensor's name; -1 for what belongs to no layer."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else -1


def _units(item: Item, target: Target, to: StoredFormat, scale_fmt: str, shifts: Mapping[str, Shift]) -> Iterator[Unit]:
    """One linear, or one other tensor, in Hugging Face's layout."""
    e, entry, name, shift = item.expected, item.entry, item.expected.name, shifts.get(item.expected.name)
    linear = e.kind == "linear" and not (to in ("int8", "int8-packed", "int4") and e.into.endswith(".kv_b"))
    if target.to == "hf":
        yield Copy(name, entry)
        if item.scale is not None:
            yield Copy(item.scale.name, item.scale, scale=True)
    elif linear and not _left_real(item, target):
        yield Linear(name, e.shape, entry, item.scale, item.stored, to, scale_fmt, shift)
    elif item.scale is not None:  # kv_b_proj of an FP8 checkpoint
        yield Linear(name, e.shape, entry, item.scale, item.stored, "none", scale_fmt, shift)
    elif shift is not None:
        yield Shifted(name, entry, shift)
    elif entry.dtype == "F32" and e.kind != "f32":
        yield Cast(name, entry)
    else:
        yield Copy(name, entry)


def _left_real(item: Item, target: Target) -> bool:
    """bf16 that stays so."""
    return target.to == "bf16" and item.stored == "none"


def _rank_file(items: list[Item], experts: int, rank: int, ranks: int) -> OutFile:
    """What the demo's rank reads, under its names."""
    file = OutFile(f"model{rank}-mp{ranks}.safetensors", metadata=False)
    for item in items:
        name = item.expected.name
        if rank_of(name, experts, ranks) not in (None, rank):
            continue
        part = part_of(name, item.expected.shape, rank, ranks)
        file.units.append(Copy(to_demo(name), item.entry, part))
        if item.scale is not None:
            scale = scale_name(name, "fp8")
            file.units.append(Copy(to_demo(scale), item.scale, part_of(scale, item.scale.shape, rank, ranks), scale=True))
    return file


def _shards(units: list[Unit]) -> list[OutFile]:
    """One file, or several of about SHARD_BYTES."""
    groups: list[list[Unit]] = [[]]
    size = 0
    for unit in units:
        nbytes = sum(output.nbytes for output in unit.outputs)
        if groups[-1] and size + nbytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(unit)
        size += nbytes
    if len(groups) == 1:
        return [OutFile(SINGLE, groups[0])]
    return [OutFile(_numbered(i, len(groups)), group) for i, group in enumerate(groups)]


def _layers(units: list[Unit]) -> list[OutFile]:
    """A file for each layer, and one for what belongs to none."""
    layers = sorted({_layer(unit.name) for unit in units})
    files = [OutFile(_numbered(i, len(layers)), layer=layer) for i, layer in enumerate(layers)]
    for unit in units:
        files[layers.index(_layer(unit.name))].units.append(unit)
    return files


def _numbered(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def weight_map(files: list[OutFile]) -> Mapping[str, str]:
    """Tensor name to file name, for the index."""
    return {output.name: file.name for file in files for output in file.outputs}
