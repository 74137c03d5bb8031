"""Bytes and FLOP of a step against counts that know nothing of the weight tree, and the roofline's arithmetic."""

from __future__ import annotations

import math
from typing import Any

import pytest

import dsv3
from dsv3.bench.cost import Cost, expected_distinct, step_cost
from dsv3.bench.session import Session
from dsv3.graph.config import ModelConfig
from dsv3.graph.names import expected_tensors

READ, COMPUTE = 20.0, 60.0


def by_names(c: ModelConfig, queries: list[int], lengths: list[int], absorbed: bool, distinct: list[float]) -> tuple[int, int]:
    """(weight bytes, FLOP) from the names in a checkpoint: bf16 but for the router's bias, experts one by one."""
    tokens, nbytes, flop, experts = sum(queries), 0.0, 0.0, c.n_routed_experts or 0
    moe = [i for i in range(c.num_hidden_layers) if c.is_moe(i)]
    for e in expected_tensors(c):
        if e.layer >= c.num_hidden_layers or e.kind == "copy":
            continue
        size = math.prod(e.shape)
        if e.into == "embed":
            nbytes += tokens * 2 * e.shape[1]
        elif e.expert is not None:
            nbytes += 2 * size * distinct[moe.index(e.layer)] / experts
            flop += 2 * size * tokens * c.num_experts_per_tok / experts
        else:
            nbytes += size * (4 if e.kind == "f32" else 2)
            rows = len(lengths) if e.into == "head" else sum(lengths) if "kv_b" in e.name and not absorbed else tokens
            flop += 2 * size * rows if len(e.shape) > 1 else 0
    nbytes += tokens * c.qk_rope_head_dim * 4  # rows of cosines and sines
    rank, rope = c.kv_lora_rank, c.qk_rope_head_dim
    pair = rank + rope + rank if absorbed else c.qk_nope_head_dim + rope + c.v_head_dim
    for q, n in zip(queries, lengths, strict=True):
        seen = sum(n - q + j + 1 for j in range(q))
        flop += 2 * seen * c.num_attention_heads * pair * c.num_hidden_layers
    return round(nbytes), round(flop)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_decode_step_reads_what_its_tensors_hold(model: dsv3.Model, batch: int) -> None:
    session = Session(model, batch, 7, 4)
    session.prefill()
    distinct = session.distinct()
    cost, c = session.cost(2), model.config
    weights, flop = by_names(c, [1] * batch, [10] * batch, True, [float(d) for d in distinct])
    assert abs(cost.weight_bytes - weights) <= len(distinct) and cost.flop == flop
    row = 2 * (c.kv_lora_rank + c.qk_rope_head_dim)
    assert cost.cache_bytes == c.num_hidden_layers * row * batch * (10 + 1)
    assert cost.nbytes == cost.weight_bytes + cost.cache_bytes and cost.distinct == sum(distinct) / len(distinct)


def test_a_prompt_reads_every_expert_that_it_is_expected_to_visit(model: dsv3.Model) -> None:
    session, c = Session(model, 2, 9, 1), model.config
    cost = session.prefill_cost()
    each = expected_distinct(16, 4, 18)
    weights, flop = by_names(c, [9, 9], [9, 9], False, [each] * 4)
    assert abs(cost.weight_bytes - weights) <= 8 and cost.flop == flop


def test_quantised_weights_count_as_they_are_kept(model: dsv3.Model, story: Any) -> None:
    packed = dsv3.load(str(story), backend="reference", quant="int4-w4a16", mtp=False)
    plain, small = (Session(m, 1, 4, 1) for m in (model, packed))
    costs = [step_cost(s.model.config, s.model.graph.w, s.cache.layers, [1], [5], True) for s in (plain, small)]
    assert costs[0].flop == costs[1].flop
    kept = packed.graph.w.layers[1].mlp.w13  # type: ignore[union-attr]
    e, n, k = kept.shape
    assert kept.nbytes == e * n * (k // 2 + 4 * math.ceil(k / 128))
    assert costs[1].weight_bytes < 0.6 * costs[0].weight_bytes


def test_experts_are_those_that_the_layers_really_visit(model: dsv3.Model) -> None:
    session = Session(model, 4, 6, 1)
    session.prefill()
    seen = []
    for slot in model.placement().binding.slots:
        if slot.decision.op == "grouped_topk" and slot.live:
            kernel = slot.holder[slot.key]

            def spy(kernel: Any = kernel, **arguments: Any) -> Any:
                weights, ids = kernel(**arguments)
                seen.append(ids.unique().numel())
                return weights, ids

            slot.holder[slot.key] = spy
    kept = [(s, s.entry) for s in model.placement().binding.slots if s.decision.op == "grouped_topk"]
    try:
        distinct = session.distinct()
    finally:
        for slot, entry in kept:
            slot.holder[slot.key] = entry
    assert distinct == seen and len(distinct) == 4 and min(distinct) >= 4 and max(distinct) <= 16


def test_expected_experts() -> None:
    assert expected_distinct(64, 8, 1) == pytest.approx(8)
    assert expected_distinct(64, 8, 8) == pytest.approx(64 * (1 - (7 / 8) ** 8))
    assert expected_distinct(4, 1, 2) == pytest.approx(1.75)  # of 16 pairs 4 are equal
    assert expected_distinct(8, 8, 3) == 8


def test_the_roofline_is_the_longer_of_reading_and_computing() -> None:
    ridge = COMPUTE / READ
    for intensity, bound in ((ridge / 3, "read"), (ridge * 3, "matmul")):
        cost = Cost(900_000_000, 100_000_000, round(intensity * 1e9), 0.0)
        assert cost.intensity == pytest.approx(intensity) and cost.bound(READ, COMPUTE) == bound
        expected = 1 / READ if bound == "read" else intensity / COMPUTE
        assert cost.seconds(READ, COMPUTE) == pytest.approx(expected)
