"""`dsv3 bench`: the figures it promises, from real runs. No test asserts a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv3.bench import dispatch
from dsv3.cli import main


def test_dispatch_selects_nothing_while_decoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    code = main(["bench", "dispatch", "--json", str(path)])
    out = capsys.readouterr().out
    found = json.loads(path.read_text())
    assert [row["what"] for row in found["rows"]] == ["site", "part of a composite", "part, by shape", "site"]
    assert all(row["direct_ns"] > 0 and row["low_ns"] <= row["overhead_ns"] <= row["high_ns"] for row in found["rows"])
    assert set(found["decoding"].values()) == {0} and found["steps"] == 32
    # The counters count: loading did all of this, and every kernel had its first call.
    assert all(found["loading"][name] > 0 for name in ("Catalogue.candidates", "registration.resolve", "FirstCall.__call__"))
    assert code == (1 if found["failures"] else 0)
    assert "overhead (median)" in out and "Catalogue.candidates" in out
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_over_the_bar_or_selects_is_a_failure() -> None:
    slow = dispatch.Row("site", "k", 100.0, 1500.0, 1.0, 2000.0, 3, 10)
    figures = dispatch.Figures([slow], {}, {"Catalogue.candidates": 2, "Binder.bind": 0}, 32, "")
    assert figures.failures == ["site: 1500 ns is over the bar", "2 calls of Catalogue.candidates while decoding"]


def test_counters_are_taken_out_again() -> None:
    before = dispatch.Catalogue.candidates
    with dispatch.counted() as counts:
        assert dispatch.Catalogue.candidates is not before
    assert dispatch.Catalogue.candidates is before and set(counts.values()) == {0}


def test_bench_without_a_subject_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 2
    assert main(["bench", "dispatsh"]) == 2
    assert "error: " in capsys.readouterr().err
