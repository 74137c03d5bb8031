"""The conformance suite on emulated NPUs: every operator that the backend claims, and whole models."""

import pytest

from dsv3.conformance import run
from dsv3.conformance.report.profiles import passed


def _passes(arch, level, size, cases=None):
    report = run("ascend", level=level, size=size, emulate=arch, cases=cases)
    failed = [f"{c.id} on {c.kernel}: {c.message}" for c in report.failed]
    assert not failed, "\n".join(failed[:20])
    return report


def test_all_claimed_operators_pass():
    report = _passes("910b", "L1", "quick")
    assert passed(report) == ["core", "int8"]
    exact = [c for c in report.cases if c.op in ("quant_int8", "int8_scaled_mm") and c.status == "passed"]
    assert len(exact) >= 15


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_claimed_operators_pass_at_size_small():
    report = _passes("910b", "L1", "small")
    assert passed(report) == ["core", "int8"]
    never = [note.split()[1:4:2] for note in report.info["notes"]]
    assert never == [["ascend.npu", "bmm"]], "only the transposing bmm has to wait for a case of size full"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_transposing_bmm_passes_at_the_models_own_sizes():
    report = _passes("910b", "L1", "full", "bmm/*-a128-c512/*")
    assert [c for c in report.cases if c.kernel == "ascend.npu" and c.status == "passed"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("formats", ["bf16-int8", "f32-int8", "bf16"])
def test_a_whole_model_passes(formats):
    report = _passes("910b", "L2", "small", f"l2/{formats}/*")
    assert len(report.cases) == 8 and all(c.status == "passed" for c in report.cases)


def test_a_cache_in_fp8_is_absent_not_failed():
    report = _passes("910b", "L2", "small", "l2/f32-kv8/prefill")
    assert [c.status for c in report.cases] == ["absent"] and "FP8" in report.cases[0].message
