"""The conformance suite on emulated devices: every operator that the backends claim. A model on them is in test_demo."""

import pytest

from dsv3.conformance import run

pytest.importorskip("triton")

DEVICES = (("cuda", "sm_90"), ("cuda", "sm_80"), ("rocm", "gfx942"), ("rocm", "gfx950"))


def _passes(backend, arch, level, size, ops=None):
    report = run(backend, level=level, size=size, emulate=arch, ops=ops)
    failed = [f"{c.id} on {c.kernel}: {c.message}" for c in report.failed]
    assert not failed, "\n".join(failed[:20])
    passed = [c for c in report.cases if c.status == "passed"]
    margin = max(c.margin for c in passed)
    print(f"\n{backend} {arch}: {len(passed)} cases of {len({c.op for c in passed})} operators, worst margin {margin:.2f}")


@pytest.mark.emulated
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("backend, arch", DEVICES)
def test_all_claimed_operators_pass(backend, arch):
    _passes(backend, arch, "L1", "small")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_operators_of_three_families_pass_at_size_quick():
    """What CI has time for; ci/emulated.sh tries everything."""
    ops = ["rms_norm", "rope_cache_write", "block_scaled_mm"]
    _passes("rocm", "gfx942", "L1", "quick", ops)
