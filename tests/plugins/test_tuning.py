"""Tuning, seen from a plugin: the fast right kernel is used afterwards, a wrong one never, and nothing stale is trusted."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

import dsv3
import dsv3.conformance
from dsv3.cli import main
from dsv3.dispatch.tuning.database import Database
from tests.support.tuning import FLAGS, OPTIONS, THREE, Install, chosen, install, notes, run  # noqa: F401


def test_after_tuning_the_fast_right_kernel_runs_and_explain_shows_its_cost(
    install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels = install()
    assert chosen()["chosen"] == "acme.wrong"  # the default order believes priorities
    warnings: list[str] = []
    report = run(tmp_path, warn=warnings.append)
    assert report.stopped == "" and {row.winner.name for row in report.rows if row.winner} == {"acme.fast"}
    assert all(row.speed_up is not None and row.speed_up > 2 for row in report.rows)
    assert {r.name for _, r in report.wrong} == {"acme.wrong"}
    assert len(warnings) == 2 and all("acme.wrong is wrong" in w and "with a budget of" in w for w in warnings)  # two widths
    assert chosen()["chosen"] == "acme.fast"
    assert main(["explain", "rms_norm", *FLAGS]) == 0
    text = capsys.readouterr().out
    assert re.search(r"acme\.fast +measured: [\d.]+ us, next best [\d.]+ us \(tuned \d{4}-\d\d-\d\d at 4 tokens\)", text)
    assert re.search(r"acme\.slow +acme\.fast comes first \(measured [\d.]+ us, this [\d.]+ us\)", text)
    assert re.search(r"acme\.wrong +found wrong by dsv3 tune on \d{4}-\d\d-\d\d: y\[", text)
    kernels.calls.clear()
    model = dsv3.load("demo", **OPTIONS)
    assert model.generate("Once", max_new_tokens=3).ids == dsv3.load(
        "demo", backend="reference", dtype="float32", quant="none"
    ).generate("Once", max_new_tokens=3).ids  # fmt: skip
    assert set(kernels.calls) == {"fast"}


def test_a_pin_overrules_what_was_measured(install: Install, tmp_path: Path) -> None:
    install()
    run(tmp_path)
    for name in ("slow", "wrong"):
        found = chosen(pins={"rms_norm": f"acme.{name}"})
        assert (found["chosen"], found["why"]) == (f"acme.{name}", "pinned")


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [("raises", "raised RuntimeError: no such instruction"), ("scribbles", "changed its input x")],
)
def test_a_kernel_that_fails_or_changes_its_inputs_is_wrong(install: Install, tmp_path: Path, kernel: str, fault: str) -> None:
    install(f"Kernel('rms_norm', 'bad', T + '{kernel}', priority=9), Kernel('rms_norm', 'slow', T + 'slow')")
    report = run(tmp_path)
    assert all(r.wrong == fault for _, r in report.wrong) and report.wrong
    found = chosen()
    assert found["chosen"] == "acme.slow" and any(fault in r["reason"] for r in found["rejected"])


STALE: list[tuple[dict[str, Any], str]] = [
    ({"code": "\n# another line\n"}, "the kernel's source changed"),
    ({"version": "2"}, "backend version was 1, is 2"),
    ({"memory": 99}, "memory was 0, is 99"),
    ({"units": 8}, "compute_units was 4, is 8"),
]


def test_stale_measurements_are_ignored_counted_and_named(install: Install, tmp_path: Path) -> None:
    install()
    run(tmp_path)
    assert notes() == ""
    for change, reason in STALE:
        install(**change)
        assert f"18 tuning measurements ignored: {reason}; run dsv3 tune again" in notes()
        assert chosen()["chosen"] == "acme.wrong"  # nothing stale is trusted, neither for nor against
    run(tmp_path)
    assert chosen()["chosen"] == "acme.fast" and notes() == ""  # measured again: what it replaces is not worth a word
    install(THREE.replace("'fast', T", "'quick', T"), units=8)
    assert "6 tuning measurements ignored: there is no kernel acme.fast now" in notes()
    assert chosen()["chosen"] == "acme.slow"  # one of the two right ones was not measured: the default order


def test_stale_by_torch_version(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    run(tmp_path)
    monkeypatch.setattr("dsv3.dispatch.tuning.fingerprint._version", lambda package: "0.1")
    assert re.search(r"ignored: torch version was [\d.]+\S*, is 0\.1", notes())


def test_list_clear_and_doctor_tell_what_counts(install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install()
    assert main(["tune", *FLAGS, "--budget", "60s"]) == 0
    captured = capsys.readouterr()
    assert "acme.fast" in captured.out and "WRONG, and not used: acme.wrong for rms_norm D=256" in captured.out
    assert str(tmp_path / "tuning" / "cpu_1.jsonl") in captured.out and "tuning 0 of" in captured.err
    with open(tmp_path / "tuning" / "cpu_1.jsonl", "a") as file:
        file.write("{half a line\n")
    install(version="2")
    assert main(["tune", "--list", "--backend", "acme"]) == 0
    listed = capsys.readouterr().out
    assert "ignored: backend version was 1, is 2" in listed and "line 19: ignored: not JSON" in listed
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["tuning"]
    assert found[0]["backend"] == "acme" and found[0]["used"] == 0
    assert found[0]["ignored"] == {"backend version was 1, is 2": 18} and "not JSON" in str(found[1]["ignored"])
    assert main(["tune", "--clear", "--backend", "acme"]) == 0
    assert "19 measurements of acme" in capsys.readouterr().out
    assert (tmp_path / "tuning" / "cpu_1.jsonl").read_text() == "" and notes() == ""


def test_one_candidate_is_nothing_to_tune(install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install("Kernel('rms_norm', 'fast', T + 'fast')")
    assert main(["tune", *FLAGS]) == 0
    assert "nothing to tune" in capsys.readouterr().out and not (tmp_path / "tuning").exists()
    assert main(["tune", *FLAGS, "--ops", "rms_nrom"]) == 2
    assert main(["tune", *FLAGS, "--budget", "0"]) == 2
    assert main(["tune", *FLAGS, "--budget", "soon"]) == 2


def test_the_end_of_the_budget_keeps_what_was_measured_and_the_next_run_goes_on(install: Install, tmp_path: Path) -> None:
    kernels = install("Kernel('rms_norm', 'slow', T + 'slow', priority=1), Kernel('rms_norm', 'fast', T + 'fast')")
    start = time.monotonic()
    first = run(tmp_path, budget_s=0.05)
    assert first.stopped == "the budget is spent" and 1 <= len(first.rows) < first.total
    assert time.monotonic() - start < 30
    kept = Database(tmp_path / "tuning", "cpu_1").read().records
    assert len(kept) == sum(len(row.results) for row in first.rows)
    second = run(tmp_path)
    assert second.stopped == "" and len(second.rows) == second.total
    assert sum(row.earlier for row in second.rows) >= len(first.rows) - 1
    kernels.calls.clear()
    assert all(row.earlier for row in run(tmp_path).rows) and kernels.calls == []


def test_an_interrupt_keeps_what_was_measured(install: Install, tmp_path: Path) -> None:
    install()

    def watch(text: str, done: int, total: int, left: float) -> None:
        if done == 1:
            raise KeyboardInterrupt

    report = run(tmp_path, watch=watch)
    assert report.stopped == "interrupted" and len(report.rows) == 1
    assert len(Database(tmp_path / "tuning", "cpu_1").read().records) == 3


def test_half_measured_calls_keep_the_default_order(install: Install, tmp_path: Path) -> None:
    """A measured kernel is not compared with one that is only said to be good."""
    both = "Kernel('rms_norm', 'slow', T + 'slow', priority=1), Kernel('rms_norm', 'fast', T + 'fast')"
    install(both)
    run(tmp_path)
    assert chosen()["chosen"] == "acme.fast"
    install(both + ", Kernel('rms_norm', 'new', T + 'fast', priority=3)")
    found = chosen()
    assert (found["chosen"], found["why"]) == ("acme.new", "best eligible kernel")
    run(tmp_path)
    assert chosen()["chosen"] in ("acme.new", "acme.fast") and "measured:" in chosen()["why"]


def test_emulated_devices_are_tuned_for_themselves(install: Install, tmp_path: Path) -> None:
    install()
    run(tmp_path, emulate="cpu_1")
    assert chosen()["chosen"] == "acme.wrong" and chosen(emulate="cpu_1")["chosen"] == "acme.fast"
    assert chosen(emulate="cpu_2")["chosen"] == "acme.wrong"
    run(tmp_path, emulate="cpu_2")
    assert {p.name for p in (tmp_path / "tuning").glob("*.jsonl")} == {"cpu_1.jsonl", "cpu_2.jsonl"}
    assert all(r.key["emulated"] for r in Database(tmp_path / "tuning", "cpu_1").read().records)


def test_token_buckets_come_from_where_the_winner_changes(install: Install, tmp_path: Path) -> None:
    code = """
def few(x, weight, eps):
    time.sleep(0 if x.shape[0] <= 2 else 0.005)
    return ops.rms_norm(x, weight, eps)

def many(x, weight, eps):
    time.sleep(0.005 if x.shape[0] <= 2 else 0)
    return ops.rms_norm(x, weight, eps)
"""
    install("Kernel('rms_norm', 'few', T + 'few'), Kernel('rms_norm', 'many', T + 'many')", code)
    run(tmp_path)
    spans = {c["span"]: c["chosen"] for c in chosen()["choices"]}
    assert spans == {"1-2": "acme.few", ">=3": "acme.many"}
    assert dsv3.load("demo", **OPTIONS).generate("Once upon a time", max_new_tokens=2).ids


def test_a_kernel_with_its_own_layout_is_measured_with_prepared_weights(install: Install, tmp_path: Path) -> None:
    install("Kernel('quant_linear', 'plain', T + 'plain', priority=1), Kernel('quant_linear', 'turned', T + 'turned',"
            " layouts={'w': 'turned'})")  # fmt: skip
    report = run(tmp_path, ops=["quant_linear"])
    assert not report.wrong and {row.winner.name for row in report.rows if row.winner} == {"acme.turned"}
    assert chosen("quant_linear")["chosen"] == "acme.turned"
    ids = dsv3.load("demo", **OPTIONS).generate("Once", max_new_tokens=3).ids
    assert ids == dsv3.load("demo", backend="reference", dtype="float32", quant="none").generate("Once", max_new_tokens=3).ids


def test_loading_measures_nothing_and_reads_the_file_once(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = install()
    run(tmp_path)
    kernels.calls.clear()
    reads: list[str] = []
    read = Database.read
    monkeypatch.setattr(Database, "read", lambda self: reads.append(str(self.path)) or read(self))
    dsv3.load("demo", **OPTIONS)
    assert kernels.calls == [] and reads == [str(tmp_path / "tuning" / "cpu_1.jsonl")]
    assert set(os.listdir(tmp_path / "tuning")) == {"cpu_1.jsonl", "cpu_1.lock"}
