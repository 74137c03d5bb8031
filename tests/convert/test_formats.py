"""Numbers: every conversion against formulas written down again in numpy, with ml_dtypes' rounding."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dsv3
from dsv3.checkpoint.convert.run import convert
from dsv3.checkpoint.convert.target import Target
from dsv3.quant.fp8 import dequantize_block
from tests.support.convert import expand, same, tensors


def linears(found: dict[str, np.ndarray], end: str) -> list[str]:
    return [name.removesuffix(end) for name in found if name.endswith(end)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 2300), st.integers(0, 2**32 - 1), st.sampled_from([1e-30, 1e-3, 1.0, 1e30, 3e35]))
def test_dequantised_fp8_is_the_formula_byte_for_byte(n: int, k: int, seed: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (n, k), dtype=np.uint8)
    codes[(codes & 0x7F) == 0x7F] ^= 1
    scale = (rng.uniform(0.5, 2, (-(-n // 128), -(-k // 128))) * size).astype(np.float32)
    real = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * expand(scale, codes.shape)
    given_codes = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    for dtype, wanted in ((torch.bfloat16, real.astype(ml_dtypes.bfloat16)), (torch.float32, real)):
        found = dequantize_block(given_codes, torch.from_numpy(scale), dtype)
        assert found.view(torch.uint8).numpy().tobytes() == wanted.tobytes()


def test_nan_codes_stay_nan() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(64, 1)
    found = dequantize_block(codes.view(torch.float8_e4m3fn), torch.ones(1, 2), torch.bfloat16)
    assert torch.equal(found.isnan(), (codes & 0x7F) == 0x7F)


def test_fp8_to_bf16_is_the_formula_and_leaves_nothing_stale(made: dict[str, Path], tmp_path: Path) -> None:
    convert(str(made["fp8"]), tmp_path / "out", Target("bf16"))
    before, after = tensors(made["fp8"]), tensors(tmp_path / "out")
    names = linears(before, "_scale_inv")
    assert names and after.keys() == {n for n in before if not n.endswith("_scale_inv")}
    for name, array in after.items():
        wanted = before[name]
        if name in names:
            real = wanted.astype(np.float32) * expand(before[name + "_scale_inv"], wanted.shape)
            wanted = real.astype(ml_dtypes.bfloat16)
        assert array.tobytes() == wanted.tobytes(), name
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert {p.name for p in (tmp_path / "out").glob("*.safetensors")} == {p.name for p in made["fp8"].glob("*.safetensors")}
    assert dsv3.load(str(tmp_path / "out")).logits([0, 5, 9]).isfinite().all()


@pytest.mark.parametrize("scale_fmt", ["float32", "ue8m0"])
def test_fp8_to_bf16_and_back_is_stable_from_the_second_step(made: dict[str, Path], tmp_path: Path, scale_fmt: str) -> None:
    folder, steps = made["bf16"], []
    for step, to in enumerate(("fp8", "bf16", "fp8", "bf16", "fp8")):
        convert(str(folder), tmp_path / f"{step}", Target(to, scale_fmt=scale_fmt if to == "fp8" else None))  # type: ignore[arg-type]
        folder = tmp_path / f"{step}"
        steps.append(tensors(folder))
    assert same(steps[2], steps[4]) and same(steps[1], steps[3])
    scales = [steps[0][name + "_scale_inv"] for name in linears(steps[0], "_scale_inv")]
    if scale_fmt == "ue8m0":
        assert all((np.frexp(s)[0] == 0.5).all() for s in scales)


def test_fp8_codes_are_the_nearest(made: dict[str, Path], tmp_path: Path) -> None:
    convert(str(made["bf16"]), tmp_path / "out", Target("fp8"))
    before, after = tensors(made["bf16"]), tensors(tmp_path / "out")
    for name in linears(after, "_scale_inv"):
        scale, real = after[name + "_scale_inv"], before[name].astype(np.float32)
        wanted = (real / expand(scale, real.shape)).astype(ml_dtypes.float8_e4m3fn)
        assert after[name].tobytes() == wanted.tobytes(), name
        padded = np.zeros([-(-n // 128) * 128 for n in real.shape], np.float32)
        padded[: real.shape[0], : real.shape[1]] = np.abs(real)
        amax = padded.reshape(scale.shape[0], 128, scale.shape[1], 128).max(axis=(1, 3))
        assert (scale == np.where(amax > 0, amax / np.float32(448), 1)).all()


def unpacked(words: np.ndarray, bits: int, k: int) -> np.ndarray:
    """compressed-tensors' packing undone: the first code in the lowest bits, offset by half the range."""
    shifts = np.arange(0, 32, bits)
    codes = (words.view(np.uint32)[..., None] >> shifts) & ((1 << bits) - 1)
    return codes.reshape(words.shape[0], -1)[:, :k].astype(np.int32) - (1 << (bits - 1))


@pytest.mark.parametrize("kind", ["int8", "int8-packed", "int4"])
def test_integer_codes_are_the_nearest_and_packed_as_they_say(made: dict[str, Path], tmp_path: Path, kind: str) -> None:
    target = Target("int4") if kind == "int4" else Target("int8", weight_only=kind == "int8-packed")
    convert(str(made["bf16"]), tmp_path / "out", target)
    before, after = tensors(made["bf16"]), tensors(tmp_path / "out")
    names = linears(after, "_scale")
    assert len(names) > 20 and not any("kv_b_proj" in name for name in names)
    for name in names:
        real, scale = before[name].astype(np.float32), after[name + "_scale"]
        if kind == "int8":
            codes = after[name].astype(np.int32)
        else:
            assert after[name + "_shape"].tolist() == list(real.shape)
            codes = unpacked(after[name + "_packed"], 4 if kind == "int4" else 8, real.shape[1])
        most = 7 if kind == "int4" else 127
        wide = np.repeat(scale, 128, axis=1)[:, : real.shape[1]] if kind == "int4" else scale
        assert (codes == np.rint(real / wide).clip(-most, most)).all(), name
        assert (np.abs(codes) <= most).all()


@pytest.mark.parametrize(("to", "quant"), [("int8", "int8-w8a8"), ("int4", "int4-w4a16")])
def test_a_quantised_checkpoint_is_what_converting_on_load_gives(
    made: dict[str, Path], tmp_path: Path, to: str, quant: str
) -> None:
    convert(str(made["bf16"]), tmp_path / "out", Target(to))  # type: ignore[arg-type]
    stored, loaded = dsv3.load(str(tmp_path / "out")), dsv3.load(str(made["bf16"]), quant=quant)  # type: ignore[arg-type]
    ids = [0, 5, 9, 33, 60]
    assert f"weights {quant}" in stored.placement().summary
    assert torch.equal(stored.logits(ids), loaded.logits(ids)) and torch.equal(stored.mtp_logits(ids), loaded.mtp_logits(ids))


def test_int8_weights_are_meant_for_what_config_says(made: dict[str, Path], tmp_path: Path) -> None:
    convert(str(made["bf16"]), tmp_path / "a8", Target("int8"))
    convert(str(made["bf16"]), tmp_path / "a16", Target("int8", weight_only=True))
    ids = [0, 5, 9]
    a8, a16 = dsv3.load(str(tmp_path / "a8"), quant="int8-w8a16"), dsv3.load(str(tmp_path / "a16"))
    assert "weights int8-w8a16" in a16.placement().summary
    assert torch.equal(a8.logits(ids), a16.logits(ids))


@pytest.mark.parametrize("to", ["bf16", "fp8", "int8"])
def test_from_int4_to_other_formats(made: dict[str, Path], tmp_path: Path, to: str) -> None:
    convert(str(made["bf16"]), tmp_path / "int4", Target("int4"))
    convert(str(tmp_path / "int4"), tmp_path / "out", Target(to))  # type: ignore[arg-type]
    before, after = tensors(tmp_path / "int4"), tensors(tmp_path / "out")
    name = linears(before, "_scale")[0]
    k = int(before[name + "_shape"][1])
    real = (unpacked(before[name + "_packed"], 4, k) * np.repeat(before[name + "_scale"], 128, 1)[:, :k]).astype(np.float32)
    codes = after[name].astype(np.float32)
    if to == "int8":
        codes = codes * after[name + "_scale"]
    elif to == "fp8":
        codes = codes * expand(after[name + "_scale_inv"], codes.shape)
    assert np.abs(codes - real).max() <= np.abs(real).max() / 14
    assert dsv3.load(str(tmp_path / "out")).logits([0, 5, 9]).isfinite().all()
