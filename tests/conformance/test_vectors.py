"""Exported vectors: written, run by stock runtimes, compared; and what the comparer does with a wrong output."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from dsv3.conformance.export import PER_OPERATOR, export_vectors
from dsv3.errors import UsageError
from dsv3.export.compare import compare
from dsv3.export.run_vectors import run_vectors
from dsv3.ops import names

FEW = ["silu_mul", "act_quant", "grouped_topk", "kv_cache_write", "mla_decode", "rms_norm_quant"]


def _mistakes(vectors: Path, outputs: Path) -> list[str]:
    found = [
        (v, compare(v, outputs / v.parent.name / v.name)[0]) for v in sorted(p.parent for p in vectors.glob("*/*/budget.json"))
    ]
    assert found
    return [f"{v}: {text}" for v, text in found if text]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vectors") / "out"
    assert all(export_vectors(folder, ops=FEW).values())
    return folder


@pytest.mark.parametrize("runtime", ["onnxruntime", "reference"])
def test_stock_runtimes_pass_them(few: Path, tmp_path: Path, runtime: str) -> None:
    run_vectors(few, tmp_path, runtime)
    assert not _mistakes(few, tmp_path)


def test_a_wrong_output_is_found(few: Path, tmp_path: Path) -> None:
    run_vectors(few, tmp_path, "onnxruntime")
    vector = next(few.glob("silu_mul/t5-i100-normal-f32"))
    path = tmp_path / "silu_mul" / vector.name / "output_0.pb"
    tensor = onnx.load_tensor(path)
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[2, 7] *= np.float32(1.0001)
    path.write_bytes(onnx.numpy_helper.from_array(values, tensor.name).SerializeToString())
    text, margin = compare(vector, path.parent)
    assert "y[2, 7]" in text and margin > 1


def test_an_operators_vectors_stay_small(few: Path) -> None:
    for op in FEW:
        assert sum(f.stat().st_size for f in (few / op).rglob("*") if f.is_file()) <= PER_OPERATOR


def test_a_folder_in_use_is_refused(few: Path) -> None:
    with pytest.raises(UsageError, match="not empty"):
        export_vectors(few, ops=["silu_mul"])


@pytest.mark.slow
def test_all_operators_pass_under_both_runtimes(tmp_path: Path) -> None:
    counts = export_vectors(tmp_path / "vectors", size="quick")
    assert set(counts) == set(names()) and all(counts.values())
    for runtime in ("onnxruntime", "reference"):
        run_vectors(tmp_path / "vectors", tmp_path / runtime, runtime)
        assert not _mistakes(tmp_path / "vectors", tmp_path / runtime)
    print(f"{sum(counts.values())} vectors over {len(counts)} operators pass under ONNX Runtime and onnx.reference")
