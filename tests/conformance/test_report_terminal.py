"""The summary on a terminal, progress, and the badge."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import pytest

from dsv3.conformance.report import terminal
from dsv3.conformance.report.badge import badge
from dsv3.conformance.report.profiles import COMPOSITES, read
from dsv3.conformance.result import CaseResult, Report
from tests.support.reports import HOSTILE, case, large, report, write_list

_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def test_a_failure_is_told_in_full() -> None:
    details = {"output": "o", "index": (1, 2), "expected": 0.5, "found": math.nan, "error": math.nan, "budget": 0.01}
    text = terminal.summary(report([case("linear/a"), case("mla_decode/x", "failed", margin=math.inf, details=details)]))
    block = text[text.index("FAILED mla_decode/x") :]
    for words in ("acme.fast", "expected  0.5", "found     nan", "output o, index (1, 2)", "budget 0.01", "margin inf",
                  "repeat    dsv3 conformance --backend acme --cases mla_decode/x --seed 0"):  # fmt: skip
        assert words in block, words
    assert text.splitlines()[-1] == "not conformant: 1 failed, 1 passed"


def test_the_table_has_a_line_per_operator_with_its_worst() -> None:
    cases = [
        case("linear/a", margin=0.2),
        case("linear/b", margin=0.7, numerics="tc14", kernel="acme.mma"),
        case("bmm/a", "absent"),
    ]
    lines = {line.split()[0]: line.split() for line in terminal.summary(report(cases)).splitlines() if line}
    assert lines["linear"] == ["linear", "acme.fast,", "acme.mma", "f32,", "tc14", "2", "-", "-", "-", "0.7", "1.0e-12", "0.0"]
    assert lines["bmm"] == ["bmm", "-", "-", "-", "-", "-", "1", "-", "-", "0.0"]


def test_colour_changes_nothing_but_colour_and_a_narrow_margin_is_yellow() -> None:
    made = large(400)
    colored = terminal.summary(made, color=True, verbose=True)
    plain = terminal.summary(made, color=False, verbose=True)
    assert "\x1b" not in plain
    assert [line.rstrip() for line in _ANSI.sub("", colored).split("\n")] == plain.split("\n")
    for margin, color in ((0.7, "33"), (0.4, "32")):
        line = next(
            t for t in terminal.summary(report([case("linear/a", margin=margin)]), color=True).split("\n") if "linear" in t
        )
        assert f"\x1b[{color}m   {margin}\x1b[0m" in line


def test_hostile_text_gives_a_terminal_no_orders() -> None:
    cases = [case(f"linear/{HOSTILE}", "failed", kernel=HOSTILE, message=HOSTILE), case("bmm/a", "absent", message=HOSTILE)]
    made = report(cases, backend=HOSTILE, unmatched_waivers=[HOSTILE])
    text = terminal.summary(made, verbose=True, color=False)
    assert not set(text) & {chr(c) for c in range(32) if chr(c) != "\n"} and "\u202e" not in text
    text.encode("utf-8")
    assert "\x1b" not in _ANSI.sub("", terminal.summary(made, color=True))


def test_many_failures_are_all_named() -> None:
    text = terminal.summary(report([case(f"linear/{i}", "failed") for i in range(200)]))
    assert all(f"FAILED linear/{i}" in text and f"--cases linear/{i} " in text for i in range(200))
    assert len(text.splitlines()) < 700


def test_waivers_that_need_attention_are_shown() -> None:
    text = terminal.summary(
        report([case("linear/a")], unmatched_waivers=["x/y  why  https://e.com"], unexpected_passes=["linear/a"])
    )
    assert "warning: a waiver matches no case: x/y why https://e.com" in text
    assert "unexpected pass: linear/a" in text


def _core() -> list[CaseResult]:
    return [case(f"{op}/a") for op in read("v1")["core"]["operators"] if op not in COMPOSITES]


def _listed(folder: Path, cases: list[CaseResult], level: str = "L1", size: str = "quick", **info: Any) -> Report:
    return report(
        cases, list_sha256=write_list(folder, list(dict.fromkeys(c.id for c in cases)), size), level=level, size=size, **info
    )


def test_the_badge_names_level_and_profiles(tmp_path: Path) -> None:
    cases = [*_core(), case("quant_int8/a"), case("l0/probe", op=""), case("l2/prefill", op="")]
    earned = badge(_listed(tmp_path, cases, "L2", "full"), tmp_path)
    assert (earned.text, earned.refusal) == ("dsv3-conformant v1 L2 core+int8", "")
    weaker = badge(_listed(tmp_path, [*cases, case("bmm/b", "waived")], "L2", device={"emulated": True}), tmp_path)
    assert weaker.text == "dsv3-conformant v1 L2 core+int8 (size quick, 1 waived, emulated)"


def test_a_profile_needs_every_operator_and_its_requirements(tmp_path: Path) -> None:
    without = [c for c in _core() if c.op != "bmm"]
    for cases in (without, [*without, case("bmm/a", "absent")], [*without, case("bmm/a", "waived")]):
        text = badge(_listed(tmp_path, [*cases, case("quant_int8/a")], size="full"), tmp_path).text
        assert text.startswith("dsv3-conformant v1 L1 (no profile"), text


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda r: Report([*r.cases, case("bmm/x", "failed")], r.suite, r.info), "not conformant: 1 failed"),
        (lambda r: Report(r.cases[1:], r.suite, r.info), "1 of the .* were not run: rms_norm/a"),
        (lambda r: Report([*r.cases, case("bmm/new")], r.suite, r.info), "1 cases are not in the list"),
        (lambda r: Report(r.cases, r.suite, {**r.info, "list_sha256": "1"}), "is not the shipped one"),
        (lambda r: Report(r.cases, "v9 1", r.info), "no frozen case list of v9"),
        (lambda r: Report(r.cases, "../x", r.info), "no frozen case list"),
        (lambda r: Report(r.cases, r.suite, {**r.info, "level": "L7"}), "names no level"),
        (lambda r: Report([case(c.id, "absent") for c in r.cases], r.suite, r.info), "no case of L1 passed"),
        (lambda r: Report([], r.suite, r.info), "were not run"),
    ],
)
def test_what_earns_no_badge(tmp_path: Path, change: Any, why: str) -> None:
    made = _listed(tmp_path, _core())
    assert not badge(made, tmp_path).refusal
    refused = badge(change(made), tmp_path)
    assert refused.refusal and re.search(why, refused.text), refused


def test_progress_off_a_terminal_is_a_line_every_five_seconds_and_every_failure() -> None:
    out, now = io.StringIO(), [0.0]
    with terminal.Progress(100, stream=out, clock=lambda: now[0]) as progress:
        for i in range(20):
            progress.start(f"linear/{i}")
            now[0] += 1.0
            progress.finish(case(f"linear/{i}", "failed" if i == 6 else "passed", message=HOSTILE))
    lines = out.getvalue().splitlines()
    told = [line for line in lines if line.startswith("conformance: ")]
    assert told[0] == "conformance: 5 of 100 cases, at linear/4; eta 1 min 35 s"
    assert [line.split()[1] for line in told] == ["5", "10", "15", "20"]
    assert [line.split()[1] for line in lines if line.startswith("FAILED")] == ["linear/6"]
    assert "1 failed" in told[-1] and "\x1b" not in out.getvalue()


def test_progress_that_is_not_wanted_says_nothing() -> None:
    out = io.StringIO()
    with terminal.Progress(1, stream=out, show=False) as progress:
        progress.finish(case("linear/a", "failed"))
    assert out.getvalue() == "" and progress.failed == 1


def test_progress_on_a_terminal_names_failures_as_they_are_and_not_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with terminal.Progress(2, stream=out) as progress:
        progress.start("linear/[red]x")
        progress.finish(case("linear/[red]x", "failed", message="[bold]why"))
        print("a plugin prints")
    assert "FAILED linear/[red]x acme.fast: [bold]why" in _ANSI.sub("", out.getvalue())
    assert capsys.readouterr().out == "a plugin prints\n", "standard output stays standard output"
