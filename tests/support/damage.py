"""Ways to break a checkpoint, one per kind: which good one, what is done to it, and the words its error must hold."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import FP8, TINY, parse_file, poke, raw_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"
OTHER = "model-00002-of-00002.safetensors"
Q_A = "model.layers.0.self_attn.q_a_proj.weight"
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
Break = Callable[[Path], Any]


def config(**fields: Any) -> Break:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        values = {**json.loads(path.read_text(encoding="utf-8")), **fields}
        path.write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))

    return change


def tokenizer(**fields: Any) -> Break:
    def change(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], Any], file: str = SINGLE) -> Break:
    def rewrite(folder: Path) -> None:
        found = load_file(folder / file)
        change(found)
        save_file({k: v.contiguous() for k, v in found.items()}, folder / file)

    return rewrite


def header(change: Callable[[dict[str, Any]], Any], file: str = SINGLE) -> Break:
    def rewrite(folder: Path) -> None:
        table, data = parse_file(folder / file)
        change(table)
        raw_file(folder / file, table, data)

    return rewrite


def index(change: Callable[[dict[str, str]], Any], **metadata: Any) -> Break:
    def rewrite(folder: Path) -> None:
        table = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        change(table["weight_map"])
        table["metadata"] |= metadata
        (folder / INDEX).write_text(json.dumps(table))

    return rewrite


def cut(file: str, size: int) -> Break:
    return lambda folder: os.truncate(folder / file, size)


def write(file: str, content: bytes) -> Break:
    return lambda folder: (folder / file).write_bytes(content)


def bits(tensor: str, values: np.ndarray) -> Break:
    return lambda folder: poke(folder / SINGLE, tensor, values)


def duplicate_key(folder: Path) -> None:
    table, data = parse_file(folder / SINGLE)
    text = json.dumps(table)
    entry = json.dumps({"model.norm.weight": table["model.norm.weight"]})[1:-1]
    raw_file(folder / SINGLE, (text[:-1] + ", " + entry + "}").encode(), data)


def both_shards(folder: Path) -> None:
    first, second = load_file(folder / SHARD), load_file(folder / OTHER)
    name = sorted(first)[0]
    save_file({**second, name: first[name]}, folder / OTHER)


def linked_outside(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    (folder / SHARD).rename(outside)
    (folder / SHARD).symlink_to(outside)


def expert_twice(folder: Path) -> None:
    name = "layers.1.ffn.experts.0.w1.weight"
    expert = load_file(folder / "model0-mp2.safetensors")[name]
    tensors(lambda t: t.update({name: expert}), "model1-mp2.safetensors")(folder)


def many_keys(folder: Path) -> None:
    keys = ",".join(f'"{i:x}":0' for i in range(150_000))
    raw_file(folder / SINGLE, ("{" + keys + ',"0":0}').encode())


def many_tensors(folder: Path) -> None:
    empty = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    raw_file(folder / SINGLE, ("{" + ",".join(f'"{i:x}":{empty}' for i in range(200_000)) + "}").encode())


def pipe(name: str) -> Break:
    def replace_by_pipe(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return replace_by_pipe


def endless(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")


def other_spelling(folder: Path) -> None:
    """Rank 1's part under Hugging Face's name, in rank 0's file."""
    first, second = (load_file(folder / f"model{r}-mp2.safetensors") for r in (0, 1))
    first["layers.0.self_attn.q_b_proj.weight"] = second.pop("layers.0.attn.wq_b.weight")
    save_file(first, folder / "model0-mp2.safetensors")
    save_file(second, folder / "model1-mp2.safetensors")


def billion_ranks(folder: Path) -> None:
    (folder / "model0-mp2.safetensors").rename(folder / "model0-mp1000000000.safetensors")
    (folder / "model1-mp2.safetensors").unlink()


def many_layers(folder: Path) -> None:
    config(num_hidden_layers=10**9)(folder)


def set_to(name: str, value: torch.Tensor) -> Break:
    return tensors(lambda t: t.__setitem__(name, value))


def drop(*names: str) -> Break:
    return tensors(lambda t: [t.pop(n) for n in names])


def one(name: str, values: list[float], dtype: Any = np.float32) -> Break:
    return bits(name, np.array(values, dtype=dtype))


NAN_BF16, INF_BF16 = 0x7FC0, 0x7F80
SCALE = Q_A + "_scale_inv"

# kind: (which good checkpoint, how it is broken, words the error must hold)
KINDS: dict[str, tuple[str, Break, tuple[str, ...]]] = {
    # files
    "truncated data": ("single", cut(SINGLE, 100_000), (SINGLE, "truncated")),
    "truncated header": ("single", cut(SINGLE, 100), (SINGLE, "truncated")),
    "empty file": ("single", cut(SINGLE, 0), (SINGLE, "0 bytes")),
    "header bomb": ("single", lambda f: raw_file(f / SINGLE, b"{}", length=1 << 62), (SINGLE, "16 MiB")),
    "header of 20 MiB": ("single", lambda f: raw_file(f / SINGLE, b" " * (20 << 20)), (SINGLE, "16 MiB")),
    "deep header": ("single", lambda f: raw_file(f / SINGLE, b"[" * 100_000), (SINGLE, "JSON")),
    "header not JSON": ("single", lambda f: raw_file(f / SINGLE, b"\xff\xfe{"), (SINGLE, "JSON")),
    "header a list": ("single", lambda f: raw_file(f / SINGLE, []), (SINGLE, "object")),
    "duplicate key": ("single", duplicate_key, ("model.norm.weight", "several")),
    "overlap": (
        "single",
        header(lambda t: t[Q_A].update(data_offsets=[t[Q_A]["data_offsets"][0] - 2, t[Q_A]["data_offsets"][1] - 2])),
        ("an overlap",),
    ),
    "trailing bytes": ("single", lambda f: (f / SINGLE).open("ab").write(b"xx"), ("no tensor owns",)),
    "shape against bytes": ("single", header(lambda t: t[Q_A].update(shape=[1, 1])), (Q_A, "bytes")),
    "negative shape": ("single", header(lambda t: t[Q_A].update(shape=[-24, -136])), (Q_A, "non-negative")),
    "huge shape": ("single", header(lambda t: t[Q_A].update(shape=[1 << 62, 1 << 62])), (Q_A, "bytes")),
    "unknown dtype": ("single", header(lambda t: t[Q_A].update(dtype="F7")), (Q_A, "dtype")),
    "offsets not numbers": ("single", header(lambda t: t[Q_A].update(data_offsets=["0", "8"])), (Q_A, "offsets")),
    "no weights": ("single", lambda f: (f / SINGLE).unlink(), ("no weights",)),
    "pickle only": ("single", lambda f: (f / SINGLE).rename(f / "pytorch_model.bin"), ("pickled weights are never read",)),
    "shards without index": ("sharded", lambda f: (f / INDEX).unlink(), ("without an index",)),
    "duplicate among 150,000 keys": ("single", many_keys, ("0", "several")),
    "200,000 empty tensors": ("single", many_tensors, ("at most 100000 tensors",)),
    "dtype a list": ("single", header(lambda t: t[Q_A].update(dtype=["BF16"])), (Q_A, "dtype")),
    "dtype an object": ("single", header(lambda t: t[Q_A].update(dtype={})), (Q_A, "dtype")),
    "weights a pipe": ("single", pipe(SINGLE), (SINGLE,)),
    "index a pipe": ("sharded", pipe(INDEX), (INDEX, "regular file")),
    "config a pipe": ("single", pipe("config.json"), ("config.json", "regular file")),
    "config without end": ("single", endless, ("config.json", "regular file")),
    # index
    "shard name too long": ("sharded", index(lambda m: m.update({Q_A: "a" * 300 + ".safetensors"})), ("plain file names",)),
    "shard name of two lines": ("sharded", index(lambda m: m.update({Q_A: "a.safetensors\n"})), ("plain file names",)),
    "total a string": ("sharded", index(lambda m: None, total_size="12"), ("total_size",)),
    "index not JSON": ("sharded", write(INDEX, b"{"), (INDEX, "JSON")),
    "index without map": ("sharded", write(INDEX, b'{"weight_map": 3}'), (INDEX, "weight_map")),
    "path traversal": ("sharded", index(lambda m: m.update({Q_A: "../../etc/passwd.safetensors"})), ("plain file names",)),
    "absolute path": ("sharded", index(lambda m: m.update({Q_A: "/etc/x.safetensors"})), ("plain file names",)),
    "not a safetensors name": ("sharded", index(lambda m: m.update({Q_A: "weights.bin"})), ("plain file names",)),
    "link out of the folder": ("sharded", linked_outside, ("a link to",)),
    "missing shard": ("sharded", lambda f: (f / OTHER).unlink(), (OTHER, "download the missing file")),
    "twice in two shards": ("sharded", both_shards, (OTHER, "each tensor once")),
    "listed in the wrong shard": ("sharded", index(lambda m: m.update({sorted(m)[0]: OTHER})), ("as model.safetensors.index",)),
    "not in its shard": ("sharded", index(lambda m: m.update({"model.ghost.weight": SHARD})), ("model.ghost.weight",)),
    "not in the index": ("sharded", index(lambda m: m.pop(sorted(m)[0])), ("every tensor listed",)),
    "wrong total": ("sharded", index(lambda m: None, total_size=12), ("total_size",)),
    # tensors
    "wrong shape": ("single", set_to(Q_A, torch.zeros(24, 135, dtype=torch.bfloat16)), (Q_A, "[24, 136]", "[24, 135]")),
    "transposed": ("single", set_to(Q_A, torch.zeros(136, 24, dtype=torch.bfloat16)), (Q_A, "[136, 24]")),
    "wrong dtype": ("single", set_to(Q_A, torch.zeros(24, 136, dtype=torch.float16)), (Q_A, "BF16", "F16")),
    "integer weights": ("single", set_to(Q_A, torch.zeros(24, 136, dtype=torch.int8)), (Q_A, "I8")),
    "bf16 router bias": ("single", set_to(BIAS, torch.zeros(8, dtype=torch.bfloat16)), (BIAS, "F32")),
    "missing tensor": ("single", drop(Q_A), (Q_A, "none")),
    "missing expert": ("single", drop(EXPERT), (EXPERT, "none")),
    "missing embedding": ("single", drop("model.embed_tokens.weight", "model.layers.2.embed_tokens.weight"), ("embed_tokens",)),
    "extra tensor": ("single", set_to("model.extra.weight", torch.zeros(2)), ("model.extra.weight", "no such tensor")),
    "extra layer": ("single", set_to("model.layers.7.enorm.weight", torch.zeros(136)), ("num_nextn_predict_layers",)),
    "missing MTP tensor": ("single", drop("model.layers.2.eh_proj.weight"), ("eh_proj", "num_nextn_predict_layers to 0")),
    "other MTP embedding": ("single", one("model.layers.2.embed_tokens.weight", [0x3F80], np.uint16), ("same bytes",)),
    "NaN in a weight": ("single", one(Q_A, [NAN_BF16], np.uint16), (Q_A, "NaN or infinity")),
    "infinity in a norm": ("single", one("model.norm.weight", [INF_BF16], np.uint16), ("model.norm.weight", "NaN or infinity")),
    "NaN in the router bias": ("single", one(BIAS, [float("nan")]), (BIAS, "NaN or infinity")),
    # FP8
    "NaN scale": ("fp8", one(SCALE, [float("nan")]), (SCALE, "NaN")),
    "infinite scale": ("fp8", one(SCALE, [float("inf")]), (SCALE, "infinity")),
    "zero scale": ("fp8", one(SCALE, [0.0]), (SCALE, "positive scales", "0")),
    "negative scale": ("fp8", one(SCALE, [-0.5]), (SCALE, "positive scales", "-0.5")),
    "FP8 NaN code": ("fp8", one(Q_A, [0x7F], np.uint8), (Q_A, "NaN codes")),
    "FP8 negative NaN code": ("fp8", one(EXPERT, [0xFF], np.uint8), (EXPERT, "NaN codes")),
    "scale near the largest float": ("fp8", one(SCALE, [3e38]), (SCALE, "3e+38")),
    "missing scale": ("fp8", drop(SCALE), (SCALE, "scales [1, 2]")),
    "scale grid of one": ("fp8", set_to(SCALE, torch.ones(1, 1)), (SCALE, "[1, 2]", "[1, 1]")),
    "bf16 scales": ("fp8", set_to(SCALE, torch.ones(1, 2, dtype=torch.bfloat16)), (SCALE, "F32")),
    "bf16 weight in FP8": ("fp8", set_to(Q_A, torch.zeros(24, 136, dtype=torch.bfloat16)), (Q_A, "F8_E4M3")),
    "FP8 without config": ("fp8", config(quantization_config="absent"), ("F8_E4M3", "quantization_config")),
    "FP8 router": ("fp8", set_to("model.layers.1.mlp.gate.weight", torch.zeros(8, 136).to(torch.float8_e4m3fn)), ("gate",)),
    # the demo's layout
    "missing rank": ("demo", lambda f: (f / "model1-mp2.safetensors").unlink(), ("model1-mp2.safetensors",)),
    "two conversions": ("demo", lambda f: shutil.copy(f / "model0-mp2.safetensors", f / "model0-mp4.safetensors"), ("[2, 4]",)),
    "ranks disagree": (
        "demo",
        tensors(lambda t: t.update({"norm.weight": torch.ones(7)}), "model1-mp2.safetensors"),
        ("norm.weight", "[7]"),
    ),
    "expert in two ranks": ("demo", expert_twice, ("experts.0.w1",)),
    "a billion ranks": (
        "demo",
        billion_ranks,
        ("model1-mp1000000000.safetensors",),
    ),
    "another spelling": ("demo", other_spelling, ("self_attn.q_b_proj", "inference demo")),
    "ranks with other norms": (
        "demo",
        tensors(lambda t: t["norm.weight"].mul_(2), "model1-mp2.safetensors"),
        ("norm.weight", "the same bytes"),
    ),
    "foreign name": ("demo", tensors(lambda t: t.update({"bogus": torch.ones(1)}), "model0-mp2.safetensors"), ("bogus",)),
    # config
    "no config": ("single", lambda f: (f / "config.json").unlink(), ("config.json",)),
    "config not JSON": ("single", write("config.json", b"{,}"), ("config.json", "JSON")),
    "config a list": ("single", write("config.json", b"[]"), ("config.json", "object")),
    "missing field": ("single", config(kv_lora_rank="absent"), ("kv_lora_rank", "missing")),
    "text for a number": ("single", config(hidden_size="136"), ("hidden_size", "'136'")),
    "negative field": ("single", config(num_attention_heads=-2), ("num_attention_heads",)),
    "NaN eps": ("single", write("config.json", json.dumps({**TINY, "rms_norm_eps": float("nan")}).encode()), ("rms_norm_eps",)),
    "config disagrees on width": ("single", config(hidden_size=128), ("[64, 128]", "[64, 136]")),
    "config disagrees on heads": ("single", config(num_attention_heads=4, num_key_value_heads=4), ("q_b_proj",)),
    "config disagrees on experts": ("single", config(n_routed_experts=12), ("gate",)),
    "config has more layers": ("single", config(num_hidden_layers=5), ("layers.3", "none")),
    "config has a billion layers": ("single", many_layers, ("num_hidden_layers", "at most 1024")),
    "config without MTP": ("single", config(num_nextn_predict_layers=0), ("layers.2", "num_nextn_predict_layers")),
    "more experts than there are": ("single", config(num_experts_per_tok=9), ("num_experts_per_tok",)),
    "groups that do not divide": ("single", config(n_group=3), ("n_group",)),
    "rope_theta of one": ("single", config(rope_theta=1), ("rope_theta",)),
    "rope_theta of 400 digits": ("single", config(rope_theta=10**400), ("rope_theta", "a huge integer")),
    "beta of zero": ("single", config(rope_scaling={**TINY["rope_scaling"], "beta_fast": 0}), ("beta_fast",)),
    "factor of zero": ("single", config(rope_scaling={**TINY["rope_scaling"], "factor": 0}), ("factor",)),
    "mscale of 1e300": ("single", config(rope_scaling={**TINY["rope_scaling"], "mscale_all_dim": 1e300}), ("mscale_all_dim",)),
    "scaling of 1e300": ("single", config(routed_scaling_factor=1e300), ("routed_scaling_factor",)),
    "eps of 1e300": ("single", config(rms_norm_eps=1e300), ("rms_norm_eps",)),
    "a size of 10^18": ("single", config(hidden_size=10**18), ("hidden_size",)),
    "positions without end": ("single", config(max_position_embeddings=1 << 40), ("max_position_embeddings",)),
    "eos outside the vocabulary": ("single", config(eos_token_id=64), ("eos_token_id", "vocabulary of 64")),
    "tokenizer a pipe": ("single", pipe("tokenizer.json"), ("tokenizer.json", "regular file")),
    "template not UTF-8": ("story", write("chat_template.jinja", b"\xff"), ("chat_template.jinja", "UTF-8")),
    "template a folder": ("story", lambda f: (f / "chat_template.jinja").mkdir(), ("chat_template.jinja", "regular file")),
    "template a list of text": ("story", tokenizer(chat_template=["a"]), ("chat_template",)),
    "template without text": ("story", tokenizer(chat_template=[{"name": "default"}]), ("chat_template",)),
    "BOS that is no token": ("story", tokenizer(bos_token="<nope>"), ("bos_token", "<nope>")),
    "broken tokenizer": ("single", write("tokenizer.json", b"{}"), ("tokenizer.json",)),
    # not supported, by name
    "V4": ("single", config(model_type="deepseek_v4"), ("DeepSeek-V4", "supported are deepseek_v3")),
    "V3.2": ("single", config(model_type="deepseek_v32"), ("Sparse Attention",)),
    "another model": ("single", config(model_type="llama"), ("'llama'", "supported are")),
    "another rope": ("single", config(rope_scaling={"type": "linear", "factor": 2}), ("'linear'",)),
    "attention bias": ("single", config(attention_bias=True), ("attention_bias",)),
    "tied embeddings": ("single", config(tie_word_embeddings=True), ("tie_word_embeddings",)),
    "another activation": ("single", config(hidden_act="gelu"), ("'gelu'",)),
    "another quantisation": ("single", config(quantization_config={"quant_method": "awq"}), ("'awq'",)),
    "another block size": ("fp8", config(quantization_config={**FP8, "weight_block_size": [64, 64]}), ("weight_block_size",)),
    "another router": ("single", config(topk_method="hash"), ("'hash'",)),
    "another scoring": ("single", config(scoring_func="tanh"), ("'tanh'",)),
    "grouped heads": ("single", config(num_key_value_heads=1), ("num_key_value_heads",)),
}  # fmt: skip
