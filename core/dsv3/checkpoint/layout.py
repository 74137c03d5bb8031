"""What a checkpoint folder holds: every tensor under its Hugging Face name, from one file, from shards, or from the
demo's ranks."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.checkpoint.demo_layout import demo_file, expert_index, shard_axis, to_hf
from dsv3.checkpoint.header import TensorInfo, fault, read_header
from dsv3.checkpoint.stored import BLOCK
from dsv3.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
JSON_LIMIT = 64 << 20
_SHARD = re.compile(r"[\w.-]+\.safetensors")


@dataclass(frozen=True)
class Part:
    """A tensor's piece: the file, its name there, and where it lies."""

    file: Path
    key: str
    info: TensorInfo


@dataclass(frozen=True)
class Entry:
    """One tensor under its Hugging Face name; several parts are joined along `axis`; replicas must equal the one part."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    axis: int = 0
    replicas: tuple[Part, ...] = ()

    @property
    def file(self) -> Path:
        return self.parts[0].file

    @property
    def nbytes(self) -> int:
        return sum(p.info.end - p.info.start for p in self.parts)


def read_text(path: Path) -> str:
    """A text file in UTF-8. Never waits for a pipe, nor reads a device without end: CheckpointError instead."""
    try:
        if not path.is_file():
            raise fault(path, "", "a regular file", "something else", "download it again")
        with path.open("rb") as f:
            raw = f.read(JSON_LIMIT + 1)
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read: {error.strerror or error}") from error
    if len(raw) > JSON_LIMIT:
        raise fault(path, "", f"at most {JSON_LIMIT >> 20} MiB", "more", "download it again")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise fault(path, "", "text in UTF-8", str(error)[:80], "download it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError says what is wrong with it."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise fault(path, "", "JSON", f"{type(error).__name__}: {str(error)[:80]}", "write the file again") from error
    if not isinstance(value, dict):
        raise fault(path, "", "a JSON object", type(value).__name__, "write the file again")
    return value


def open_checkpoint(folder: Path) -> dict[str, Entry]:
    """All tensors of the folder by name; reads headers only. CheckpointError names file, tensor, expected, found, remedy."""
    if (folder / INDEX).exists():
        return _sharded(folder)
    ranks = sorted((demo_file(p.name), p) for p in folder.glob("model*-mp*.safetensors") if demo_file(p.name))
    if ranks:
        return _demo(folder, [(r, p) for r, p in ranks if r is not None])
    if (folder / SINGLE).exists():
        path = _inside(folder, SINGLE, SINGLE)
        infos = read_header(path)
        return {name: _whole(name, path, info) for name, info in infos.items()}
    raise _nothing(folder)


def has_weights(folder: Path) -> bool:
    """Whether the folder holds any weights at all, or only a configuration."""
    return any(folder.glob("*.safetensors"))


def _nothing(folder: Path) -> CheckpointError:
    wanted = f"{SINGLE}, {INDEX} or model0-mp1.safetensors"
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        return fault(folder, "", wanted, pickles[0], "convert it to safetensors: pickled weights are never read")
    loose = sorted(p.name for p in folder.glob("*.safetensors"))
    found = f"{loose[0]} without an index" if loose else "no weights"
    return fault(folder, "", wanted, found, "download the missing files")


def _whole(name: str, path: Path, info: TensorInfo) -> Entry:
    return Entry(name, info.dtype, info.shape, (Part(path, name, info),))


def _inside(folder: Path, name: str, listed_in: str) -> Path:
    """The file `name` of the folder, and of nowhere else."""
    if not _SHARD.fullmatch(name) or len(name) > 255:
        raise fault(listed_in, "", "plain file names ending in .safetensors", repr(name)[:80], "do not use this checkpoint")
    path = folder / name
    if not path.is_file():
        raise fault(name, "", f"a file, as {listed_in} lists it", "none", "download the missing file")
    check_inside(folder, path)
    return path


def check_inside(folder: Path, path: Path) -> None:
    """CheckpointError for a link that leads elsewhere than within the folder, or into the blobs of the Hugging Face cache it is
    a snapshot of."""
    root, real = folder.resolve(), path.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append((root.parent.parent / "blobs").resolve())
    if not any(real.is_relative_to(place) for place in allowed):
        raise fault(path, "", "a file inside the checkpoint's folder", f"a link to {real}", "copy the file into the folder")


def _sharded(folder: Path) -> dict[str, Entry]:
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise fault(INDEX, "weight_map", "an object of tensor name to file name", repr(weight_map)[:80], "download it again")
    entries: dict[str, Entry] = {}
    for shard in dict.fromkeys(weight_map.values()):
        path = _inside(folder, shard, INDEX)
        for name, info in read_header(path).items():
            if name in entries:
                first = entries[name].file.name
                raise fault(path, name, "each tensor once", f"it in {first} too", "delete one of the two shards")
            if name not in weight_map:
                raise fault(path, name, f"every tensor listed in {INDEX}", "one that is not", "download the index again")
            entries[name] = _whole(name, path, info)
    for name, shard in weight_map.items():
        if name not in entries:
            raise fault(shard, name, f"the tensor, as {INDEX} lists it", "none", "download the shard again")
        if entries[name].file.name != shard:
            raise fault(
                shard, name, f"the tensor, as {INDEX} lists it", f"it in {entries[name].file.name}", "download it again"
            )
    _check_total(index, entries)
    return entries


def _check_total(index: dict[str, Any], entries: dict[str, Entry]) -> None:
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    found = sum(e.nbytes for e in entries.values())
    if total is not None and (isinstance(total, bool | str | list | dict) or total != found):
        raise fault(INDEX, "metadata.total_size", f"{found}, the bytes of all shards", str(total), "download the index again")


def _demo(folder: Path, ranks: list[tuple[tuple[int, int], Path]]) -> dict[str, Entry]:
    sizes = {size for (_, size), _ in ranks}
    if len(sizes) != 1:
        raise fault(
            folder, "", "files of one model-parallel size", f"sizes {sorted(sizes)}", "keep the files of one conversion"
        )
    size = sizes.pop()
    have = {rank for (rank, _), _ in ranks}
    missing = next((rank for rank in range(len(have) + 1) if rank not in have), size)
    if missing < size:
        raise fault(f"model{missing}-mp{size}.safetensors", "", f"all {size} ranks", "none", "download the missing file")
    if len(ranks) != size:
        raise fault(folder, "", f"ranks 0 to {size - 1}", f"{len(ranks)} files", "keep the files of one conversion")
    pieces: dict[str, list[Part]] = {}
    for _, path in ranks:
        path = _inside(folder, path.name, folder.name)
        for key, info in read_header(path).items():
            name = to_hf(key)
            if name is None:
                raise fault(path, key, "a tensor name of the inference demo", "another", "convert the checkpoint again")
            pieces.setdefault(name, []).append(Part(path, key, info))
    return {name: _joined(name, parts, size) for name, parts in pieces.items()}


def _joined(name: str, parts: list[Part], size: int) -> Entry:
    first = parts[0].info
    whole = Entry(name, first.dtype, first.shape, (parts[0],), replicas=tuple(parts[1:]))
    axis = shard_axis(name)
    owners = 1 if expert_index(name) is not None else size
    if len(parts) != owners:
        wanted = "one rank, an expert's" if owners == 1 else f"all {size} ranks"
        raise fault(parts[-1].file, parts[-1].key, f"it in {wanted}", f"it in {len(parts)}", "convert the checkpoint again")
    if len({part.file for part in parts}) != len(parts):
        raise fault(parts[-1].file, parts[-1].key, "it once in each rank", "it twice", "convert the checkpoint again")
    for part in parts[1:]:
        if part.info.dtype != first.dtype or part.info.shape != first.shape:
            found = f"{part.info.dtype} {list(part.info.shape)}"
            raise fault(part.file, part.key, f"{first.dtype} {list(first.shape)} as in rank 0", found, "convert it again")
    if axis is None or size == 1 or owners == 1 or axis >= len(first.shape):
        return whole
    if first.dtype == "F8_E4M3" and first.shape[axis] % BLOCK:
        found = f"{first.shape[axis]} in each of {size} ranks: whose scale a block has that two ranks share cannot be told"
        raise fault(parts[0].file, parts[0].key, f"a multiple of {BLOCK} along axis {axis}", found, "use fewer ranks")
    shape = list(first.shape)
    shape[axis] *= size
    return Entry(name, first.dtype, tuple(shape), tuple(parts), axis)
