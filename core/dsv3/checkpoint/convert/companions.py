"""What comes along with the weights: configuration, index, tokenizer and other small files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dsv3.checkpoint.convert.files import PARTIAL, sync_folder, write_whole
from dsv3.checkpoint.convert.plan import OutFile, weight_map
from dsv3.checkpoint.convert.target import Target
from dsv3.checkpoint.header import fault
from dsv3.checkpoint.layout import INDEX, SINGLE, check_inside, read_json
from dsv3.errors import CheckpointError
from dsv3.graph.config import ModelConfig
from dsv3.graph.config_demo import is_demo
from dsv3.graph.config_write import to_hf
from dsv3.graph.quantization import write

CONFIG = "config.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".ckpt", ".h5", ".msgpack")
_LIMIT = 256 << 20
_STALE = ("quantization_config", "compression_config")


def companions(source: Path, files: list[OutFile]) -> list[str]:
    """Names of everything that will be written beside the weights."""
    index = [INDEX] if _needs_index(files) else []
    return [*(p.name for p in _copied(source)), *index, CONFIG]


def write_companions(source: Path, folder: Path, config: ModelConfig, target: Target, files: list[OutFile]) -> None:
    """config.json last: with it the folder becomes a checkpoint."""
    for path in _copied(source):
        write_whole(folder / path.name, _read(path))
    if _needs_index(files):
        index = {
            "metadata": {"total_size": sum(f.nbytes for f in files)},
            "weight_map": dict(sorted(weight_map(files).items())),
        }
        write_whole(folder / INDEX, _json(index))
    values = converted(source, config, target)
    before = source / CONFIG
    same = before.exists() and read_json(before) == values
    write_whole(folder / CONFIG, before.read_bytes() if same else _json(values))
    sync_folder(folder)


def converted(source: Path, config: ModelConfig, target: Target) -> dict[str, Any]:
    """The source's config.json with what the conversion changes; one in Hugging Face's form where it has the demo's."""
    path = source / CONFIG
    values = read_json(path) if path.exists() else None
    if values is None or is_demo(values):
        values = to_hf(config)
    values = {name: value for name, value in values.items() if name not in _STALE}
    quantization = write(target.quantization(config))
    if quantization is not None:
        values["quantization_config"] = quantization
    if target.to not in ("hf", "demo"):  # what is not quantised is bf16 now
        for name in ("dtype", "torch_dtype"):
            if name in values or (name == "torch_dtype" and "dtype" not in values):
                values[name] = "bfloat16"
    if not target.mtp:
        values.pop("num_mtp_layers", None)
        values["num_nextn_predict_layers"] = 0
    return values


def _needs_index(files: list[OutFile]) -> bool:
    return files[0].metadata and [file.name for file in files] != [SINGLE]


def _copied(source: Path) -> list[Path]:
    """Small files of the source that are neither weights nor made anew. Links are followed, as download caches have them, but
    not out of the checkpoint: what else this machine holds is nothing to publish with it."""
    own = (CONFIG, INDEX)
    found = [p for p in source.iterdir() if p.is_file() and p.suffix not in _WEIGHTS and p.name not in own]
    found = sorted(p for p in found if not p.name.startswith(".") and p.stat().st_size <= _LIMIT)
    for path in found:
        check_inside(source, path)
        if len(os.fsencode(path.name + PARTIAL)) > 255:
            raise fault(path, "", "a file name of at most 247 bytes", str(len(os.fsencode(path.name))), "rename or remove it")
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
