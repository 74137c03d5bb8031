"""A checkpoint as two ONNX graphs of standard operators over one file of weights."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3 import __version__
from dsv3.checkpoint.folder import folder_config, model_folder
from dsv3.errors import UsageError, nearest
from dsv3.export.packages import onnx
from dsv3.graph.config import ModelConfig
from dsv3.loading import DTYPES

if TYPE_CHECKING:
    from dsv3.export.weightfile import Stored

WEIGHTS = "weights.bin"
# File -> whether it attends over the latents themselves, and what it is for.
GRAPHS = {
    "prefill.onnx": (False, "many tokens: expands keys and values, and runs expert by expert"),
    "decode.onnx": (True, "few tokens: attends over the latent cache, and copies the weights of each token's experts"),
}
# Patterns of the files beside the weights that go along.
_COPIED = ("config*.json", "generation_config.json", "tokenizer*.json", "special_tokens_map.json", "*.jinja", "LICENSE*")


def export_onnx(model: str | Path, dst: Path, *, dtype: str = "float32", progress: bool | None = None) -> list[Path]:
    """Write prefill.onnx, decode.onnx, weights.bin, export.json, and copies of configuration and tokenizer into `dst`.

    model: a checkpoint's folder, or "demo". dtype: of activations and weights ("float64", "float32" or "bfloat16");
    quantised weights are dequantised to it. MTP modules are left out. Both graphs take one sequence a call: ids int64 [T],
    cache_ckv [layers, past, R], cache_kpe [layers, past, P] (past 0: a new sequence) -> logits [T, V] (row i predicts the
    token after ids[i]), cache_ckv_out and cache_kpe_out with T more rows. Returns the files written.

    Raises UsageError (unknown model or dtype, `dst` exists, onnx is missing), CheckpointError, Dsv3Error (no space).
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}{nearest(str(dtype), DTYPES)}")
    folder = model_folder(os.fspath(model), False)
    assert folder is not None, "a preset is refused where it has no weights"
    dst = Path(dst)
    if dst.exists() or dst.is_symlink():
        raise UsageError(f"{dst} exists already; name a folder that does not, or remove it first")
    if not dst.absolute().parent.is_dir():
        raise UsageError(f"{dst.absolute().parent} is not a folder; create it first")
    onnx()
    config = folder_config(folder)
    work = Path(tempfile.mkdtemp(prefix=f".{dst.name}.", dir=dst.absolute().parent))
    try:
        _write(work, folder, config, dtype, progress)
        work.chmod(0o755)
        os.rename(work, dst)  # not replace: a folder that has appeared there meanwhile stays
    finally:
        if work.exists():
            shutil.rmtree(work)
    return sorted(dst.iterdir())


def _write(into: Path, folder: Path, c: ModelConfig, dtype: str, progress: bool | None) -> None:
    from dsv3.export.weightfile import write_weights

    stored = write_weights(into / WEIGHTS, folder, c, dtype, progress)
    for name, (absorbed, text) in GRAPHS.items():
        graph = build_graph(c, stored, dtype, absorbed, text)
        (into / name).write_bytes(graph.SerializeToString())
        onnx().checker.check_model(str(into / name))
    for file in sorted(f for pattern in _COPIED for f in folder.glob(pattern) if f.is_file()):
        shutil.copyfile(file, into / file.name)
    (into / "export.json").write_text(json.dumps(_description(c, dtype), indent=2) + "\n", encoding="utf-8")


def build_graph(c: ModelConfig, stored: Mapping[str, Stored], dtype: str, absorbed: bool, text: str = "") -> Any:
    """The ModelProto of one graph; its weights are places in the file of weights."""
    from dsv3.export.builder import OPSET, Graph, Value
    from dsv3.export.dtypes import code
    from dsv3.export.network import Network
    from dsv3.export.opmodel import IR_VERSION

    helper = onnx().helper
    inputs, outputs = _interface(c, dtype)
    g = Graph()
    weights = {name: Value(g, name, s.dtype, s.shape) for name, s in stored.items()}
    made = Network(g, c, weights, absorbed)(*(Value(g, name, kind) for name, (kind, _) in inputs.items()))
    last = [helper.make_node("Identity", [v.name], [name]) for v, name in zip(made, outputs, strict=True)]

    def typed(names: Mapping[str, tuple[str, list[int | str]]]) -> list[Any]:
        return [helper.make_tensor_value_info(name, code(kind), shape) for name, (kind, shape) in names.items()]

    graph = helper.make_graph([*g.nodes, *last], "absorbed" if absorbed else "naive", typed(inputs), typed(outputs))
    graph.initializer.extend(s.initializer(WEIGHTS) for s in stored.values())
    imports = [helper.make_opsetid("", OPSET)]
    return helper.make_model(
        graph, opset_imports=imports, ir_version=IR_VERSION, producer_name="dsv3", producer_version=__version__, doc_string=text
    )


Named = dict[str, tuple[str, list[int | str]]]


def _interface(c: ModelConfig, dtype: str) -> tuple[Named, Named]:
    """Inputs and outputs: name -> dtype, shape."""
    layers, rank, rope = c.num_hidden_layers, c.kv_lora_rank, c.qk_rope_head_dim
    inputs: Named = {
        "ids": ("int64", ["T"]),
        "cache_ckv": (dtype, [layers, "past", rank]),
        "cache_kpe": (dtype, [layers, "past", rope]),
    }
    outputs: Named = {
        "logits": ("float64" if dtype == "float64" else "float32", ["T", c.vocab_size]),
        "cache_ckv_out": (dtype, [layers, "past + T", rank]),
        "cache_kpe_out": (dtype, [layers, "past + T", rope]),
    }
    return inputs, outputs


def _description(c: ModelConfig, dtype: str) -> dict[str, Any]:
    """export.json: what a program needs to run the graphs."""
    inputs, outputs = _interface(c, dtype)

    def listed(names: Named) -> list[dict[str, Any]]:
        return [{"name": name, "dtype": kind, "shape": shape} for name, (kind, shape) in names.items()]

    return {
        "format": "dsv3-onnx",
        "version": 1,
        "dsv3": __version__,
        "dtype": dtype,
        "graphs": {name: text for name, (_, text) in GRAPHS.items()},
        "weights": WEIGHTS,
        "inputs": listed(inputs),
        "outputs": listed(outputs),
        "notes": [
            "one sequence a call; positions go from past to past + T - 1",
            "a new sequence starts with caches whose past is 0; each call returns the caches for the next",
            "row i of logits predicts the token after ids[i]",
            "memory of a call grows with attention heads x T x (past + T): feed long prompts in chunks",
        ],
        "max_position_embeddings": c.max_position_embeddings,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": list(c.eos_token_id),
    }
