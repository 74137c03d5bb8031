"""Test vectors in the layout of ONNX's backend tests, so that a vendor can test a kernel without Python or torch.

<folder>/<op>/<case>/model.onnx                     one node of domain ai.dsv3, and its body in standard operators
                    /budget.json                    what the comparers read: see `write_vector`
                    /test_data_set_0/input_<i>.pb   TensorProto, named as the model's inputs
                                    /output_<i>.pb  expected: float64 results as float32; integers and FP8 codes exactly
                                    /mag_<i>.pb     float32: how far each element may be off; none: exact
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dsv3.errors import UsageError
from dsv3.export.dtypes import to_numpy
from dsv3.export.flatten import op_inputs, output_names
from dsv3.export.opmodel import op_model
from dsv3.export.packages import onnx

DATA = "test_data_set_0"
# Operators that return (weights, ids) of the chosen experts in an order that nobody promises.
ANY_ORDER = ("grouped_topk", "route")


def write_vector(
    folder: Path,
    op: str,
    case: str,
    arguments: Mapping[str, Any],
    expected: Sequence[Tensor],
    tolerance: Sequence[Tensor | None],
    budget: Mapping[str, Any],
) -> Path:
    """Write one vector; returns its folder.

    arguments: what the operator gets, caches before the call. expected: its outputs, then the planes of its mutated caches,
    in the order of `flatten.output_names`, floats in float64. tolerance: in the same order, the largest absolute error of each
    element (infinity: anything goes, NaN too), or None for exact equality. budget: at least "nmse_cap" (a number, or None),
    which goes to budget.json with whatever else it holds (numerics, rule, seed); "op", "case", "order" and "outputs" are
    added. "order": "any" where rows of (weights, ids) are compared as sets. UsageError if the numbers do not fit.
    """
    names = output_names(op, arguments)
    if not len(expected) == len(tolerance) == len(names):
        raise UsageError(f"{op} {case}: {len(expected)} outputs and {len(tolerance)} tolerances; the model has {len(names)}")
    if "nmse_cap" not in budget:
        raise UsageError(f"{op} {case}: the budget has no 'nmse_cap' (a number, or None)")
    place = Path(folder) / op / case_folder(op, case)
    data = place / DATA
    data.mkdir(parents=True, exist_ok=True)
    (place / "model.onnx").write_bytes(op_model(op, arguments).SerializeToString())
    for i, (name, array) in enumerate(op_inputs(op, arguments).items()):
        _save(data / f"input_{i}.pb", name, array)
    for i, (name, tensor, allowed) in enumerate(zip(names, expected, tolerance, strict=True)):
        array = to_numpy(tensor)
        stored = array.astype(np.float32) if array.dtype.name in ("float64", "float32", "bfloat16", "float16") else array
        _save(data / f"output_{i}.pb", name, stored)
        if allowed is not None:
            _save(data / f"mag_{i}.pb", name, _widened(to_numpy(allowed), array, stored))
    order = "any" if op in ANY_ORDER else "fixed"
    written = {"op": op, "case": case, "order": order, "outputs": names, **budget}
    (place / "budget.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return place


def case_folder(op: str, case: str) -> str:
    """A case's id as one folder name: without the operator, and with - for what does not belong in a name."""
    return re.sub(r"[^\w.=+]+", "-", case.removeprefix(f"{op}/"))


def _widened(allowed: np.ndarray[Any, Any], exact: np.ndarray[Any, Any], stored: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The tolerance, plus what storing the expected value as float32 has lost, rounded up to float32."""
    with np.errstate(invalid="ignore", over="ignore"):
        lost = np.abs(exact.astype(np.float64) - stored.astype(np.float64))
        wide = allowed.astype(np.float64) + np.where(np.isfinite(lost), lost, 0.0)
        narrow = wide.astype(np.float32)
        return np.where(narrow < wide, np.nextafter(narrow, np.float32(np.inf)), narrow).astype(np.float32)


def _save(path: Path, name: str, array: np.ndarray[Any, Any]) -> None:
    path.write_bytes(onnx().numpy_helper.from_array(np.ascontiguousarray(array), name).SerializeToString())
