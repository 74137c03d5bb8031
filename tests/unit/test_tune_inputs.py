"""Inputs for tuning: the reference is right on every one of them, for every call that models make."""

from __future__ import annotations

import inspect

import pytest
import torch

from dsv3.budget import judge
from dsv3.budget.tensors import clone_cache, map_tensors
from dsv3.dispatch.site import Example
from dsv3.dispatch.tuning.inputs import Inputs
from dsv3.dispatch.tuning.plan import _distinct
from dsv3.loading import calls
from dsv3.ops import spec
from dsv3.plugin import KvDType, Quant


def _examples(model: str, quant: Quant, kv_dtype: KvDType) -> dict[str, Example]:
    """One call of each operator, those inside decompositions included."""
    _, sites = calls(model, backend="reference", dtype="bfloat16", quant=quant, kv_dtype=kv_dtype)
    return {
        inner.op: example for node, _ in _distinct(sites) for inner in node.walk() for example in inner.calls
        if inner.op != "linear" or example.slope["T"]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("quant", "kv_dtype"),
    [("none", "bfloat16"), ("fp8-w8a8", "fp8"), ("int8-w8a8", "float32"), ("int4-w4a16", "bfloat16")],
)
def test_the_reference_passes_on_the_inputs_of_every_operator(quant: Quant, kv_dtype: KvDType) -> None:
    examples = _examples("demo", quant, kv_dtype)
    assert {"mla_prolog", "mla_decode", "mla_prefill", "moe", "fused_experts", "grouped_linear", "gumbel_argmax"} <= set(
        examples
    )
    for op, example in examples.items():
        for tokens in (1, 5):
            arguments = Inputs(example, tokens).make()
            given = dict(arguments)
            if "cache" in given:
                given["cache"] = clone_cache(given["cache"])
            outputs = spec(op).reference(**given)
            after = given["cache"] if "cache" in spec(op).mutates else None
            verdict = judge(op, arguments, outputs, after=after)
            assert verdict.passed, f"{op} at {tokens} tokens: {verdict.message}"
            assert set(arguments) == set(spec(op).parameters)


def test_sizes_follow_the_number_of_tokens_and_dtypes_what_was_recorded() -> None:
    for op, example in _examples("demo", "none", "bfloat16").items():
        inputs = Inputs(example, 7)
        arguments = inputs.make()
        found = spec(op).bind(arguments)
        expected = example.dims(7)
        assert {name: found[name] for name in expected if name != "S"} == {n: s for n, s in expected.items() if n != "S"}, op
        for name, recorded in example.arguments[0].items():
            if isinstance(recorded, torch.Tensor):
                assert arguments[name].dtype == recorded.dtype, f"{op}.{name}"


def test_inputs_are_the_same_every_time() -> None:
    example = _examples("demo", "none", "bfloat16")["mla_decode"]
    one, two = Inputs(example, 3).make(), Inputs(example, 3).make()
    same: list[bool] = []
    for name in one:
        tensors: list[torch.Tensor] = []
        map_tensors(one[name], lambda t, kept=tensors: kept.append(t) or t)
        map_tensors(two[name], lambda t, kept=tensors: same.append(torch.equal(kept.pop(0), t)) or t)
    assert same and all(same)


def test_the_size_is_known_before_anything_is_made() -> None:
    for op, example in _examples("demo", "fp8-w8a8", "fp8").items():
        inputs = Inputs(example, 5)
        held: list[int] = []
        map_tensors(inputs.make(), lambda t, kept=held: kept.append(t.numel() * t.element_size()) or t)
        assert inputs.nbytes() >= sum(held) * 0.5, f"{op}: {inspect.cleandoc(str(held))}"
