"""Compare a kernel's outputs with test vectors: `python -m dsv3.export.compare VECTORS OUTPUTS`.

VECTORS is what `dsv3 conformance export` wrote; OUTPUTS/<op>/<case>/output_<i>.pb are TensorProto files of the kernel's
results, in any floating-point type. This file needs numpy and onnx only and can be copied. Exit code: 0 all passed, 1 not,
2 usage.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def read(path: Path) -> Array:
    """A TensorProto file."""
    import onnx
    from onnx import numpy_helper

    return np.asarray(numpy_helper.to_array(onnx.load_tensor(str(path))))


def is_integer(array: Array) -> bool:
    return array.dtype.kind in "iub"


def cases(vectors: Path) -> Iterator[Path]:
    """The folders of all vectors."""
    yield from sorted(path.parent for path in vectors.glob("*/*/budget.json"))


def mistake(name: str, found: Array, expected: Array, allowed: Array | None, cap: float | None) -> tuple[str, float]:
    """What is wrong with one output ("" if nothing), and the largest error over what is allowed."""
    if found.shape != expected.shape:
        return f"{name}: shape {list(found.shape)}; expected {list(expected.shape)}", np.inf
    if is_integer(found) != is_integer(expected):
        return f"{name}: type {found.dtype}; expected {expected.dtype}", np.inf
    if is_integer(expected) and allowed is None:
        wrong, margin = found != expected, 0.0
    else:
        with np.errstate(all="ignore"):
            y, e = found.astype(np.float64), expected.astype(np.float64)
            limit = np.zeros_like(e) if allowed is None else allowed.astype(np.float64)
            same = (y == e) | (np.isnan(y) & np.isnan(e)) | np.isposinf(limit)
            error = np.where(same, 0.0, np.abs(y - e))
            wrong = ~same & ~(error <= limit)
            margin = float(np.max(np.where(error > 0, error / limit, 0.0), initial=0.0))
    if wrong.any():
        at = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
        share = "0" if allowed is None else f"{float(allowed[at]):.3g}"
        where = [int(i) for i in at]
        return f"{name}{where}: found {found[at]}, expected {expected[at]}, allowed error {share}", margin
    if allowed is not None and cap is not None and not is_integer(expected):
        counted = np.isfinite(limit) & np.isfinite(y) & np.isfinite(e)
        power = float(np.sum(e[counted] ** 2))
        nmse = float(np.sum((y[counted] - e[counted]) ** 2)) / power if power else 0.0
        if nmse > cap:
            return f"{name}: mean squared error over mean square {nmse:.3g}; allowed {cap:.3g}", margin
    return "", margin


def in_order(outputs: list[Array]) -> list[Array]:
    """(weights, ids) with each row by ascending id."""
    order = np.argsort(outputs[1], axis=-1, kind="stable")
    return [np.take_along_axis(a, order, axis=-1) for a in outputs]


def compare(vector: Path, outputs: Path) -> tuple[str, float]:
    """The first mistake of one case ("" if it passes), and its largest margin."""
    budget = json.loads((vector / "budget.json").read_text(encoding="utf-8"))
    data, names = vector / "test_data_set_0", budget["outputs"]
    missing = [i for i in range(len(names)) if not (outputs / f"output_{i}.pb").is_file()]
    if missing:
        return f"{outputs / f'output_{missing[0]}.pb'} is missing", np.inf
    found, expected = ([read(folder / f"output_{i}.pb") for i in range(len(names))] for folder in (outputs, data))
    mags = [data / f"mag_{i}.pb" for i in range(len(names))]
    allowed = [read(path) if path.is_file() else None for path in mags]
    if budget["order"] == "any" and all(a.shape == b.shape for a, b in zip(found, expected, strict=True)):
        if allowed[0] is not None:
            allowed[0] = in_order([allowed[0], expected[1]])[0]
        found, expected = in_order(found), in_order(expected)
    largest = 0.0
    for name, y, e, limit in zip(names, found, expected, allowed, strict=True):
        text, margin = mistake(name, y, e, limit, budget.get("nmse_cap"))
        largest = max(largest, margin)
        if text:
            return text, largest
    return "", largest


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print("usage: python -m dsv3.export.compare VECTORS OUTPUTS", file=sys.stderr)
        return 2
    vectors, outputs = map(Path, arguments)
    failed, count = 0, 0
    for vector in cases(vectors):
        text, margin = compare(vector, outputs / vector.relative_to(vectors))
        count += 1
        failed += bool(text)
        print(f"{'FAIL' if text else 'ok':4}  {vector.relative_to(vectors)}  margin {margin:.3f}  {text}".rstrip())
    if not count:
        print(f"{vectors} holds no vectors (no */*/budget.json)", file=sys.stderr)
        return 2
    print(f"{count - failed} of {count} passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
