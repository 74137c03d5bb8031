"""The suite catches every seeded fault at size small, and lets right kernels pass."""

from __future__ import annotations

import pytest
import torch

from dsv3 import conformance, ops
from tests.conformance.mutants import Fault, every
from tests.support.faulty import Made

FAULTS = every()


def test_there_are_many_faults_over_all_operators() -> None:
    assert len(FAULTS) >= 300
    assert {f.op for f in FAULTS} == set(ops.names())
    assert len({(f.op, f.name) for f in FAULTS}) == len(FAULTS)


def _marked(fault: Fault) -> object:
    """The faults that were written to slip through are many: those are for the slow run."""
    slow = (pytest.mark.slow,) if ".unseen_" in fault.function.__module__ else ()
    return pytest.param(fault, marks=slow, id=f"{fault.op}: {fault.name}")


@pytest.mark.parametrize("fault", [_marked(f) for f in FAULTS])
def test_a_fault_is_caught(fault: Fault) -> None:
    torch.manual_seed(0)
    made = Made({fault.op: fault.function}, "mutant", **fault.claims)
    report = conformance.run(made, ops=[fault.op], size="quick", fail_fast=True)  # part of small, and most are caught by it
    if not report.failed:
        report = conformance.run(made, ops=[fault.op], size="small", fail_fast=True)
    assert report.failed, f"{fault.op}: {fault.name} was not caught"
    first = report.failed[0]
    assert first.message and first.margin > 1 and first.id in first.repeat
