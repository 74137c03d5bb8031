"""DSV3_CHECK=1: every call of every kernel is compared with its reference, and the first divergence is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dsv3
from tests.support.failing import TURNED, Install, load, source

IDS = [0, 933, 643, 263, 506]


def one(op: str) -> str:
    return f"Kernel('{op}', 'k', T + '{op}')"


def test_right_kernels_pass_and_every_call_is_counted(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    kernels = install("acme", source(f"{one('rms_norm')}, {one('moe')}, {TURNED}"))
    model, plain = load(check=True), load(backend="reference")
    assert model.generate(IDS, max_new_tokens=3).ids == plain.generate(IDS, max_new_tokens=3).ids
    model.logits(IDS)
    report = model.check_report()
    assert report.passed and report.first is None and capsys.readouterr().err == ""
    ours = {op: n for (op, kernel), n in report.calls.items() if kernel.startswith("acme.")}
    assert sum(ours.values()) == len(kernels.calls) and set(ours) == {"rms_norm", "moe", "quant_linear"}
    assert {kernel for _, kernel in report.calls} > {"reference.torch"}  # compared as well
    assert all(0 <= margin <= 1 for margin in report.worst_margin.values())
    assert kernels.undone  # turned weights are compared as what they were


@pytest.mark.parametrize("quant", ["fp8-w8a8", "fp8-w8a16", "int8-w8a8", "int4-w4a16"])
def test_the_reference_agrees_with_itself_in_every_scheme(quant: Any) -> None:
    model = load(backend="reference", quant=quant, kv_dtype="fp8", dtype="bfloat16", check=True)
    model.generate([IDS, IDS[:2]], max_new_tokens=4, draft="mtp", temperature=1.0, seed=1)
    assert model.check_report().passed and model.check_report().calls.total() > 500


def test_the_first_divergence_names_operator_layer_error_and_budget(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels = install("acme", source(one("silu_mul")))

    def off(out: torch.Tensor, arguments: Any) -> torch.Tensor:
        out[2, 7] += 0.25
        return out

    kernels.changes["silu_mul"] = off
    model = load(check=True)
    model.logits(IDS)
    err = capsys.readouterr().err
    assert err.count("first divergence") == 1
    for words in ("silu_mul at layers.0.mlp", "kernel acme.k", "x [5, ", "index", "expected", "found", "max err 0.2", "budget",
                  "--kernel silu_mul=reference.torch", "dsv3 conformance --backend acme --ops silu_mul"):  # fmt: skip
        assert words in err, words
    report = model.check_report()
    assert report.first.site == "layers.0.mlp" and list(report.first.details["index"]) == [2, 7]
    assert report.divergences["silu_mul", "acme.k"] == report.calls["silu_mul", "acme.k"] > 1
    assert "silu_mul: " in str(report) and "calls diverged" in str(report)
    assert {op for op, _ in report.divergences} == {"silu_mul"}  # what follows is right, given its inputs
    json.dumps(report.to_json(), default=str)


FORMS: dict[str, tuple[str, Any, str]] = {
    "shape": ("silu_mul", lambda out, a: out[:, :-1], "output y has shape [5, "),
    "dtype": ("silu_mul", lambda out, a: out.double(), "output y has dtype torch.float64; expected torch.float32"),
    "count": ("add_rms_norm", lambda out, a: out[:1], "it returned 1 outputs; expected 2"),
    "no tensor": ("silu_mul", lambda out, a: "text", "output y is str; expected a tensor"),
    "alias": ("all", lambda out, a: a["x"].copy_(out), "output y shares its storage with input x"),
    "changed input": ("silu_mul", lambda out, a: (a["x"].zero_(), out)[1], "input x was changed"),
    "NaN": ("silu_mul", lambda out, a: out.masked_fill(out == out[0, 0], float("nan")), "output y has NaN; no input has any"),
}


@pytest.mark.parametrize("fault", FORMS)
def test_outputs_of_the_wrong_form_are_named(fault: str, install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    op, change, words = FORMS[fault]
    op = "rms_norm" if op == "all" else op
    kernels = install("acme", source(one(op)))
    kernels.changes[op] = change
    model = load(check=True)
    try:
        model.logits(IDS)
    except (dsv3.Dsv3Error, ValueError):
        assert fault in ("shape", "dtype", "count", "no tensor", "NaN")  # the model cannot go on with it
    found = model.check_report().first
    assert found.op == op and words in found.problem
    assert words in capsys.readouterr().err


def test_a_row_written_to_the_wrong_slot_is_found(install: Install) -> None:
    kernels = install("acme", source(one("kv_cache_write")))

    def also_the_last(out: Any, arguments: Any) -> Any:
        arguments["cache"].ckv[-1, -1] = 1.0
        return out

    kernels.changes["kv_cache_write"] = also_the_last
    model = load(check=True)
    model.logits(IDS)
    found = model.check_report().first
    assert (found.op, found.site) == ("kv_cache_write", "layers.0.self_attn, inside rope_cache_write")


def test_a_reading_operator_that_writes_the_cache_is_found(install: Install) -> None:
    kernels = install("acme", source(one("mla_decode")))
    kernels.changes["mla_decode"] = lambda out, arguments: (arguments["cache"].kpe.add_(1), out)[1]
    model = load(check=True)
    model.generate(IDS, max_new_tokens=3)
    assert "input cache.kpe was changed" in model.check_report().first.problem


def test_a_composite_taken_whole_is_compared_with_its_decomposition(install: Install) -> None:
    kernels = install("acme", source(one("moe")))
    kernels.changes["moe"] = lambda out, arguments: out * 1.5
    model = load(check=True)
    model.logits(IDS)
    first = model.check_report().first
    assert (first.op, first.kernel, first.site) == ("moe", "acme.k", "layers.1.mlp")


def test_without_the_check_there_is_nothing_of_it(install: Install) -> None:
    kernels = install("acme", source(one("rms_norm")))
    model = load()
    model.logits(IDS)
    assert model.check_report() is None
    assert model._graph.blocks[0].first_norm[0].func is kernels._run


def test_the_variable_asks_for_it_in_the_library_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV3_CHECK", "1")
    assert load(backend="reference").check_report() is not None
    assert load(backend="reference", check=False).check_report() is None
    monkeypatch.setenv("DSV3_CHECK", "perhaps")
    with pytest.raises(dsv3.UsageError, match="DSV3_CHECK='perhaps'"):
        load(backend="reference")


def test_the_command_line_prints_the_divergence_once_and_a_summary(tmp_path: Path, install: Install) -> None:
    install("acme", source(one("silu_mul")))
    path = tmp_path / "dsv3_acme_kernels.py"
    path.write_text(path.read_text() + "\nchanges['silu_mul'] = lambda out, arguments: out + 1\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "dsv3", "run", "Once", "--backend", "acme", "--max-new-tokens", "3"]
    done = subprocess.run(command, env={**environment, "DSV3_CHECK": "1"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip()
    assert done.stderr.count("first divergence") == 1
    assert "dsv3: check: " in done.stderr and "acme.k of silu_mul: " in done.stderr
