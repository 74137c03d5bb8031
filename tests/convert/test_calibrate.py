"""Calibration: the sweep is the model, migration leaves it as it is, compensation loses less than plain rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dsv3
from dsv3.checkpoint.calibrate.compensate import compensated, hessian, inverse_factor
from dsv3.checkpoint.calibrate.migrate import Migrate, exponents
from dsv3.checkpoint.calibrate.source import Source
from dsv3.checkpoint.calibrate.sweep import Sweep
from dsv3.checkpoint.calibrate.visitor import Visitor
from dsv3.checkpoint.calibrate.windows import read_windows
from dsv3.checkpoint.convert.run import convert
from dsv3.checkpoint.convert.target import Target
from dsv3.checkpoint.folder import folder_config
from dsv3.checkpoint.layout import open_checkpoint
from dsv3.checkpoint.reader import Reader
from dsv3.checkpoint.validate import plan_load
from dsv3.errors import UsageError
from dsv3.quant.int4 import dequantize_group, quantize_group
from tests.support.checkpoints import TINY, random_tensors, write_hf
from tests.support.outliers import fold

V2 = {**TINY, "model_type": "deepseek_v2", "topk_method": "greedy", "scoring_func": "softmax", "q_lora_rank": None,
      "num_nextn_predict_layers": 0, "norm_topk_prob": False, "routed_scaling_factor": 1.0}  # fmt: skip


def windows(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 64, (count, width), generator=torch.Generator().manual_seed(seed))


def sweep_over(folder: Path, ids: torch.Tensor, visitor: Visitor) -> Sweep:
    config = folder_config(folder)
    source = Source(config, plan_load(config, open_checkpoint(folder), folder), Reader())
    if isinstance(visitor, Migrate):
        visitor._real = source.real
    return Sweep(config, source, ids, visitor)


@pytest.mark.parametrize("config", [TINY, V2], ids=["v3", "v2"])
def test_the_sweep_is_the_model(tmp_path: Path, config: dict[str, object]) -> None:
    folder = write_hf(tmp_path / "tiny", config, random_tensors(config))
    ids = windows(3, 40)
    sweep = sweep_over(folder, ids, Visitor())
    model, state = dsv3.load(str(folder), dtype="float32"), sweep.start()
    head = sweep.source.real("lm_head.weight")
    while state.layer < sweep.layers:
        state = sweep.advance(state)
        if state.layer == sweep.config.num_hidden_layers:
            for row, hidden in zip(ids, state.hidden, strict=True):
                torch.testing.assert_close(hidden @ head.T, model.logits(row), rtol=1e-4, atol=1e-5)
    if config is TINY:
        assert sweep.layers == 3
        for row, hidden in zip(ids, state.hidden, strict=True):
            torch.testing.assert_close(hidden @ head.T, model.mtp_logits(row), rtol=1e-4, atol=1e-5)


def test_shifted_weights_are_the_same_model(tmp_path: Path) -> None:
    folder = fold(write_hf(tmp_path / "tiny", TINY, random_tensors(TINY)), tmp_path / "folded")
    visitor = Migrate(lambda name: torch.empty(0))
    sweep = sweep_over(folder, windows(4, 48), visitor)
    state = sweep.start()
    while state.layer < sweep.layers:
        state = sweep.advance(state)
    shifts = visitor.shifts
    kinds = ("input_layernorm", "q_a_layernorm", "post_attention_layernorm", "up_proj", "down_proj", "o_proj", "mlp.gate.")
    for kind in kinds:
        assert any(kind in name for name in shifts), f"nothing of {kind} was shifted: the test shows nothing"
    tensors = load_file(folder / "model.safetensors")
    for name, shift in shifts.items():
        shift.applied(tensors[name])
    (tmp_path / "shifted").mkdir()
    (tmp_path / "shifted" / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, tmp_path / "shifted" / "model.safetensors")
    before, after = (dsv3.load(str(f), dtype="float64") for f in (folder, tmp_path / "shifted"))
    ids = [0, 5, 9, 33, 60, 2, 17]
    torch.testing.assert_close(after.logits(ids), before.logits(ids), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after.mtp_logits(ids), before.mtp_logits(ids), rtol=1e-12, atol=1e-12)


def test_migration_undoes_outliers(tmp_path: Path) -> None:
    """A model with outliers, in INT8: plain it is far off, migrated about as close as the model without outliers."""
    plain_source = write_hf(tmp_path / "tiny", TINY, random_tensors(TINY))
    source = fold(plain_source, tmp_path / "folded", factor=100.0)
    ids = windows(1, 60, 5)[0]
    wanted = dsv3.load(str(source), dtype="float32").logits(ids)
    convert(str(source), tmp_path / "plain", Target("int8"))
    convert(str(source), tmp_path / "migrated", Target("int8", calibrate=True), windows=windows(8, 60))
    convert(str(plain_source), tmp_path / "unfolded", Target("int8"))
    unfolded = dsv3.load(str(plain_source), dtype="float32").logits(ids)

    def off(folder: Path, wanted: torch.Tensor) -> float:
        return float((dsv3.load(str(folder), dtype="float32").logits(ids) - wanted).norm() / wanted.norm())

    least = off(tmp_path / "unfolded", unfolded)
    plain, migrated = off(tmp_path / "plain", wanted), off(tmp_path / "migrated", wanted)
    assert migrated < plain / 2 and migrated < 2 * least, (least, plain, migrated)
    assert not list((tmp_path / "migrated").glob(".dsv3-*.safetensors"))


@pytest.mark.parametrize("k", [100, 128, 300])
def test_compensated_rounding_loses_less_on_its_inputs(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    mixing = torch.randn(k, k, generator=generator) / k**0.5
    x = torch.randn(2000, k, generator=generator) @ mixing
    weight = torch.randn(40, k, generator=generator)
    codes, scale = compensated(weight, inverse_factor(hessian(x, None)))
    assert codes.shape == (40, -(-k // 2)) and scale.shape == (40, -(-k // 128))

    def loss(codes: torch.Tensor, scale: torch.Tensor) -> float:
        return float((x @ (dequantize_group(codes, scale, k, torch.float32) - weight).T).square().mean())

    assert loss(codes, scale) < 0.7 * loss(*quantize_group(weight))


def test_inputs_that_never_vary_do_no_harm() -> None:
    weight = torch.randn(8, 130, generator=torch.Generator().manual_seed(1))
    codes, scale = compensated(weight, inverse_factor(hessian(torch.zeros(5, 130), None)))
    found = dequantize_group(codes, scale, 130, torch.float32)
    assert float((found - weight).abs().max()) <= float(weight.abs().max()) / 7


def test_int4_conversion_writes_a_file_per_layer_that_loads(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "tiny", TINY, random_tensors(TINY, copies=True))
    convert(str(source), tmp_path / "out", Target("int4", calibrate=True), windows=windows(8, 60))
    convert(str(source), tmp_path / "plain", Target("int4"))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 4 and not list((tmp_path / "out").glob(".dsv3-*.safetensors"))
    ids = windows(1, 60)[0]
    wanted = dsv3.load(str(source), dtype="float32").logits(ids)
    off = {
        name: float((dsv3.load(str(tmp_path / name), dtype="float32").logits(ids) - wanted).norm()) for name in ("out", "plain")
    }
    assert off["out"] < off["plain"]


def test_exponents_leave_empty_channels_alone() -> None:
    channels, columns = torch.tensor([0.0, 1.0, 64.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert exponents(channels, columns, 0.0).tolist() == [0, 0, 0, 0]
    found = exponents(channels, columns, 0.5).tolist()
    assert found[0] == found[3] == 0 and found[2] - found[1] == 3


def test_calibration_text_is_spread_and_faults_are_named(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("x" * 5000)
    ids = read_windows([text], lambda t: list(range(len(t))), 1024)
    assert ids.shape == (4, 256) and np.diff(ids[:, 0]).min() > 256
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    for paths, words in (([tmp_path / "none.txt"], "cannot be read"), ([tmp_path / "bad.txt"], "UTF-8"), ([tmp_path], "UTF-8")):
        with pytest.raises(UsageError, match=words):
            read_windows(paths, lambda t: [1] * len(t), 1024)
    with pytest.raises(UsageError, match="thousands"):
        read_windows([text], lambda t: [1], 1024)
