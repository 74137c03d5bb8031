"""A checkpoint as a GGUF file of llama.cpp's "deepseek2": `python -m dsv3.bench.peers.gguf_file SRC DST TYPE`.

Written tensor by tensor through the `gguf` package. Latent attention is stored absorbed, as llama.cpp runs it: of kv_b, W_UK
per head transposed as attn_k_b [Nh, R, Dn], and W_UV as attn_v_b [Nh, Dv, R]. Norms, routers and their bias stay float32, as
in llama.cpp's own files. TYPE is that of all other matrices; with Q4_0 embedding and head are Q8_0. There is no tokenizer.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3.checkpoint.folder import folder_config
from dsv3.checkpoint.layout import open_checkpoint
from dsv3.checkpoint.loader import as_tensor
from dsv3.checkpoint.reader import Reader
from dsv3.checkpoint.unpack import real_rows
from dsv3.checkpoint.validate import Item, plan_load
from dsv3.errors import UnsupportedModel, UsageError
from dsv3.graph.config import ModelConfig

TYPES = ("F32", "BF16", "Q8_0", "Q4_0")
_TOP = {"embed": "token_embd", "norm": "output_norm", "head": "output"}
_LAYER = {
    "input_norm": "attn_norm", "post_norm": "ffn_norm", "attn.q": "attn_q", "attn.q_a": "attn_q_a",
    "attn.q_a_norm": "attn_q_a_norm", "attn.q_b": "attn_q_b", "attn.kv_a": "attn_kv_a_mqa", "attn.kv_a_norm": "attn_kv_a_norm",
    "attn.o": "attn_output", "attn.kv_b": "attn_kv_b", "mlp.gate": "ffn_gate_inp", "mlp.bias": "exp_probs_b",
    "mlp.w2": "ffn_down", "mlp.shared2": "ffn_down_shexp",
}  # fmt: skip
_HALVES = {"mlp.w13": ("ffn_gate", "ffn_up"), "mlp.shared13": ("ffn_gate_shexp", "ffn_up_shexp")}
_PLAIN = ("ffn_gate_inp", "exp_probs_b")


@dataclass(frozen=True)
class Made:
    """One tensor of the file: its name, shape, type, and the checkpoint's tensors it is made of (one per expert)."""

    name: str
    shape: tuple[int, ...]
    kind: str
    items: tuple[Item, ...]


def name_of(item: Item) -> str:
    """Without the ending: "blk.3.ffn_up_exps"."""
    e = item.expected
    if e.into in _TOP:
        return _TOP[e.into]
    _, layer, rest = e.into.split(".", 2)
    found = _HALVES[rest][e.half == "up"] if rest in _HALVES else _LAYER[rest]
    return f"blk.{layer}.{found}" + ("_exps" if e.expert is not None else "")


def tensors(c: ModelConfig, items: list[Item], kind: str) -> Iterator[Made]:
    """Everything the file holds."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(name_of(item), []).append(item)
    for name, group in groups.items():
        first, short = group[0].expected, name.rpartition(".")[2]
        ordered = tuple(sorted(group, key=lambda i: i.expected.expert or 0))
        if short == "attn_kv_b":
            heads, rank = c.num_attention_heads, c.kv_lora_rank
            yield Made(name.replace("kv_b", "k_b") + ".weight", (heads, rank, c.qk_nope_head_dim), kind, ordered)
            yield Made(name.replace("kv_b", "v_b") + ".weight", (heads, c.v_head_dim, rank), kind, ordered)
            continue
        shape = first.shape if first.expert is None else (len(group), *first.shape)
        plain = len(shape) == 1 or short in _PLAIN
        mixed = "Q8_0" if kind == "Q4_0" and short in ("token_embd", "output") else kind
        ending = ".bias" if short == "exp_probs_b" else ".weight"
        yield Made(name + ending, shape, "F32" if plain else mixed, ordered)


def values(c: ModelConfig, made: Made, reader: Reader) -> Tensor:
    """float32, or bfloat16 where it is stored so, in the tensor's shape."""
    found = [_real(item, reader) for item in made.items]
    whole = found[0] if made.items[0].expected.expert is None else torch.stack(found)
    short = made.name.split(".")[-2]
    if short in ("attn_k_b", "attn_v_b"):
        per_head = whole.view(c.num_attention_heads, -1, c.kv_lora_rank)
        nope = c.qk_nope_head_dim
        return per_head[:, :nope].transpose(1, 2) if short == "attn_k_b" else per_head[:, nope:]
    return whole


def _real(item: Item, reader: Reader) -> Tensor:
    stored = as_tensor(reader.array(item.entry))
    if item.scale is None:
        return stored
    scale, (rows, cols) = as_tensor(reader.array(item.scale)), item.expected.shape
    return real_rows(stored, scale, item.stored, cols, 0, rows, torch.float32)


def encoded(tensor: Tensor, kind: str) -> np.ndarray[Any, Any]:
    """As the file has it: float32, or bytes [.., bytes of a row]."""
    import gguf

    if kind == "BF16":
        return tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    real = tensor.to(torch.float32).contiguous().numpy()
    return real if kind == "F32" else gguf.quants.quantize(real, gguf.GGMLQuantizationType[kind])


def metadata(writer: Any, c: ModelConfig) -> None:
    """The keys that llama.cpp's loader of deepseek2 reads."""
    import gguf

    rank, rope = c.kv_lora_rank, c.qk_rope_head_dim
    writer.add_name("dsv3 bench")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_vocab_size(c.vocab_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(1)  # absorbed: all heads share the latent
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(c.qk_head_dim)
    writer.add_value_length_mla(c.v_head_dim)
    if c.q_lora_rank is not None:
        writer.add_q_lora_rank(c.q_lora_rank)
    writer.add_kv_lora_rank(rank)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_leading_dense_block_count(c.first_k_dense_replace)
    writer.add_expert_count(c.n_routed_experts)
    writer.add_expert_used_count(c.num_experts_per_tok)
    writer.add_expert_shared_count(c.n_shared_experts)
    writer.add_expert_feed_forward_length(c.moe_intermediate_size)
    writer.add_expert_weights_scale(c.routed_scaling_factor)
    writer.add_expert_weights_norm(c.norm_topk_prob)
    writer.add_expert_group_count(c.n_group)
    writer.add_expert_group_used_count(c.topk_group)
    gating = gguf.ExpertGatingFuncType
    writer.add_expert_gating_func(gating.SIGMOID if c.scoring_func == "sigmoid" else gating.SOFTMAX)
    writer.add_rope_dimension_count(rope)
    writer.add_rope_freq_base(c.rope_theta)
    if (yarn := c.rope_scaling) is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(yarn.factor)
        writer.add_rope_scaling_orig_ctx_len(yarn.original_max_position_embeddings)
        writer.add_rope_scaling_yarn_log_mul(0.1 * yarn.mscale_all_dim)
        writer.add_rope_scaling_yarn_beta_fast(yarn.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(yarn.beta_slow)
    writer.add_tokenizer_model("no_vocab")


def check(c: ModelConfig) -> None:
    """UnsupportedModel for what llama.cpp's deepseek2 has no place for."""
    if c.n_routed_experts is None or c.moe_layer_freq != 1:
        raise UnsupportedModel("a GGUF file of deepseek2 needs experts in every layer after the dense ones; this model has not")


def write(source: Path, path: Path, kind: str) -> int:
    """Write the file, whole or not at all; its size in bytes."""
    if kind not in TYPES:
        raise UsageError(f"GGUF type {kind!r} is not one of {', '.join(TYPES)}")
    import gguf

    c = folder_config(source)
    check(c)
    plan, reader = plan_load(c, open_checkpoint(source), source, mtp=False), Reader()
    made, part = list(tensors(c, plan.items, kind)), path.with_name(f".{path.name}.part")
    writer = gguf.GGUFWriter(part, "deepseek2")
    metadata(writer, c)
    for m in made:
        qtype = gguf.GGMLQuantizationType[m.kind]
        shape = m.shape if m.kind == "F32" else gguf.quant_shape_to_byte_shape(m.shape, qtype)
        item = np.dtype(np.float32 if m.kind == "F32" else np.uint8)
        writer.add_tensor_info(m.name, shape, item, int(np.prod(shape)) * item.itemsize, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for m in made:
        writer.write_tensor_data(encoded(values(c, m, reader), m.kind))
    writer.close()
    os.replace(part, path)
    return path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", type=Path)
    parser.add_argument("dst", type=Path)
    parser.add_argument("type", choices=TYPES)
    given = parser.parse_args()
    print(f"{given.dst}: {write(given.src, given.dst, given.type) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
