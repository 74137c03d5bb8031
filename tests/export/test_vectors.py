"""Vectors written, run by stock runtimes, and judged by both comparers: the chain that a vendor goes through."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsv3 import ops
from dsv3.errors import UsageError
from dsv3.plugin import LatentCache, Prepared
from dsv3.resources import resources
from tests.export.cases import CASES

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from dsv3.export import compare as comparer  # noqa: E402
from dsv3.export import run_vectors as runner  # noqa: E402
from dsv3.export.flatten import output_names, output_tensors  # noqa: E402
from dsv3.export.vectors import write_vector  # noqa: E402

GXX = shutil.which("g++")


def _float64(value: Any) -> Any:
    """Activations and caches in float64; weights as they are, so that they are dequantised in float64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.dtype in (torch.float32, torch.bfloat16) else value.clone()
    if isinstance(value, LatentCache):
        return LatentCache(*(_float64(t) for t in (value.ckv, value.kpe, value.scale)))
    if isinstance(value, Prepared):
        return Prepared(value.layout, value.quant, value.shape, _float64(value.tensors), value.scale_fmt)
    return {k: _float64(v) for k, v in value.items()} if isinstance(value, dict) else value


def _write(folder: Path, op: str, case: str, make: Callable[[], dict[str, Any]]) -> Path:
    arguments = {**ops.spec(op).defaults, **make()}
    exact = _float64(arguments)
    if "out_dtype" in exact:
        exact["out_dtype"] = "float64"
    if op == "dequant_block":
        exact["dtype"] = "float64"
    found = output_tensors(op, exact, ops.spec(op).reference(**exact))
    tolerances: list[torch.Tensor | None] = []
    for tensor in found.values():
        real = tensor.dtype in (torch.float64, torch.float32)
        tolerances.append((tensor.abs() * 2**-8 + tensor.abs().nan_to_num(0, 0, 0).amax() * 1e-5) if real else None)
    return write_vector(folder, op, f"{op}/{case}", arguments, list(found.values()), tolerances, {"nmse_cap": 2e-5, "seed": 7})


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One float32 or bf16 case of every operator."""
    folder = tmp_path_factory.mktemp("vectors")
    seen: set[str] = set()
    for op, name, make in CASES:
        # Codes behind a norm or an activation may flip with its last bit; the case for exact codes is act_quant's.
        if op not in seen and op not in ("rms_norm_quant", "silu_mul_quant"):
            seen.add(op)
            _write(folder, op, name, make)
    return folder


@pytest.fixture(scope="module")
def outputs(vectors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    assert runner.run_vectors(vectors, folder, "onnxruntime") == len(list(comparer.cases(vectors)))
    return folder


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if GXX is None:
        pytest.skip("no g++ on this machine: the C++ comparer is not compiled")
    path = tmp_path_factory.mktemp("bin") / "compare"
    source = resources("configs", "conformance", "compare.cpp")
    subprocess.run([GXX, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", str(source), "-o", str(path)], check=True)
    return path


def _python(vectors: Path, outputs: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dsv3.export.compare", str(vectors), str(outputs)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _cpp(binary: Path, vectors: Path, outputs: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(binary), str(vectors), str(outputs)], capture_output=True, text=True, check=False)


def test_the_layout_is_that_of_onnx_backend_tests(vectors: Path) -> None:
    place = vectors / "rms_norm" / "float32"
    model = onnx.load(str(place / "model.onnx"))
    tensors = [onnx.load_tensor(str(place / "test_data_set_0" / f"input_{i}.pb")) for i in range(len(model.graph.input))]
    assert [t.name for t in tensors] == [i.name for i in model.graph.input] == ["x", "weight"]
    out = onnx.load_tensor(str(place / "test_data_set_0" / "output_0.pb"))
    assert (out.name, out.data_type) == ("y", onnx.TensorProto.FLOAT)
    budget = json.loads((place / "budget.json").read_text())
    assert budget == {
        "op": "rms_norm",
        "case": "rms_norm/float32",
        "order": "fixed",
        "outputs": ["y"],
        "nmse_cap": 2e-5,
        "seed": 7,
    }


def test_vectors_are_small(vectors: Path) -> None:
    for folder in vectors.iterdir():
        assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 4 << 20, folder.name


@pytest.mark.parametrize("runtime", ["onnxruntime", "reference"])
def test_the_bodies_pass_both_comparers(runtime: str, vectors: Path, binary: Path, tmp_path: Path) -> None:
    assert runner.main([str(vectors), str(tmp_path), "--runtime", runtime]) == 0
    for result in (_python(vectors, tmp_path), _cpp(binary, vectors, tmp_path)):
        assert result.returncode == 0, result.stdout + result.stderr
        assert result.stdout.splitlines()[-1] == "32 of 32 passed"


def _damage(array: np.ndarray[Any, Any], allowed: np.ndarray[Any, Any] | None) -> np.ndarray[Any, Any]:
    """The last finite element off by a little more than allowed; a code by its last bit."""
    wrong = array.copy()
    flat = wrong.reshape(-1)
    if array.dtype.kind in "iu":
        flat[-1] += 1
    elif allowed is None:
        flat.view(np.uint8)[-1] ^= 1
    else:
        at = np.flatnonzero(np.isfinite(flat))[-1]
        flat[at] += 1.5 * float(allowed.reshape(-1)[at])
    return wrong


@pytest.mark.parametrize("op", ["rms_norm", "moe_permute", "mla_decode", "kv_cache_write", "grouped_topk", "fn_to_fnuz"])
def test_both_comparers_see_one_wrong_element(op: str, vectors: Path, outputs: Path, binary: Path, tmp_path: Path) -> None:
    (case,) = (vectors / op).iterdir()
    only = shutil.copytree(vectors / op, tmp_path / "vectors" / op).parent
    shutil.copytree(outputs / op, tmp_path / "outputs" / op)
    assert _python(only, tmp_path / "outputs").returncode == _cpp(binary, only, tmp_path / "outputs").returncode == 0
    for i in range(len(list((case / "test_data_set_0").glob("output_*.pb")))):
        file = tmp_path / "outputs" / op / case.name / f"output_{i}.pb"
        good = file.read_bytes()
        mag = case / "test_data_set_0" / f"mag_{i}.pb"
        array = _damage(comparer.read(file), comparer.read(mag) if mag.exists() else None)
        file.write_bytes(onnx.numpy_helper.from_array(array).SerializeToString())
        for result in (_python(only, tmp_path / "outputs"), _cpp(binary, only, tmp_path / "outputs")):
            assert result.returncode == 1 and "FAIL" in result.stdout, result.stdout
        file.write_bytes(good)


def test_an_order_that_nobody_promises_is_no_mistake(vectors: Path, outputs: Path, binary: Path, tmp_path: Path) -> None:
    only = shutil.copytree(vectors / "route", tmp_path / "vectors" / "route").parent
    (place,) = shutil.copytree(outputs / "route", tmp_path / "outputs" / "route").iterdir()
    for i in (0, 1):
        array = comparer.read(place / f"output_{i}.pb")[:, ::-1].copy()
        (place / f"output_{i}.pb").write_bytes(onnx.numpy_helper.from_array(array).SerializeToString())
    assert _python(only, tmp_path / "outputs").returncode == _cpp(binary, only, tmp_path / "outputs").returncode == 0
    weights = comparer.read(place / "output_0.pb")[:, ::-1].copy()  # no longer those of the ids beside them
    (place / "output_0.pb").write_bytes(onnx.numpy_helper.from_array(weights).SerializeToString())
    assert _python(only, tmp_path / "outputs").returncode == _cpp(binary, only, tmp_path / "outputs").returncode == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "float8_e5m2"])
def test_results_may_come_in_any_floating_type_raw_or_typed(dtype: str, binary: Path, tmp_path: Path) -> None:
    """Values that every type holds, infinities, -0, anything where that is allowed; typed fields as well as raw data."""
    import ml_dtypes

    values = torch.tensor([0.5, -1.5, 0.0, float("-inf"), float("nan"), 2.0**-14, 7.0], dtype=torch.float64)
    limits = torch.zeros(7).index_fill_(0, torch.tensor(6), torch.inf)
    place = write_vector(
        tmp_path / "v",
        "all_reduce",
        "types",
        {"x": torch.zeros(1, 7), "group": None},
        [values[None]],
        [limits[None]],
        {"nmse_cap": None},
    )
    out = tmp_path / "o" / "all_reduce" / "types"
    out.mkdir(parents=True)
    kind = np.dtype(getattr(ml_dtypes, dtype) if dtype not in ("float16", "float64") else dtype)
    array = values.numpy()[None].copy()
    array[0, 2], array[0, 6] = -0.0, np.nan
    array = array.astype(kind)
    raw = onnx.numpy_helper.from_array(array)
    typed = onnx.TensorProto(dims=raw.dims, data_type=raw.data_type)
    if dtype == "float64":
        typed.double_data.extend(array.reshape(-1).tolist())
    else:
        typed.int32_data.extend(array.reshape(-1).view(f"uint{8 * array.itemsize}").tolist())
    for tensor in (raw, typed):
        (out / "output_0.pb").write_bytes(tensor.SerializeToString())
        for result in (_python(tmp_path / "v", tmp_path / "o"), _cpp(binary, tmp_path / "v", tmp_path / "o")):
            assert result.returncode == 0, result.stdout + result.stderr
    assert place.name == "types"


def test_a_small_error_everywhere_breaks_the_cap(binary: Path, tmp_path: Path) -> None:
    """Each element within its tolerance, all of them at its edge."""
    values = torch.ones(1, 50, dtype=torch.float64)
    arguments = {"x": values.float(), "group": None}
    write_vector(tmp_path / "v", "all_reduce", "cap", arguments, [values], [values * 0.01], {"nmse_cap": 2e-5})
    out = tmp_path / "o" / "all_reduce" / "cap"
    out.mkdir(parents=True)
    array = (values * 1.009).float().numpy()
    (out / "output_0.pb").write_bytes(onnx.numpy_helper.from_array(array).SerializeToString())
    for result in (_python(tmp_path / "v", tmp_path / "o"), _cpp(binary, tmp_path / "v", tmp_path / "o")):
        assert result.returncode == 1 and "mean squared error" in result.stdout


def test_codes_may_have_a_tolerance_too(binary: Path, tmp_path: Path) -> None:
    """Where a scale is no power of two, x / scale and x * (1 / scale) may round to neighbouring codes."""
    arguments = {"x": torch.tensor([[127.0, 1.5, -3.0]]), "amax_floor": 1e-10}
    q, scale = ops.quant_int8(**arguments)
    limits = [torch.tensor([[0.0, 1.0, 0.0]]), torch.zeros(1, 1)]
    place = write_vector(tmp_path / "v", "quant_int8", "near", arguments, [q, scale.double()], limits, {"nmse_cap": 2e-5})
    out = tmp_path / "o" / "quant_int8" / "near"
    out.mkdir(parents=True)
    shutil.copy(place / "test_data_set_0" / "output_1.pb", out)
    for step, code in (([0, 1, 0], 0), ([0, -1, 0], 0), ([0, 2, 0], 1), ([0, 0, 1], 1)):
        array = (q.numpy() + np.array([step])).astype(np.int8)
        (out / "output_0.pb").write_bytes(onnx.numpy_helper.from_array(array).SerializeToString())
        for result in (_python(tmp_path / "v", tmp_path / "o"), _cpp(binary, tmp_path / "v", tmp_path / "o")):
            assert result.returncode == code, (step, result.stdout)


def test_missing_outputs_and_empty_folders_are_said(vectors: Path, binary: Path, tmp_path: Path) -> None:
    for result in (_python(vectors, tmp_path), _cpp(binary, vectors, tmp_path)):
        assert result.returncode == 1 and "is missing" in result.stdout and "0 of 32 passed" in result.stdout
    for result in (_python(tmp_path, tmp_path), _cpp(binary, tmp_path, tmp_path)):
        assert result.returncode == 2 and "holds no vectors" in result.stderr
    with pytest.raises(UsageError, match="holds no vectors"):
        runner.run_vectors(tmp_path, tmp_path, "reference")
    with pytest.raises(UsageError, match="did you mean 'onnxruntime'"):
        runner.run_vectors(vectors, tmp_path, "onnxruntim")


def test_the_comparer_needs_numpy_and_onnx_only(tmp_path: Path) -> None:
    """A copy of the file alone, in a process that never sees torch or dsv3."""
    alone = shutil.copy(comparer.__file__, tmp_path / "compare.py")
    text = "import sys; sys.path.insert(0, sys.argv[1]); import compare; sys.exit(bool({'torch', 'dsv3'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", text, str(Path(alone).parent)], check=False).returncode == 0
    assert len(Path(alone).read_text().splitlines()) < 150


def test_numbers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    x = torch.ones(1, 4)
    with pytest.raises(UsageError, match="2 outputs and 1 tolerances; the model has 1"):
        write_vector(tmp_path, "all_reduce", "c", {"x": x, "group": None}, [x, x], [None], {"nmse_cap": None})
    with pytest.raises(UsageError, match="nmse_cap"):
        write_vector(tmp_path, "all_reduce", "c", {"x": x, "group": None}, [x], [None], {})


def test_names_of_outputs_never_hide_inputs() -> None:
    for op, _, make in CASES:
        arguments = {**ops.spec(op).defaults, **make()}
        names = output_names(op, arguments)
        assert len(set(names)) == len(names) and not set(names) & set(arguments), op
