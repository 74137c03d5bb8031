"""Every operator's ONNX body against its reference, under ONNX Runtime and under onnx.reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3 import ops
from dsv3.errors import UsageError
from tests.export.cases import CASES

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from dsv3.export.flatten import op_inputs, op_outputs  # noqa: E402
from dsv3.export.opmodel import DOMAIN, op_model  # noqa: E402
from dsv3.export.runtime import RUNTIMES, run_onnxruntime, run_reference  # noqa: E402

# Relative to the largest expected value: float32 sums in another order, bf16 one rounding that falls the other way.
TOLERANCE = {"float32": 3e-6, "float64": 1e-13, "bfloat16": 2**-7}


def check(found: dict[str, Any], expected: dict[str, Any], op: str) -> None:
    """Names, types and shapes; numbers near, NaN and infinities in the same places, integers and codes equal."""
    assert list(found) == list(expected)
    for name, e in expected.items():
        y = found[name]
        assert (y.dtype, y.shape) == (e.dtype, e.shape), name
        a, b = y.astype(np.float64), e.astype(np.float64)
        finite = np.isfinite(b)
        np.testing.assert_array_equal(a[~finite], b[~finite], err_msg=name)
        error = np.abs(a[finite] - b[finite])
        allowed = TOLERANCE.get(e.dtype.name, 0.0) * np.abs(b[finite]).max(initial=0.0)
        if e.dtype.name.startswith("float8") and op not in ("act_quant", "fn_to_fnuz", "kv_cache_write"):
            # Behind a norm or an activation the input may differ in its last bit: a code that then differs is its neighbour.
            near = error <= 0.13 * np.abs(b[finite]) + 2**-8
            assert near.all() and np.count_nonzero(error) <= max(1, b.size // 100), name
            continue
        assert (error <= allowed).all(), f"{name}: {error.max()} > {allowed}"


def test_every_operator_has_a_case() -> None:
    assert {op for op, _, _ in CASES} == set(ops.names())


@pytest.mark.parametrize(("op", "make"), [pytest.param(op, make, id=f"{op}-{name}") for op, name, make in CASES])
def test_the_body_gives_what_the_reference_gives(op: str, make: Callable[[], dict[str, Any]]) -> None:
    arguments = {**ops.spec(op).defaults, **make()}
    model, inputs = op_model(op, arguments), op_inputs(op, arguments)
    onnx.checker.check_model(model, full_check=True)
    assert [(n.domain, n.op_type) for n in model.graph.node] == [(DOMAIN, op)]
    assert {n.domain for n in model.functions[0].node} == {""}
    expected = op_outputs(op, arguments, ops.spec(op).reference(**arguments))
    for run in RUNTIMES.values():
        check(run(model, inputs), expected, op)


def _tokens(arguments: dict[str, Any], n: int) -> dict[str, Any]:
    return {
        k: v[:n] if isinstance(v, torch.Tensor) and k in ("x", "residual", "ids", "weights", "slots") else v
        for k, v in arguments.items()
    }


@pytest.mark.parametrize("op", ["rms_norm", "quant_linear", "act_quant", "moe", "fused_experts", "moe_permute", "route"])
def test_one_model_takes_any_number_of_tokens(op: str) -> None:
    make = next(make for name, _, make in CASES if name == op)
    arguments = {**ops.spec(op).defaults, **make()}
    model = op_model(op, arguments)
    for tokens in (0, 1, 3):
        fewer = _tokens(arguments, tokens)
        expected = op_outputs(op, fewer, ops.spec(op).reference(**fewer))
        for run in RUNTIMES.values():
            check(run(model, op_inputs(op, fewer)), expected, op)


def test_power_of_two_scales_are_exact_over_the_whole_range() -> None:
    """Powers of two themselves, their neighbours, and subnormal scales: none may be rounded down, or up twice."""
    powers = torch.ldexp(torch.ones(250), torch.arange(-120, 130).clamp_max(127))
    amax = torch.cat([powers, powers.nextafter(torch.tensor(0.0)), powers.nextafter(torch.tensor(torch.inf))]) * 448
    arguments = {
        **ops.spec("act_quant").defaults,
        "x": amax[torch.isfinite(amax)][:, None],
        "scale_fmt": "ue8m0",
        "amax_floor": 0.0,
    }
    model, expected = op_model("act_quant", arguments), op_outputs("act_quant", arguments, ops.act_quant(**arguments))
    for run in RUNTIMES.values():
        check(run(model, op_inputs("act_quant", arguments)), expected, "act_quant")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(1, 300), st.integers(1, 200), st.sampled_from(["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"]),
    st.sampled_from(["float32", "ue8m0"]), st.sampled_from([1e-4, 0.0]), st.integers(0, 2**31), st.sampled_from([-30, 0, 25]),
)  # fmt: skip
def test_codes_are_exact(k: int, group: int, dtype: str, fmt: str, floor: float, seed: int, power: int) -> None:
    """Of numbers over a wide range, in any grouping: every code and every scale."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4, k, generator=g) * torch.ldexp(torch.ones(4, k), torch.randint(-20, 20, (4, k), generator=g))
    x[0] = x[0].round()
    x[1] *= 10.0**power
    arguments = {"x": x, "group": group, "dtype": dtype, "scale_fmt": fmt, "amax_floor": floor}
    expected = op_outputs("act_quant", arguments, ops.act_quant(**arguments))
    model, inputs = op_model("act_quant", arguments), op_inputs("act_quant", arguments)
    for run in RUNTIMES.values():
        for name, found in run(model, inputs).items():
            np.testing.assert_array_equal(found.astype(np.float64), expected[name].astype(np.float64))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 9), st.integers(1, 5), st.integers(1, 7), st.integers(0, 2**31))
def test_permutations_are_exact(tokens: int, k: int, experts: int, seed: int) -> None:
    ids = torch.randint(-1, experts + 1, (tokens, k), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    arguments = {"ids": ids, "n_experts": experts}
    expected = op_outputs("moe_permute", arguments, ops.moe_permute(**arguments))
    for run in RUNTIMES.values():
        check(run(op_model("moe_permute", arguments), op_inputs("moe_permute", arguments)), expected, "moe_permute")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from([(8, 1, 1, 3), (24, 6, 3, 7), (12, 3, 1, 4), (16, 4, 4, 16)]), st.booleans(), st.integers(0, 2**31))
def test_equal_scores_go_to_the_lower_expert(sizes: tuple[int, int, int, int], best: bool, seed: int) -> None:
    """Few different scores, so that nearly all choices are ties."""
    e, groups, kept, k = sizes
    g = torch.Generator().manual_seed(seed)
    arguments = {
        **ops.spec("grouped_topk").defaults, "logits": torch.randint(-2, 2, (9, e), generator=g).float(), "bias": None,
        "n_group": groups, "topk_group": kept, "topk": k, "group_score": "max" if best else "top2_sum",
    }  # fmt: skip
    _, expected = ops.grouped_topk(**arguments)
    for run in RUNTIMES.values():
        found = run(op_model("grouped_topk", arguments), op_inputs("grouped_topk", arguments))
        np.testing.assert_array_equal(found["ids"], expected.numpy())


def test_sampling_draws_the_references_tokens() -> None:
    """400 draws from a flat distribution: the noise is the same to the last bit that decides."""
    n = 400
    arguments = {
        "logits": torch.zeros(n, 97), "seeds": torch.arange(n) * 7919 - 2**40, "positions": torch.arange(n, dtype=torch.int32),
        "temperature": torch.ones(n),
    }  # fmt: skip
    expected = ops.gumbel_argmax(**arguments).numpy()
    assert len(set(expected.tolist())) > 80
    for run in RUNTIMES.values():
        found = run(op_model("gumbel_argmax", arguments), op_inputs("gumbel_argmax", arguments))
        np.testing.assert_array_equal(found["ids"], expected)


def test_a_body_that_is_wrong_is_seen() -> None:
    """The comparison above has teeth: another eps, and a cache written at the wrong slot."""
    op, _, make = next(c for c in CASES if c[0] == "rms_norm")
    arguments = make()
    wrong = op_model(op, {**arguments, "eps": 0.1})
    with pytest.raises(AssertionError):
        check(run_onnxruntime(wrong, op_inputs(op, arguments)), op_outputs(op, arguments, ops.rms_norm(**arguments)), op)
    op, _, make = next(c for c in CASES if c[0] == "kv_cache_write")
    arguments = make()
    inputs = op_inputs(op, arguments)
    model, expected = op_model(op, arguments), op_outputs(op, arguments, ops.kv_cache_write(**arguments))
    with pytest.raises(AssertionError):
        check(run_reference(model, {**inputs, "slots": inputs["slots"][::-1].copy()}), expected, op)


def test_a_group_of_several_ranks_is_refused() -> None:
    with pytest.raises(UsageError, match="no collectives"):
        op_model("all_reduce", {"x": torch.zeros(2, 3), "group": object()})
