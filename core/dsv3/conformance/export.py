"""Cases as ONNX test vectors, for vendors without Python or torch."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from dsv3.budget import expect, rule
from dsv3.budget.elementwise import elementwise
from dsv3.conformance.case import Case, Setting
from dsv3.conformance.cases import cases_of
from dsv3.conformance.result import Size
from dsv3.errors import UsageError
from dsv3.export.vectors import write_vector
from dsv3.ops import spec

_LARGEST = 300_000  # elements of all inputs of a vector
PER_OPERATOR = 4 << 20  # bytes


def export_vectors(
    folder: str | Path,
    *,
    ops: Sequence[str] | None = None,
    seed: int = 0,
    size: Size = "quick",
    numerics: str = "f32",
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, int]:
    """Write the cases of a size as vectors; returns how many per operator.

    folder: must not exist, or be empty; it appears when everything is written. An operator's vectors stay under 4 MB: the
    smaller cases come first, and what does not fit is left out. UsageError for a folder that is in use.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} exists and is not empty; name a folder that does not exist")
    for op in ops or ():
        spec(op)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        counts = _write(aside, ops, seed, size, numerics, progress)
        if target.exists():
            target.rmdir()
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return counts


def _write(
    aside: Path,
    ops: Sequence[str] | None,
    seed: int,
    size: Size,
    numerics: str,
    progress: Callable[[int, int, str], None] | None,
) -> dict[str, int]:
    cases = cases_of(size, ops)
    left = {c.op: PER_OPERATOR for c in cases}
    counts = dict.fromkeys(left, 0)
    for done, case in enumerate(cases):
        if progress:
            progress(done, len(cases), case.id)
        if case.relation or left[case.op] <= 0:
            continue
        place = _vector(aside, case, seed, numerics)
        if place is None:
            continue
        taken = sum(f.stat().st_size for f in place.rglob("*") if f.is_file())
        if taken > left[case.op]:
            shutil.rmtree(place)
            continue
        left[case.op] -= taken
        counts[case.op] += 1
    return counts


def _vector(aside: Path, case: Case, seed: int, numerics: str) -> Path | None:
    arguments = {**spec(case.op).defaults, **case.arguments(seed, Setting())}
    dims = spec(case.op).bind(arguments)
    if dims.get("T", dims.get("M", 1)) == 0 or sum(_sizes(arguments)) > _LARGEST:
        return None  # ONNX runtimes differ on empty tensors; they are in the suite itself
    pairs, cap = elementwise(case.op, arguments, expect(case.op, arguments, numerics))
    budget = {"nmse_cap": cap, "numerics": numerics, "rule": rule(case.op), "id": case.id, "seed": seed}
    return write_vector(aside, case.op, case.id, arguments, [v for v, _ in pairs], [t for _, t in pairs], budget)


def _sizes(arguments: dict[str, object]) -> list[int]:
    from dsv3.budget.tensors import map_tensors

    found: list[int] = []
    map_tensors(arguments, lambda t: found.append(t.numel()) or t)  # type: ignore[func-returns-value]
    return found
