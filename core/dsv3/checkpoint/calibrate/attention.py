"""One layer's attention over the text, with its linears shown to a visitor."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.checkpoint.calibrate.source import Source
from dsv3.checkpoint.calibrate.taps import Taps
from dsv3.checkpoint.calibrate.visitor import Feed, Visitor
from dsv3.graph.mla import Attention
from dsv3.graph.step import Step
from dsv3.plugin import LatentCache

_TOGETHER = 2048  # tokens attended at once: bounds the scores


def attend(source: Source, visitor: Visitor, x: Tensor, layer: str, cos_sin: Tensor, position: int) -> Tensor:
    """x [S, W, H] after the input norm, its first position -> what attention adds, with the linears that the visitor gives."""
    c, prefix = source.config, f"{layer}.self_attn"
    # The input's name first: the graph gives q_proj the call site of q_b_proj.
    shared = ["kv_a_proj_with_mqa", "q_proj" if c.q_lora_rank is None else "q_a_proj"]
    linears = [*shared, *([] if c.q_lora_rank is None else ["q_b_proj"]), "o_proj"]
    weights = {f"{prefix}.{name}.weight": source.real(f"{prefix}.{name}.weight") for name in [*linears, "kv_b_proj"]}
    added, inputs = _run(source, weights, prefix, x, cos_sin, position)
    names = [f"{prefix}.{name}.weight" for name in shared]
    visitor.feed(Feed(inputs[shared[0]], names, {f"{layer}.input_layernorm.weight": None}))
    if c.q_lora_rank is not None:
        visitor.feed(Feed(inputs["q_b_proj"], [f"{prefix}.q_b_proj.weight"], {f"{prefix}.q_a_layernorm.weight": None}))
    values = {f"{prefix}.kv_b_proj.weight": _value_rows(source)}
    visitor.feed(Feed(inputs["o_proj"], [f"{prefix}.o_proj.weight"], values))
    rounded = dict(weights)
    for group in (shared, *([name] for name in linears[len(shared) :])):
        chosen = {f"{prefix}.{name}.weight": weights[f"{prefix}.{name}.weight"] for name in group}
        rounded |= visitor.round(chosen, inputs[group[0]])
    if all(rounded[name] is weights[name] for name in weights):
        return added
    return _run(source, rounded, prefix, x, cos_sin, position)[0]


def _value_rows(source: Source) -> Tensor:
    """kv_b_proj's rows are, head by head, keys then values; the values are the channels of o_proj's input."""
    c = source.config
    rows = torch.full((c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim), -1)
    rows[:, c.qk_nope_head_dim :] = torch.arange(c.num_attention_heads * c.v_head_dim).view(-1, c.v_head_dim)
    return rows.flatten()


def _run(
    source: Source, weights: dict[str, Tensor], prefix: str, x: Tensor, cos_sin: Tensor, position: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """What attention adds [S, W, H], and the inputs of its linears [S W, K]."""
    c, taps = source.config, Taps()
    module = Attention(c, source.attention(weights, prefix), taps, prefix)
    sequences, width, hidden = x.shape
    some = max(1, _TOGETHER // width)
    added = []
    for at in range(0, sequences, some):
        part = x[at : at + some]
        count = part.shape[0]
        cache = LatentCache(torch.zeros(count, width, c.kv_lora_rank), torch.zeros(count, width, c.qk_rope_head_dim))
        added.append(module(part.reshape(-1, hidden), _step(count, width, position), cache, cos_sin).view(part.shape))
    return torch.cat(added), {name: torch.cat(seen) for name, seen in taps.inputs.items() if seen}


def _step(sequences: int, width: int, position: int) -> Step:
    """Whole sequences of `width` tokens, each in a page of its own."""
    tokens = sequences * width
    bounds = torch.arange(0, tokens + 1, width, dtype=torch.int32)
    slots = torch.arange(tokens, dtype=torch.int32)
    return Step(
        ids=slots,
        positions=(slots % width) + position,
        slots=slots,
        block_table=torch.arange(sequences, dtype=torch.int32)[:, None],
        seq_lens=torch.full((sequences,), width, dtype=torch.int32),
        cu_q=bounds,
        cu_k=bounds,
        max_q=width,
        max_k=width,
        total_k=tokens,
        bucket=0,
        bucket_k=0,
        absorbed=False,
    )
