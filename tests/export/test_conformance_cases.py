"""The conformance suite's own cases through the ONNX bodies, judged by the suite's own budgets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dsv3 import ops
from dsv3.budget import judge
from dsv3.conformance.case import Case, Setting
from dsv3.conformance.cases import cases_of
from dsv3.plugin import LatentCache

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from dsv3.export.dtypes import bits_dtype
from dsv3.export.flatten import op_inputs
from dsv3.export.opmodel import op_model
from dsv3.export.runtime import RUNTIMES

PER_OPERATOR = 3


def _chosen(size: Any, per_operator: int | None) -> list[Case]:
    """Some cases of each operator, evenly from first to last, or all."""
    found = []
    for op in ops.names():
        cases = cases_of(size, [op])
        step = 1 if per_operator is None else max(1, len(cases) // per_operator)
        found += cases[::step]
    return found


def _tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    bits = bits_dtype(array.dtype.name)
    plain = np.ascontiguousarray(array if bits is None else array.view(bits)).copy()
    tensor = torch.from_numpy(plain)
    return tensor if bits is None else tensor.view(getattr(torch, array.dtype.name))


def _verdicts(case: Case, page_size: int) -> None:
    known = ops.spec(case.op)
    arguments = {**known.defaults, **case.arguments(0, Setting(page_size))}
    model, inputs = op_model(case.op, arguments), op_inputs(case.op, arguments)
    for name, run in RUNTIMES.items():
        made = [_tensor(array) for array in run(model, inputs).values()]
        count = len(known.line.outputs)
        after = LatentCache(*made[count:]) if known.mutates else None
        outputs = None if not count else made[0] if count == 1 else tuple(made[:count])
        verdict = judge(case.op, arguments, outputs, after=after)
        assert verdict.passed, f"{case.id} under {name}: {verdict.message}"


@pytest.mark.parametrize("case", _chosen("quick", PER_OPERATOR), ids=lambda c: c.id)
def test_bodies_are_within_the_suites_budgets(case: Case) -> None:
    _verdicts(case, page_size=16)


@pytest.mark.slow
@pytest.mark.parametrize("op", ops.names())
def test_bodies_pass_every_case_of_size_small(op: str) -> None:
    for case in cases_of("small", [op]):
        _verdicts(case, page_size=64)
