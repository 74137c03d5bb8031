"""Two runs side by side, and those that cannot be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dsv3.bench.ceiling import Ceilings
from dsv3.bench.compare import check_same, compare, read
from dsv3.bench.results import Figure, Result, Subject, measured, unrest, write_json
from dsv3.errors import UsageError

SLOW = Ceilings(10.0, 9.0, 7.0, "sum", 50.0, 40.0)
FAST = Ceilings(20.0, 18.0, 14.0, "sum", 50.0, 80.0)
SUBJECT = Subject("m", "shape", "m on cpu", "cpu", "cpu:0", "bfloat16", "none", "bfloat16", 2, 1, 64, 8, 5)


def result(ceilings: Ceilings, figures: list[Figure], **changes: object) -> Result:
    return Result("decode", replace(SUBJECT, **changes), ceilings, ceilings, figures)  # type: ignore[arg-type]


def stored(made: Result, folder: Path) -> Path:
    write_json(folder / "old.json", made.to_json())
    assert [p.name for p in folder.iterdir()] == ["old.json"]
    return folder / "old.json"


def test_ratios_and_what_the_machine_has_to_do_with_them(tmp_path: Path) -> None:
    def figures(rate: float, step: float, other: str) -> list[Figure]:
        return [
            Figure("rate", rate, "tokens/s", better="more", bound="read"),
            Figure("step", step, "ms", better="less"),
            Figure("time", 8.0, "ms", better="less", bound="matmul"),
            Figure(other, 1.0, "GB"),
        ]

    old, new = result(SLOW, figures(5.0, 200.0, "gone")), result(FAST, figures(10.0, 100.0, "new"))
    rate, step, time = compare(read(stored(old, tmp_path)), new)
    assert rate.ratio == 2.0 and rate.normalised == pytest.approx(1.0) and rate.verdict == "same"  # the memory is twice as fast
    assert step.ratio == 0.5 and step.normalised is None and step.verdict == "better"
    assert time.normalised == pytest.approx(80 / 50) and time.verdict == "worse"  # a faster machine, and no faster


def test_operators_are_compared_by_call(tmp_path: Path) -> None:
    def row(kernel: str, us: float, mb: float, mflop: float) -> dict[str, object]:
        return {"operator": "linear", "shape": "8x8", "kernel": kernel, "us a call": us, "MB": mb, "MFLOP": mflop}

    old, new = result(SLOW, []), result(FAST, [])
    old.rows, new.rows = [row("a", 10.0, 1.0, 1.0)], [row("b", 5.0, 1.0, 1.0), {**row("b", 1.0, 1.0, 1.0), "shape": "9x9"}]
    (found,) = compare(read(stored(old, tmp_path)), new)
    assert (found.name, found.ratio) == ("linear 8x8", 0.5) and found.normalised == pytest.approx(1.0)  # memory twice as fast
    new.rows = [row("b", 5.0, 1.0, 1000.0)]
    (found,) = compare(read(tmp_path / "old.json"), new)
    assert found.normalised == pytest.approx(0.5 * 80 / 50) and found.verdict == "better"


def test_a_run_of_something_else_is_refused(tmp_path: Path) -> None:
    figures = [Figure("rate", 5.0, "tokens/s")]
    old = read(stored(result(SLOW, figures), tmp_path))
    for changed, said in (
        ({"batch": 2}, "batch 1 in the old run, 2 in this one"), ({"context": 128}, "context 64"), ({"tokens": 9}, "tokens 8"),
        ({"shape": "other", "model": "n"}, "m in the old run, n in this one are models of different sizes"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            compare(old, result(SLOW, figures, **changed))
    with pytest.raises(UsageError, match="measured 'decode', this one measures 'prefill'"):
        check_same(old, "prefill", {})
    compare(old, result(SLOW, figures, quant="int8-w8a8", threads=1, backend="reference"))


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "name a file that dsv3 bench --json wrote"), ("[1]", "no result of dsv3 bench"),
        (json.dumps({"kind": "dsv3 eval"}), "no result"), (json.dumps({"kind": "dsv3 bench", "schema": 99}), "schema 99"),
    ],
)  # fmt: skip
def test_another_file_is_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UsageError, match=said):
        read(tmp_path / "x.json")
    with pytest.raises(UsageError, match="No such file"):
        read(tmp_path / "y.json")


def test_the_better_of_two_ceilings_and_a_machine_that_changed() -> None:
    best = SLOW.best(replace(FAST, read_one_gb_s=None, bf16_gflop_s=30.0))
    assert best == Ceilings(20.0, 18.0, 7.0, "sum", 50.0, 80.0) and best.gflop_s == 80.0
    assert unrest(SLOW, SLOW) == []
    (note,) = unrest(SLOW, FAST)
    assert "reading 10.0 before, 20.0 after; products 50.0 before, 80.0 after" in note


def test_quartiles() -> None:
    f = measured("x", [1.0, 2.0, 3.0, 4.0, 100.0], "s")
    assert (f.low, f.value, f.high) == (2.0, 3.0, 4.0)
    assert measured("x", [7.0], "s").low == 7.0
