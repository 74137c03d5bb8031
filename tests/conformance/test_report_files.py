"""JUnit, JSONL, SUPPORT.md and the folder of all reports."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3 import ops
from dsv3.conformance import report as reports
from dsv3.conformance.report import html, jsonl, junit, matrix, profiles, support
from dsv3.conformance.result import LEVELS, CaseResult, Report
from dsv3.errors import UsageError
from tests.support.reports import HOSTILE, case, large, report

_TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=30)
_FLOAT = st.floats(allow_nan=True)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | _FLOAT | _TEXT,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(_TEXT | st.sampled_from(["$float", "$$", "$"]), inner, max_size=3)
    ),
    max_leaves=8,
)
_CASE = st.builds(
    CaseResult,
    id=_TEXT, op=_TEXT, kernel=_TEXT, status=st.sampled_from(("passed", "failed", "waived", "absent")), margin=_FLOAT,
    nmse=_FLOAT, message=_TEXT, repeat=_TEXT, level=st.sampled_from(LEVELS), numerics=_TEXT, seconds=_FLOAT,
    details=st.dictionaries(_TEXT, _JSON, max_size=3),
)  # fmt: skip
_REPORT = st.builds(Report, st.lists(_CASE, max_size=4), _TEXT, st.dictionaries(_TEXT, _JSON, max_size=3))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(_REPORT)
def test_jsonl_gives_back_the_very_report(made: Report) -> None:
    # repr tells -0.0 from 0.0 and calls NaN equal to NaN, and shows every type.
    assert repr(jsonl.loads(jsonl.dumps(made))) == repr(made)


def test_jsonl_lines_are_what_the_format_says(tmp_path: Path) -> None:
    details = {"index": (3, 17), "found": math.nan}
    jsonl.write(report([case("rms_norm/a", "failed", margin=math.inf, details=details)], seed=7), tmp_path / "r.jsonl")
    raw = (tmp_path / "r.jsonl").read_bytes()
    head, line = (json.loads(text) for text in raw.decode("ascii").splitlines())
    assert (head["type"], head["info"]["seed"]) == ("run", 7)
    assert (line["type"], line["id"], line["margin"]) == ("case", "rms_norm/a", "inf")
    assert line["details"] == {"index": [3, 17], "found": {"$float": "nan"}}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t[:-20], "cut off"),
        (lambda t: t.replace('"type": "run"', '"type": "walk"'), ":1:"),
        (lambda t: t.replace('"margin": 0.25', '"margin": "wide"'), ":2: margin"),
        (lambda t: t.replace('"margin": 0.25, ', ""), ":2: margin"),
        (lambda t: t.replace('"status": "passed"', '"status": "fine"'), ":2: unknown status"),
        (lambda t: t.replace('"id"', '"di"'), ":2: id"),
        (lambda t: t + "{\n", ":3: no JSON"),
        (lambda t: t + "[" * 100_000 + "\n", ":3: no JSON"),
    ],
)
def test_damaged_results_are_an_error_with_file_and_line(tmp_path: Path, change: Any, named: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(change(jsonl.dumps(report([case("rms_norm/a")]))))
    with pytest.raises(UsageError, match=named):
        jsonl.read(path)


def test_junit_counts_names_and_reasons(tmp_path: Path) -> None:
    waiver = {"reason": "ties", "url": "https://example.com/7", "pattern": "*"}
    cases = [
        case("rms_norm/a"),
        case("rms_norm/b", "failed", message="y: expected 1, found 2", details={"expected": 1.0, "found": 2.0, "output": "y"}),
        case("linear/c", "absent", message="no kernel"),
        case("linear/d", "waived", message="waived", details={"waiver": waiver}),
        case("l2/mtp", op=""),
    ]
    junit.write(report(cases, level="L2", seed=5), tmp_path / "junit.xml")
    root = ET.parse(tmp_path / "junit.xml").getroot()
    assert {k: root.get(k) for k in ("tests", "failures", "skipped", "errors")} == {
        "tests": "5", "failures": "1", "skipped": "2", "errors": "0",
    }  # fmt: skip
    assert [s.get("name") for s in root] == ["L1", "L2"]
    found = {t.get("name"): t for t in root.iter("testcase")}
    assert found["rms_norm/a"].get("classname") == "rms_norm" and found["l2/mtp"].get("classname") == "L2"
    properties = {p.get("name"): p.get("value") for p in found["rms_norm/a"].iter("property")}
    assert properties == {"kernel": "acme.fast", "seed": "5", "margin": "0.25", "nmse": "1.0e-12", "numerics": "f32"}
    failure = found["rms_norm/b"].find("failure")
    assert failure is not None and failure.get("message") == "y: expected 1, found 2"
    for words in ("expected: 1", "found: 2", "output y", "--cases rms_norm/b"):
        assert words in (failure.text or "")
    skipped = {n: t.find("skipped").get("message") for n, t in found.items() if t.find("skipped") is not None}  # type: ignore[union-attr]
    assert skipped == {"linear/c": "no kernel", "linear/d": "waived https://example.com/7"}


def test_kernels_that_share_an_id_have_names_of_their_own_in_junit(tmp_path: Path) -> None:
    cases = [case("rms_norm/a", kernel="acme.one"), case("rms_norm/a", "failed", kernel="acme.two"), case("rms_norm/b")]
    junit.write(report(cases), tmp_path / "junit.xml")
    names = [t.get("name") for t in ET.parse(tmp_path / "junit.xml").iter("testcase")]
    assert names == ["rms_norm/a [acme.one]", "rms_norm/a [acme.two]", "rms_norm/b"]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(_REPORT)
def test_junit_is_xml_whatever_the_text(tmp_path_factory: pytest.TempPathFactory, made: Report) -> None:
    path = tmp_path_factory.getbasetemp() / "hostile.xml"
    junit.write(Report(made.cases, made.suite, {"backend": made.suite}), path)
    assert len(list(ET.parse(path).iter("testcase"))) == len(made.cases)


def _states(*cases: CaseResult, **info: Any) -> dict[str, str]:
    found = matrix.matrix([report(list(cases), **info)])
    return {op: cells[0].text for op, cells in found.operators.items()}


def test_the_matrix_tells_what_runs_each_operator() -> None:
    states = _states(
        case("rms_norm/a"),
        case("rms_norm/b"),
        case("linear/a"),
        case("linear/b", "absent", kernel="acme.fast", message="needs K % 128 == 0"),
        case("silu_mul/a"),
        case("silu_mul/b", "failed"),
        case("apply_rope/a", "waived"),
        case("bmm/a", "absent", message="no kernel"),
        case("l0/schema/act_quant", op="act_quant"),
    )
    assert states["rms_norm"] == "native"
    assert states["linear"] == "partial (1/2)"
    assert states["silu_mul"] == "failed (1/2)"
    assert states["apply_rope"] == "waived (1/1)"
    assert states["bmm"] == "absent"
    assert states["add_rms_norm"] == "composite", "it has a decomposition"
    assert states["act_quant"] == "untested", "that it loads says nothing about what it computes"
    assert list(states) == ops.names()


def test_a_case_that_another_kernel_takes_is_no_gap() -> None:
    refused = case("linear/a", "absent", kernel="acme.slow", message="AtMost(T, 64)")
    assert _states(case("linear/a"), refused)["linear"] == "native"
    both = _states(case("linear/a"), case("linear/a", "failed", kernel="acme.slow"))
    assert both["linear"] == "failed (1/2)", "every claimed kernel counts"


def test_support_gives_reasons_and_several_backends(tmp_path: Path) -> None:
    waiver = {"reason": "ties", "url": "https://example.com/7", "pattern": "*"}
    one = report([
        case("rms_norm/a", numerics="tc14"),
        case("linear/a", "failed", message="y: expected 1"),
        case("bmm/a", "waived", details={"waiver": waiver}),
    ])  # fmt: skip
    two = report([case("linear/x", "absent", message="other has no gemm")], backend="other", unmatched_waivers=["a  b  c"])
    support.write([one, two], tmp_path / "SUPPORT.md")
    text = (tmp_path / "SUPPORT.md").read_text(encoding="utf-8")
    assert "| operator | acme | other |" in text
    assert "| `rms_norm` | ● native, tc14 | – absent" in text
    for words in ("`linear/a` acme.fast: y: expected 1", "ties <https://example.com/7>", "other has no gemm", "- a b c",
                  "acme_1", "0" * 64, "| driver | 1.2 |", "| seed | 0 |", "| size | quick |", "2025"):  # fmt: skip
        assert words in text, words
    notes = {line.partition('"note-')[2].partition('"')[0] for line in text.splitlines() if line.startswith("<a id=")}
    links = {part.partition(")")[0] for part in text.split("(#note-")[1:]}
    assert notes == links and notes


def test_hostile_text_does_not_break_the_markdown() -> None:
    made = report(
        [case(f"linear/{HOSTILE}", "failed", kernel=HOSTILE, message=HOSTILE + "\n| x | y |\n# head")], backend=HOSTILE
    )
    text = support.markdown([made])
    assert "<script" not in text.replace("\\<script", "") and "\x1b" not in text and "\n# head" not in text
    table = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(table) == len(ops.names()) and all(line.replace("\\|", "").count("|") == 3 for line in table)


def test_profiles_name_real_operators_and_composites() -> None:
    shipped = profiles.read("v1")
    assert list(shipped) == ["core", "fp8", "fp8-fnuz", "int8", "mtp", "ep", "graph"]
    assert {op for p in shipped.values() for op in p["operators"]} <= set(ops.names())
    assert {n for n in ops.names() if ops.spec(n).decompose} == profiles.COMPOSITES


def test_write_all_replaces_an_old_report_and_leaves_other_files(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("certificate.json", "junit.xml", "notes.txt"):
        (folder / name).write_text("old")
    written = reports.write_all(large(300), folder)
    assert sorted(p.name for p in folder.iterdir()) == ["SUPPORT.md", "junit.xml", "notes.txt", "report.html", "results.jsonl"]
    assert (folder / "notes.txt").read_text() == "old" and (folder / "junit.xml").read_text() != "old"
    assert "failed" in written.refusal and set(written.paths) == {"SUPPORT.md", "junit.xml", "report.html", "results.jsonl"}


def test_write_all_that_fails_leaves_the_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    old = tmp_path / "old"
    reports.write_all(large(40), old)
    before = {p.name: p.read_bytes() for p in old.iterdir()}
    monkeypatch.setattr(html, "write", full)
    for folder in (old, tmp_path / "new"):
        with pytest.raises(UsageError, match="No space left"):
            reports.write_all(large(80), folder)
    assert {p.name: p.read_bytes() for p in old.iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UsageError, match="cannot write the report to"):
        reports.write_all(large(10), tmp_path / "out")
