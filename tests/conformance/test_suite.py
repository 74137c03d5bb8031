"""The suite as a whole: frozen lists, results, filters, errors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from ci.conformance_lists import ids

from dsv3 import conformance, ops
from dsv3.conformance.report.suite import frozen
from dsv3.conformance.result import SIZES
from dsv3.errors import UsageError
from tests.support.faulty import Made


@pytest.mark.parametrize("size", SIZES)
def test_the_frozen_lists_are_what_the_code_makes(size: str) -> None:
    found = frozen("v1", size).ids
    assert list(found) == ids(size)  # type: ignore[arg-type]
    assert len(set(found)) == len(found)
    assert {i.partition("/")[0] for i in found} >= {*ops.names(), "l0", "l2", "l3"}


def test_a_size_holds_all_cases_of_the_smaller() -> None:
    lists = [set(frozen("v1", size).ids) for size in SIZES]
    assert lists[0] < lists[1] < lists[2]


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2, 3, 4))])
def test_right_kernels_for_every_operator_pass_whatever_the_seed(seed: int) -> None:
    report = conformance.run(Made(), ops=ops.names(), size="quick", seed=seed)
    assert not report.failed, report.failed[0]
    assert {c.op for c in report.cases if c.status == "passed"} == set(ops.names())


def test_every_listed_case_has_a_result() -> None:
    report = conformance.run(Made({"rms_norm": ops.rms_norm}), size="quick", level="L1")
    assert {c.id for c in report.cases} == {i for i in frozen("v1", "quick").ids if not i.startswith(("l2/", "l3/"))}
    assert {c.op for c in report.cases if c.status == "passed"} == {"rms_norm", "plugin"}
    absent = next(c for c in report.cases if c.op == "linear")
    assert absent.status == "absent" and "offers no kernel for linear" in absent.message
    assert report.suite.startswith("v1 quick ")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"ops": ["rms_nrm"]}, "rms_norm"),
        ({"level": "L7"}, "L0, L1, L2, L3"),
        ({"size": "smal"}, "small"),
        ({"seed": "x"}, "integer"),
        ({"cases": "rms_norm/t1-d129/*"}, "no case of size full"),
        ({"cases": "rms_norm/t17-d7168/normal/f32", "size": "quick"}, "size full, level L3 has some"),
    ],
)
def test_unknown_words_are_usage_errors(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        conformance.run(Made(), **arguments)  # type: ignore[arg-type]


def test_cases_are_filtered_by_glob_and_by_id() -> None:
    some = conformance.run(Made(), cases="rms_norm/*/f32", size="quick")
    assert some.cases and {c.op for c in some.cases} == {"rms_norm"}
    one = conformance.run(Made(), cases=some.cases[0].id, size="quick")
    assert [c.id for c in one.cases] == [some.cases[0].id]


def test_a_failure_says_what_where_and_how_to_repeat(tmp_path: Path) -> None:
    report = conformance.run(
        Made({"silu_mul": lambda x: ops.silu_mul(x) * 1.01}), ops=["silu_mul"], size="quick", report=str(tmp_path / "out")
    )
    first = report.failed[0]
    assert first.details["expected"] != first.details["found"] and first.details["output"] == "y"
    assert f"--cases {first.id}" in first.repeat and first.margin > 1
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"junit.xml", "results.jsonl", "SUPPORT.md", "report.html"}


def test_waived_failures_do_not_fail(tmp_path: Path) -> None:
    waivers = tmp_path / "waivers.txt"
    waivers.write_text(
        "silu_mul/*  approximate on this device  https://example.org/1\nrms_norm/none  gone  https://example.org/2\n"
    )
    made = Made({"silu_mul": lambda x: ops.silu_mul(x) * 1.01})
    report = conformance.run(made, ops=["silu_mul"], size="quick", waivers=str(waivers))
    assert not report.failed and report.count("waived") > 0
    assert any("rms_norm/none" in text for text in report.info["unmatched_waivers"])


def test_an_instance_is_never_cached_by_name() -> None:
    right = conformance.run(Made({"silu_mul": ops.silu_mul}), ops=["silu_mul"], size="quick")
    wrong = conformance.run(Made({"silu_mul": lambda x: ops.silu_mul(x) + 1}), ops=["silu_mul"], size="quick")
    assert not right.failed and wrong.failed


def test_a_kernel_that_exits_is_a_failed_case() -> None:
    def leave(x: object) -> None:
        sys.exit(3)

    report = conformance.run(Made({"silu_mul": leave}), cases="silu_mul/t1-i128/normal/f32", size="quick")
    assert [c.status for c in report.cases] == ["failed"] and "SystemExit" in report.cases[0].message


def test_a_claim_that_no_case_reaches_is_named() -> None:
    from dsv3.plugin import AtLeast

    made = Made({"silu_mul": ops.silu_mul}, needs=(AtLeast("T", 100_000),))
    report = conformance.run(made, ops=["silu_mul"], size="quick")
    assert not report.failed and {c.status for c in report.cases} == {"absent"}
    assert "made.made for silu_mul took none of the cases" in report.info["notes"][0]
    assert "needs T at least 100000" in report.cases[0].message
