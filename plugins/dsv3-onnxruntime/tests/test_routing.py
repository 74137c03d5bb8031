"""Choice and weight of experts."""

import pytest
import torch
from budgets import draw
from dsv3_onnxruntime import kernels
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3 import ops

GROUPINGS = ((16, 4, 2, 4), (16, 1, 1, 16), (8, 2, 1, 4), (12, 3, 3, 12), (17, 1, 1, 1), (256, 8, 4, 8))


def check(logits: torch.Tensor, bias: torch.Tensor | None, grouping: tuple[int, ...], **how: object) -> None:
    """The same experts as the reference gives in float32, where ties go to the lower id too; weights against float64."""
    _, g, kept, k = grouping
    arguments = {"bias": bias, "n_group": g, "topk_group": kept, "topk": k, **how}
    weights, ids = kernels.grouped_topk(logits=logits, **arguments)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32
    _, wanted = ops.grouped_topk(logits, **arguments)
    assert torch.equal(ids.sort(dim=-1).values, wanted.sort(dim=-1).values)
    x = logits.double()
    scores = torch.sigmoid(x) if how.get("score", "sigmoid") == "sigmoid" else torch.softmax(x, dim=-1)
    exact = scores.gather(1, ids.long())
    if how.get("renormalize", True):
        exact = exact / (exact.sum(dim=-1, keepdim=True) + 1e-20)
    torch.testing.assert_close(weights.double(), exact * how.get("scale", 1.0), rtol=2e-6, atol=1e-35)


@given(
    st.sampled_from(GROUPINGS),
    st.sampled_from(("sigmoid", "softmax")),
    st.sampled_from(("top2_sum", "max")),
    st.sampled_from(("none", "small", "negative")),
    st.booleans(),
    st.sampled_from((0.01, 1.0, 8.0)),
    st.integers(0, 99),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_any_grouping(grouping, score, group_score, bias, renormalize, size, seed) -> None:  # type: ignore[no-untyped-def]
    logits = draw("normal", 5, grouping[0], seed=seed) * size
    offset = {"none": None, "small": 0.1, "negative": -3.0}[bias]
    b = None if offset is None else draw("normal", grouping[0], seed=seed) * 0.1 + offset
    check(logits, b, grouping, score=score, group_score=group_score, renormalize=renormalize, scale=2.5)


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_equal_scores_go_to_the_lower_id(grouping: tuple[int, ...]) -> None:
    check(torch.zeros(2, grouping[0]), None, grouping)
    check(torch.full((2, grouping[0]), 1e4), torch.full((grouping[0],), -3.0), grouping)
    check(torch.randint(0, 3, (7, grouping[0]), generator=torch.Generator().manual_seed(0)).float(), None, grouping)


def test_huge_logits_are_no_nan() -> None:
    logits = draw("normal", 6, 16) * 1e4
    logits[0] = -1e4
    for score in ("sigmoid", "softmax"):
        check(logits, None, (16, 4, 2, 4), score=score)
        check(logits, draw("normal", 16), (16, 4, 2, 4), score=score)


def test_small_scores_keep_their_relative_weights() -> None:
    check(draw("normal", 4, 16) - 40, None, (16, 1, 1, 4))


def test_a_bias_chooses_and_does_not_weigh() -> None:
    logits, bias = torch.tensor([[2.0, 0.0, -2.0]]), torch.tensor([-5.0, 0.0, 5.0])
    weights, ids = kernels.grouped_topk(logits=logits, bias=bias, n_group=1, topk_group=1, topk=1, renormalize=False, scale=1.0)
    assert ids.tolist() == [[2]]
    torch.testing.assert_close(weights, torch.sigmoid(logits[:, 2:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_route_is_logits_and_choice(dtype: torch.dtype) -> None:
    x, gate, bias = draw("normal", 9, 100).to(dtype), draw("normal", 16, 100, seed=1).to(dtype), draw("normal", 16) * 0.1
    how = {"n_group": 4, "topk_group": 2, "topk": 4, "score": "sigmoid", "group_score": "top2_sum"}
    how |= {"renormalize": True, "scale": 2.5}
    weights, ids = kernels.route(x=x, gate=gate, bias=bias, **how)
    exact, chosen = ops.route(x.double(), gate.double(), bias.double(), **how)
    order, other = ids.sort(dim=-1), chosen.sort(dim=-1)
    assert torch.equal(order.values, other.values)
    wanted = exact.gather(1, other.indices)
    torch.testing.assert_close(weights.gather(1, order.indices).double(), wanted, rtol=1e-5, atol=0)
    assert kernels.route(x=x[:0], gate=gate, bias=None, **how)[1].shape == (0, 4)
