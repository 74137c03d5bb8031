"""Levels 2 and 3: models on a backend, and what is wrong with those that are nearly right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3 import conformance, ops
from dsv3.plugin import CacheSpec, Device, KvDType
from tests.support.faulty import Made


@pytest.mark.parametrize("page_size", [1, *(pytest.param(s, marks=pytest.mark.slow) for s in (16, 100))])
def test_right_kernels_pass_with_any_page_size(page_size: int) -> None:
    class Paged(Made):
        def cache_spec(self, device: Device, kv_dtype: KvDType) -> CacheSpec:
            return CacheSpec(page_size, kv_dtype)

    report = conformance.run(Paged({op: ops.spec(op).reference for op in ("mla_decode", "kv_cache_write", "kv_cache_gather")}),
                             level="L3", size="quick", cases="l[23]/f32/*")  # fmt: skip
    assert not report.failed, report.failed[0]
    assert {c.level for c in report.cases if c.status == "passed"} == {"L2", "L3"}


def test_an_fp8_cache_comes_in_the_encoding_of_the_backend() -> None:
    """In the arguments of operators and in models, poisoned with that encoding's NaN."""
    seen: set[torch.dtype] = set()

    def watched(op: str) -> Any:
        def call(**arguments: Any) -> Any:
            seen.add(arguments["cache"].ckv.dtype)
            return getattr(ops, op)(**arguments)

        return call

    class Fnuz(Made):
        def cache_spec(self, device: Device, kv_dtype: KvDType) -> CacheSpec:
            return CacheSpec(64, kv_dtype, "float8_e4m3fnuz")

    backend = Fnuz({op: watched(op) for op in ("mla_decode", "kv_cache_write", "kv_cache_gather")})
    for level, cases, size in (("L1", "*/fp8/*", "quick"), ("L3", "l3/f32-kv8/nan-tail", "small")):
        report = conformance.run(backend, level=level, size=size, cases=cases)  # type: ignore[arg-type]
        assert not report.failed and any(c.status == "passed" for c in report.cases), report.failed
        assert seen == {torch.float8_e4m3fnuz}


def test_a_backend_without_kernels_proves_nothing() -> None:
    class Empty(Made):
        def kernels(self, device: Device) -> list[Any]:
            return []

    report = conformance.run(Empty(), level="L2", size="quick", cases="l2/f32/prefill")
    assert [c.status for c in report.cases] == ["absent"]


def broken_decode(**a: Any) -> tuple[Tensor, Tensor]:
    o, lse = ops.mla_decode(**a)
    return o * 1.01, lse


def broken_in_batches(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = ops.rms_norm(x, weight, eps)
    return torch.where(torch.arange(x.shape[0])[:, None] == 3, y.roll(1, 1), y)


_calls = [0]


def unsteady(x: Tensor) -> Tensor:
    _calls[0] += 1
    return ops.silu_mul(x) * (1 + 2.0**-22 * (_calls[0] % 7 == 0))


@pytest.mark.parametrize(
    ("functions", "case"),
    [
        ({"mla_decode": broken_decode}, "l2/f32/decode"),
        ({"mla_decode": broken_decode}, "l2/f32/absorbed"),
        ({"rms_norm": broken_in_batches}, "l2/f32/prefill"),
        ({"silu_mul": unsteady}, "l3/f32/determinism"),
    ],
)
def test_a_fault_in_a_model_is_caught(functions: dict[str, Any], case: str) -> None:
    report = conformance.run(Made(functions), level="L3", size="quick", cases=case)
    assert [c.status for c in report.cases] == ["failed"], report.cases


def test_reading_unwritten_cache_is_caught() -> None:
    def careless(**a: Any) -> tuple[Tensor, Tensor]:
        o, lse = ops.mla_decode(**a)
        return o + 0 * a["cache"].ckv.float().sum().to(o.dtype), lse

    report = conformance.run(Made({"mla_decode": careless}), level="L3", size="quick", cases="l3/f32/nan-tail")
    assert [c.status for c in report.cases] == ["failed"]


def test_claims_of_batch_invariance_are_held_to() -> None:
    right = conformance.run(Made({"silu_mul": ops.silu_mul}, batch_invariant=True), level="L3", size="quick",
                            cases="l3/f32/batch-invariance")  # fmt: skip
    assert right.cases[0].status == "absent" and "not claimed by the kernels for" in right.cases[0].message


def test_what_every_step_leaves_behind_is_seen() -> None:
    kept: list[Tensor] = []

    def leaking(x: Tensor) -> Tensor:
        y = ops.silu_mul(x)
        kept.append(y.clone())
        return y

    report = conformance.run(Made({"silu_mul": leaking}), level="L3", size="quick", cases="l3/f32/memory")
    assert [c.status for c in report.cases] == ["failed"]
    assert "left" in report.cases[0].message
