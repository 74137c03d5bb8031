"""`dsv3 bench` as a person uses it, and the checkpoint that engines are measured on. No test asserts a time."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dsv3
from dsv3.cli import main

FLAGS = ["--backend", "reference", "--repeat", "1"]


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["bench", *arguments])
    return code, *capsys.readouterr()


def figures(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    assert found["kind"] == "dsv3 bench" and found["schema"] == 1 and found["ceilings"]["best"]["read_gb_s"] > 0
    return {f["name"]: f["value"] for f in found["figures"]}


def test_decode(story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, flags = tmp_path / "d.json", ["--model", str(story), *FLAGS, "--batch", "2", "--context", "6", "--tokens", "3"]
    code, out, err = call(capsys, "decode", *flags, "--profile", "--json", str(path), "--plot", str(tmp_path / "d.svg"))
    assert code == 0 and "loading" in err
    named, subject = figures(path), json.loads(path.read_text())["subject"]
    assert named["step"] == pytest.approx(2e3 / named["decode"], rel=0.5) and 0 < named["share of the roofline"] < 1
    assert named["outside kernels"] == pytest.approx(named["profiled step"] - named["in kernels"])
    assert (subject["batch"], subject["context"], subject["tokens"], subject["backend"]) == (2, 6, 3, "reference")
    assert "outside kernels" in out and "different experts per MoE layer" in out and "read, one core" in out
    assert (tmp_path / "d.svg").read_text().startswith("<svg")
    code, out, _ = call(capsys, "decode", *flags, "--compare", str(path))
    assert code == 0 and "new / old" in out and "per ceiling" in out
    code, _, err = call(capsys, "decode", *flags[:-1], "4", "--compare", str(path))
    assert code == 2 and "tokens 3 in the old run, 4 in this one" in err and "loading" not in err


def test_prefill(story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.json"
    code, out, _ = call(capsys, "prefill", "--model", str(story), *FLAGS, "--context", "8,16", "--json", str(path))
    named = figures(path)
    assert code == 0 and "prefill 16, share of products" in out
    assert {"prefill 8", "prefill 16", "prefill 8, products", "prefill 16, share of the roofline"} <= set(named)


def test_load(story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "l.json"
    code, out, _ = call(capsys, "load", "--model", str(story), *FLAGS, "--json", str(path))
    named = figures(path)
    assert code == 0 and "the page cache was warm" in out
    assert named["checkpoint"] == pytest.approx((story / "model.safetensors").stat().st_size / 1e9)
    assert named["load to the first token"] > named["load"] > 0 and named["weights as kept"] < named["checkpoint"]
    code, _, err = call(capsys, "load", "--model", str(story), *FLAGS, "--plot", str(tmp_path / "l.svg"))
    assert code == 2 and "no FLOP to draw" in err and "loading /" not in err


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_ops(story: Path, tmp_path: Path, phase: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "o.json"
    flags = ["--model", str(story), *FLAGS, "--phase", phase, "--context", "6", "--tokens", "2"]
    code, out, _ = call(capsys, "ops", *flags, "--json", str(path), "--plot", str(tmp_path / "o.svg"))
    found = json.loads(path.read_text())
    ops = {row["operator"] for row in found["rows"]}
    assert code == 0 and "mla_decode" in ops if phase == "decode" else "mla_prefill" in ops
    assert all(row["MB"] >= 0 and row["calls"] > 0 for row in found["rows"])
    assert len(found["points"]) == sum(bool(row["MFLOP"]) for row in found["rows"]) and "of the limit, %" in out


@pytest.mark.parametrize(
    "flags, said",
    [
        (["decode", "--batch", "0"], "--batch 0"), (["decode", "--repeat", "0"], "--repeat 0"),
        (["decode", "--batch", "99"], "at most 32"), (["decode", "--context", "999999"], "positions of this model"),
        (["prefill", "--context", "1,x"], "expected numbers of tokens"), (["prefill", "--context", "0"], "at least 1 token"),
        (["ops", "--plot", "x.gif"], "ends in .svg"), (["load", "--json", "/no/such/x.json"], "no folder"),
        (["decode", "--device", "meta"], "nothing to time"), (["decode", "--compare", "/no/x.json"], "No such file"),
    ],
)  # fmt: skip
def test_wrong_arguments(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, *flags)
    assert code == 2 and said in err


def test_the_checkpoint_for_measuring(tmp_path: Path) -> None:
    """A small one from the same generator: it loads, its numbers are finite, and greedy text does not collapse."""
    path = Path(__file__).parents[2] / "ci" / "bench" / "peer_model.py"
    found = importlib.util.spec_from_file_location("peer_model", path)
    assert found is not None and found.loader is not None
    made = importlib.util.module_from_spec(found)
    found.loader.exec_module(made)
    small = {"num_hidden_layers": 3, "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "n_routed_experts": 16,
             "moe_intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2,
             "q_lora_rank": 64, "kv_lora_rank": 128, "max_position_embeddings": 512}  # fmt: skip
    size = made.write(tmp_path / "small", {**made.CONFIG, **small})
    files = sorted(p.name for p in (tmp_path / "small").iterdir())
    assert len(files) == 3 + 1 + 2 and not any(name.startswith(".") for name in files)
    model = dsv3.load(str(tmp_path / "small"), backend="reference", threads=1)
    assert model.weight_bytes == pytest.approx(size, rel=0.2)
    logits = model.logits(list(range(2, 34)))
    assert bool(torch.isfinite(logits).all()) and 0.3 < float(logits.std()) < 3
    assert len(set(model.generate([5, 6, 7], max_new_tokens=24, ignore_eos=True).ids)) > 12
    again = tmp_path / "again"
    made.write(again, {**made.CONFIG, **small})
    assert (again / files[1]).read_bytes() == (tmp_path / "small" / files[1]).read_bytes()
