"""Waiver files and what they do to a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv3.conformance import waivers
from dsv3.errors import UsageError
from tests.support.reports import case

_URL = "https://example.com/issues/7#note"


def _read(path: Path, text: str) -> list[waivers.Waiver]:
    path.write_bytes(text.encode())
    return waivers.read(path)


def test_a_line_is_pattern_reason_and_link(tmp_path: Path) -> None:
    text = f"# ours\n\n  linear/a  a reason in words  {_URL}\nbmm/*\tother\t{_URL}\r\nx/#1   r # s   {_URL}\n"
    found = _read(tmp_path / "w", text)
    assert [(w.pattern, w.reason, w.url, w.line) for w in found] == [
        ("linear/a", "a reason in words", _URL, 3),
        ("bmm/*", "other", _URL, 4),
        ("x/#1", "r # s", _URL, 5),
    ]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("linear/a", "1 field"),
        (f"linear/a  {_URL}", "2 field"),
        ("linear/a  why", "2 field"),
        (f"linear/a why {_URL}", "1 field"),
        (f"linear/a  why  {_URL}  more", "4 field"),
        ("linear/a  why  later", "'later' is no http"),
        ("linear/a  why  javascript://x", "is no http"),
        (f"linear a  why  {_URL}", "has a space"),
        (f"bmm/z  other  {_URL}", "waived on line 1 too"),
    ],
)
def test_a_malformed_line_is_named_with_file_and_line(tmp_path: Path, line: str, what: str) -> None:
    with pytest.raises(UsageError) as caught:
        _read(tmp_path / "acme.waivers", f"bmm/z  fine  {_URL}\n{line}\n")
    assert f"{tmp_path / 'acme.waivers'}:2: " in str(caught.value) and what in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"\xff\xfe")
    for name in ("missing", "latin", "."):
        with pytest.raises(UsageError, match="cannot be read"):
            waivers.read(tmp_path / name)


def test_failures_that_match_are_waived_and_nothing_else_is() -> None:
    rules = [waivers.Waiver("linear/*", "slow chip", _URL), waivers.Waiver("none/*", "old", _URL)]
    cases = [
        case("linear/a", "failed", message="y: expected 1"),
        case("linear/b"),
        case("bmm/a", "failed"),
        case("linear/c", "absent"),
    ]
    done, unmatched, unexpected = waivers.apply(cases, rules)
    assert [c.status for c in done] == ["waived", "passed", "failed", "absent"]
    assert done[0].message == f"waived: slow chip ({_URL}); y: expected 1"
    assert done[0].details["waiver"] == {"pattern": "linear/*", "reason": "slow chip", "url": _URL}
    assert done[1:] == cases[1:] and cases[0].status == "failed"
    assert unmatched == [f"none/*  old  {_URL}"]
    assert unexpected == [], "the glob still covers a failure"


def test_a_waiver_whose_cases_all_pass_is_an_unexpected_pass() -> None:
    rules = [waivers.Waiver("linear/a", "fixed since", _URL)]
    both = [case("linear/a"), case("linear/a", kernel="acme.other")]
    _, unmatched, unexpected = waivers.apply(both, rules)
    assert unmatched == [] and len(unexpected) == 2 and "linear/a on acme.other passes" in unexpected[1]
    _, _, unexpected = waivers.apply([both[0], case("linear/a", "failed", kernel="acme.other")], rules)
    assert unexpected == [], "one of its kernels still fails"


def test_an_id_with_glob_characters_matches_itself() -> None:
    assert waivers.Waiver("linear/[x]", "r", _URL).matches("linear/[x]")
    assert not waivers.Waiver("linear/A", "r", _URL).matches("linear/a")
