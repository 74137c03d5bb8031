"""The conformance suite on the CPU's kernels: every operator that the backend claims, and whole models."""

import pytest

from dsv3.conformance import run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def report():
    """Of all levels up to L3, at size small."""
    return run("cpu", level="L3", size="small")


def _passed(report, level):
    cases = [case for case in report.cases if case.level == level]
    failed = [f"{c.id} on {c.kernel}: {c.message}" for c in cases if c in report.failed]
    assert not failed, "\n".join(failed[:20])
    return [case for case in cases if case.status == "passed"]


def test_all_claimed_operators_pass(report):
    claimed = {"cpu.fp8-w8a16", "cpu.int8-w8a16", "cpu.int4-w4a16", "cpu.int8-w8a8", "cpu.none", "cpu.flash", "cpu.chunks"}
    assert claimed <= {case.kernel for case in _passed(report, "L1")}


def test_every_kernel_that_this_processor_has_the_instructions_for_has_met_a_case(report):
    never = [note for note in report.info["notes"] if "cpu." in note and "needs feature" not in note]
    # No case of v1 has so many tokens for experts with rounded weights; test_products.py does.
    assert not [note for note in never if "for fused_experts" not in note]


def test_models_pass(report):
    assert _passed(report, "L2")


def test_serving_passes(report):
    assert _passed(report, "L3")
