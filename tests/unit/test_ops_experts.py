"""Routing and experts against plain loops in float64, and the edges that kernels get wrong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3 import ops
from dsv3.errors import OperatorError
from dsv3.plugin import Prepared

F64 = torch.float64


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


# -- routing


def _route_loop(
    logits: Tensor, bias: Tensor | None, groups: int, kept: int, k: int, score: str, rank: str, norm: bool
) -> list[dict[int, float]]:
    """Expert -> weight per token, one token at a time, straight from the definition."""
    found = []
    for row in logits.double():
        s = torch.sigmoid(row) if score == "sigmoid" else torch.softmax(row, -1)
        c = s + (bias.double() if bias is not None else 0)
        allowed = list(range(len(row)))
        if groups > 1:
            size = len(row) // groups
            members = [range(g * size, (g + 1) * size) for g in range(groups)]
            value = [sorted((float(c[e]) for e in m), reverse=True) for m in members]
            merit = [v[0] if rank == "max" else v[0] + v[1] for v in value]
            best = sorted(range(groups), key=lambda g: (-merit[g], g))[:kept]
            allowed = [e for g in best for e in members[g]]
        chosen = sorted(allowed, key=lambda e: (-float(c[e]), e))[:k]
        total = sum(float(s[e]) for e in chosen) + 1e-20 if norm else 1.0
        found.append({e: float(s[e]) / total * 2.5 for e in chosen})
    return found


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([(8, 1, 1, 3), (8, 4, 2, 4), (12, 3, 1, 4), (16, 4, 4, 16), (6, 2, 1, 1)]), st.booleans(),
    st.sampled_from([None, 0.0, -5.0, 3.0]), st.sampled_from(["top2_sum", "max"]), st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_grouped_topk_is_the_definition(
    sizes: tuple[int, int, int, int], sigmoid: bool, bias: float | None, rank: str, norm: bool, seed: int
) -> None:
    e, groups, kept, k = sizes
    logits = randn(7, e, seed=seed)
    b = None if bias is None else (randn(e, seed=seed + 1) * 0.5 + bias).float()
    score = "sigmoid" if sigmoid else "softmax"
    weights, ids = ops.grouped_topk(logits, b, groups, kept, k, score, rank, norm, 2.5)
    assert ids.dtype == torch.int32 and weights.dtype == F64
    for t, wanted in enumerate(_route_loop(logits, b, groups, kept, k, score, rank, norm)):
        found = dict(zip(ids[t].tolist(), weights[t].tolist(), strict=True))
        assert found.keys() == wanted.keys()
        for expert, weight in wanted.items():
            assert abs(found[expert] - weight) < 1e-12


def test_a_negative_bias_cannot_bring_back_a_masked_group() -> None:
    """Masked with 0 instead of -inf, experts of the losing group would beat the winners' negative scores."""
    logits = torch.tensor([[3.0, 3.0, -3.0, -3.0]])
    _, ids = ops.grouped_topk(logits, torch.full((4,), -9.0), 2, 1, 2)
    assert sorted(ids[0].tolist()) == [0, 1]


def test_ties_go_to_the_lower_expert() -> None:
    _, ids = ops.grouped_topk(torch.zeros(3, 8), None, 4, 2, 3)
    assert [sorted(row) for row in ids.tolist()] == [[0, 1, 2]] * 3


def test_router_logits_are_float32_for_bf16() -> None:
    x, w = randn(3, 40, dtype=torch.bfloat16), randn(5, 40, seed=1, dtype=torch.bfloat16)
    found = ops.router_gemm(x, w)
    assert found.dtype == torch.float32
    close(found.double(), x.double() @ w.double().T, 1e-5)


@pytest.mark.parametrize(
    "wrong", [{"n_group": 3}, {"topk_group": 5}, {"topk": 9}, {"score": "tanh"}, {"group_score": "mean"}, {"n_group": 8}]
)
def test_impossible_routing_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(OperatorError):
        ops.grouped_topk(torch.zeros(1, 8), None, **{"n_group": 4, "topk_group": 2, "topk": 2, **wrong})


# -- experts


def _expert_loop(x: Tensor, weights: Tensor, ids: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for j in range(ids.shape[1]):
            e = int(ids[t, j])
            if e >= 0:
                gate, up = (w13[e] @ x[t]).chunk(2)
                y[t] += weights[t, j] * (w2[e] @ (torch.nn.functional.silu(gate) * up))
    return y


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 6), st.integers(1, 4), st.integers(1, 5), st.booleans(), st.integers(0, 2**31))
def test_fused_experts_is_a_loop_over_tokens(t: int, k: int, experts: int, nan: bool, seed: int) -> None:
    h, i = 10, 6
    x, w13, w2 = randn(t, h, seed=seed), randn(experts, 2 * i, h, seed=seed + 1), randn(experts, h, i, seed=seed + 2)
    ids = torch.randint(-1, experts, (t, k), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    weights = randn(t, k, seed=seed + 3).abs()
    dirty = torch.where(ids < 0, float("nan"), weights) if nan else weights
    prepared = [Prepared("canonical", "none", tuple(w.shape), {"weight": w}) for w in (w13, w2)]
    close(ops.fused_experts(x, dirty, ids, *prepared), _expert_loop(x, weights, ids, w13, w2), 1e-10)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31))
def test_moe_permute_is_a_stable_sort(t: int, k: int, experts: int, seed: int) -> None:
    ids = torch.randint(-1, experts, (t, k), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    perm, offsets = ops.moe_permute(ids, experts)
    flat = ids.flatten().tolist()
    order = [r for e in range(experts) for r, found in enumerate(flat) if found == e]
    assert perm.tolist() == order + [-1] * (t * k - len(order))
    assert offsets.tolist() == [sum(f < e for f in flat if f >= 0) for e in range(experts + 1)]
    assert perm.dtype == offsets.dtype == torch.int32


def test_grouped_linear_leaves_the_rows_past_the_last_expert_zero() -> None:
    w = Prepared("canonical", "none", (2, 3, 4), {"weight": randn(2, 3, 4)})
    y = ops.grouped_linear(torch.full((5, 4), float("nan"), dtype=F64), w, torch.tensor([0, 0, 0], dtype=torch.int32))
    assert (y == 0).all()


def test_moe_adds_unscaled_shared_experts_and_maps_experts_to_this_rank() -> None:
    x, gate = randn(4, 8), randn(4, 8, seed=1)
    w13, w2, s13, s2 = randn(4, 12, 8, seed=2), randn(4, 8, 6, seed=3), randn(10, 8, seed=4), randn(8, 5, seed=5)
    p = [Prepared("canonical", "none", tuple(w.shape), {"weight": w}) for w in (w13, w2, s13, s2)]
    routing = (1, 1, 2, "sigmoid", "top2_sum", True, 2.5)
    weights, ids = ops.route(x, gate, None, *routing)
    wanted = _expert_loop(x, weights, ids, w13, w2) + ops.silu_mul(x @ s13.T) @ s2.T
    close(ops.moe(x, gate, None, *p, *routing), wanted, 1e-10)
    parts = torch.zeros_like(x)
    for rank, here in enumerate(([0, 1], [2, 3])):
        local = torch.full((4,), -1, dtype=torch.int32)
        local[here] = torch.tensor([0, 1], dtype=torch.int32)
        q = [Prepared("canonical", "none", (2, *w.shape[1:]), {"weight": w[here]}) for w in (w13, w2)]
        parts += ops.moe(x, gate, None, *q, *((p[2], p[3]) if rank == 0 else (None, None)), *routing, expert_map=local)
    close(parts, wanted, 1e-10)
