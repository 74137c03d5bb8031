"""The conformance suite on the CPU's kernels: every operator that the backend claims, and whole models."""

import pytest

from dsv3.conformance import run


def _passes(level, size, cases=None):
    report = run("cpu", level=level, size=size, cases=cases)
    failed = [f"{c.id} on {c.kernel}: {c.message}" for c in report.failed]
    assert not failed, "\n".join(failed[:20])
    return report


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_claimed_operators_pass():
    report = _passes("L1", "quick")
    passed = {c.kernel for c in report.cases if c.status == "passed"}
    claimed = {"cpu.fp8-w8a16", "cpu.int8-w8a16", "cpu.int4-w4a16", "cpu.int8-w8a8", "cpu.none", "cpu.flash", "cpu.chunks"}
    assert claimed <= passed


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_claimed_operators_pass_at_size_small():
    report = _passes("L1", "small")
    never = [note for note in report.info["notes"] if "cpu." in note and "needs feature" not in note]
    # No case of v1 has so many tokens for experts with rounded weights; test_products.py does.
    never = [note for note in never if "-many for fused_experts" not in note]
    assert not never, "every kernel that this processor has the instructions for has met a case"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_models_pass():
    assert [c for c in _passes("L2", "small").cases if c.status == "passed"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_serving_passes():
    assert [c for c in _passes("L3", "small").cases if c.status == "passed"]
