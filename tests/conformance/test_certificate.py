"""Certificates: written only where earned, and every change of every field is found."""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from dsv3.conformance import report as reports
from dsv3.conformance.report import certificate, contents, installed, jsonl
from dsv3.conformance.result import CaseResult, Report
from dsv3.errors import UsageError
from tests.support.plugins import good, write_plugin
from tests.support.reports import case, report, write_list


@dataclass
class Certified:
    """A run of an installed plugin, certified."""

    lists: Path
    out: Path
    plugin: Path
    report: Report

    @property
    def path(self) -> Path:
        return self.out / "certificate.json"

    def problems(self) -> list[str]:
        return certificate.verify(self.path, self.lists)


def _run(lists: Path, **info: Any) -> Report:
    waiver = {"pattern": "bmm/*", "reason": "ties", "url": "https://example.com/7"}
    cases = [
        case("l0/probe", op=""),
        case("rms_norm/a"),
        case("rms_norm/a", kernel="acme.slow"),
        case("linear/a", "absent", message="no kernel"),
        case("bmm/a", "waived", details={"waiver": waiver}),
        case("l2/prefill", op=""),
    ]
    ids = ["l0/probe", "rms_norm/a", "linear/a", "bmm/a", "l2/prefill", "l3/graph"]
    facts = {"list_sha256": write_list(lists, ids), "level": "L2", "plugin": installed.plugin("dsv3-acme"), **info}
    return report(cases, **facts)


@pytest.fixture
def certified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Certified]:
    (tmp_path / "site").mkdir()
    plugin = write_plugin(tmp_path / "site", "acme", good("acme"))
    package = plugin / "dsv3_acme"
    package.mkdir()
    (plugin / "dsv3_acme.py").rename(package / "__init__.py")
    (package / "kernels.py").write_text("def norm(x): return x\n")
    monkeypatch.syspath_prepend(str(plugin))
    monkeypatch.delitem(sys.modules, "dsv3_acme", raising=False)  # of another test in this process
    importlib.invalidate_caches()
    made = _run(tmp_path / "lists")
    written = reports.write_all(made, tmp_path / "out", lists=tmp_path / "lists")
    assert written.refusal == ""
    yield Certified(tmp_path / "lists", tmp_path / "out", package, made)


def test_a_fresh_certificate_is_good_and_says_what_was_proved(certified: Certified) -> None:
    assert certified.problems() == []
    found = json.loads(certified.path.read_text())
    assert found["badge"] == "dsv3-conformant v1 L2 (no profile, size quick, 1 waived)"
    assert found["suite"] == {
        "version": "v1", "list_sha256": certified.report.info["list_sha256"], "level": "L2", "size": "quick", "seed": 0,
    }  # fmt: skip
    assert found["counts"]["total"] == {"passed": 4, "failed": 0, "waived": 1, "absent": 1}
    assert found["counts"]["L1"]["passed"] == 2 and set(found["counts"]) == {"L0", "L1", "L2", "total"}
    assert found["waivers"] == [{"case": "bmm/a", "kernel": "acme.fast", "reason": "ties", "url": "https://example.com/7"}]
    assert {"dsv3_acme/__init__.py", "dsv3_acme/kernels.py"} <= set(found["plugin"]["files"])
    assert "no signature" in found["about_digest"]


def _leaves(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict | list) and value:
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _leaves(value[key], (*at, key))
    else:
        yield at


def _changes(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, str(value), None, float(value)]
    return [f"{value}x", "", None] if isinstance(value, str) else [["x"], 1]


def _store(path: Path, changed: dict[str, Any], digest: bool) -> None:
    if digest:
        changed["digest"] = contents.canonical_digest(changed)
    path.write_text(json.dumps(changed))


def test_a_change_of_any_field_is_found_even_with_a_new_digest(certified: Certified) -> None:
    original = json.loads(certified.path.read_text())
    fields = list(_leaves(original))
    assert len(fields) > 40
    for field in fields:
        for digest in (False, True):
            if digest and field == ("digest",):
                continue
            place = original
            for key in field:
                place = place[key]
            for value in _changes(place):
                if value == place and type(value) is type(place):
                    continue
                changed = copy.deepcopy(original)
                holder: Any = changed
                for key in field[:-1]:
                    holder = holder[key]
                holder[field[-1]] = value
                _store(certified.path, changed, digest)
                problems = certified.problems()
                assert problems, (field, value, digest)
                named = field[0] if digest else "digest"
                assert any(p.startswith(str(named)) for p in problems), (field, value, problems)
                assert all("\n" not in p and "expected" in p and "found" in p for p in problems), problems


def test_fields_removed_or_added_are_found(certified: Certified) -> None:
    original = json.loads(certified.path.read_text())
    for key in original:
        changed = {k: v for k, v in original.items() if k != key}
        _store(certified.path, changed, digest=key != "digest")
        assert any(key in p for p in certified.problems()), key
    _store(certified.path, {**original, "level": "L3"}, digest=True)
    assert certified.problems() == ["level: expected no such field, found 'L3'"]


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "null", "[" * 100_000, "\ud800"])
def test_what_is_no_certificate_is_said_plainly(certified: Certified, text: str) -> None:
    certified.path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        assert certified.problems()
    except UsageError as error:
        assert "certificate.json" in str(error)


def test_results_that_are_missing_or_changed_are_found(certified: Certified) -> None:
    results = certified.out / "results.jsonl"
    good_text = results.read_text()
    for change, named in (
        (good_text.replace("0.25", "0.26"), "results.sha256"),
        (good_text.replace('"passed"', '"failed"'), "found failed"),
        ("".join(line for line in good_text.splitlines(True) if "linear/a" not in line), "expected case linear/a"),
        (good_text.replace("linear/a", "linear/b"), "found linear/b"),
        (good_text[:-9], "results: "),
        ('{"type": "run", "format": "dsv3-results/1", "suite": "v1", "info": {"level": 3}}\n', "results"),
    ):
        results.write_text(change)
        assert any(named in p for p in certified.problems()), named
    results.unlink()
    assert any(p.startswith("results: expected results.jsonl beside") for p in certified.problems())


def test_consistent_forgery_still_fails_against_the_shipped_list(certified: Certified) -> None:
    cases = [c for c in certified.report.cases if c.id != "rms_norm/a"]
    forged = jsonl.dumps(replace(certified.report, cases=cases))
    (certified.out / "results.jsonl").write_text(forged)
    changed = contents.body(
        replace(certified.report, cases=cases), hashlib.sha256(forged.encode()).hexdigest(), certified.lists
    )
    _store(certified.path, changed, digest=True)
    assert any("expected case rms_norm/a of the frozen list" in p for p in certified.problems())


def test_a_changed_list_is_found(certified: Certified) -> None:
    write_list(certified.lists, ["l0/probe"])
    assert any(p.startswith("suite.list_sha256: expected") for p in certified.problems())
    shutil.rmtree(certified.lists)
    assert any("no frozen case list" in p for p in certified.problems())


def test_changed_missing_and_added_plugin_files_are_named(certified: Certified) -> None:
    kernels = certified.plugin / "kernels.py"
    kernels.write_text("def norm(x): return x + 1\n")
    (certified.plugin / "extra.py").write_text("")
    (certified.plugin / "__pycache__").mkdir(exist_ok=True)
    (certified.plugin / "__pycache__" / "extra.cpython-311.pyc").write_bytes(b"x")
    problems = certified.problems()
    assert [p.split(": ")[1] for p in problems] == ["dsv3_acme/extra.py", "dsv3_acme/kernels.py"]
    assert "expected no such file" in problems[0] and "expected sha256" in problems[1]
    kernels.unlink()
    assert any("kernels.py" in p and "found no such file" in p for p in certified.problems())


def test_another_version_or_no_plugin_is_named(certified: Certified) -> None:
    info = certified.plugin.parent / "dsv3_acme-1.0.dist-info"
    info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: dsv3-acme\nVersion: 1.1\n")
    importlib.invalidate_caches()
    assert any(p.startswith("plugin.version: expected 1.0, found 1.1") for p in certified.problems())
    shutil.rmtree(info)
    importlib.invalidate_caches()
    assert any(p.startswith("plugin.dist: expected dsv3-acme 1.0 installed") for p in certified.problems())
    assert certificate.verify(certified.path, certified.lists, check_installed=False) == []


def test_other_package_versions_are_named(certified: Certified, tmp_path: Path) -> None:
    made = _run(certified.lists, versions={"torch": "1.0", "nothing-like-it": "2", "driver": "550"})
    reports.write_all(made, tmp_path / "other", lists=certified.lists)
    problems = certificate.verify(tmp_path / "other" / "certificate.json", certified.lists)
    now = installed.installed_version("torch")
    assert problems == [
        f"versions.torch: expected 1.0, found {now}",
        "versions.nothing-like-it: expected 2, found not installed",
    ]


@pytest.mark.parametrize(
    ("more", "drop", "info", "why"),
    [
        ([case("silu_mul/a", "failed")], "", {}, "1 case failed"),
        ([], "bmm/a", {}, "1 of the 5 cases of L2, size quick, were not run: bmm/a"),
        ([], "", {"level": "L3"}, "l3/graph"),
        ([], "", {"size": "full"}, "no frozen case list of v1, size full"),
        ([], "", {"plugin": {}}, "no installed distribution"),
    ],
)
def test_no_certificate_where_none_is_earned(
    certified: Certified, tmp_path: Path, more: list[CaseResult], drop: str, info: dict[str, Any], why: str
) -> None:
    made = _run(certified.lists, **info)
    made = replace(made, cases=[c for c in made.cases if c.id != drop] + more)
    assert why in certificate.refusal(made, certified.lists)
    with pytest.raises(UsageError, match="no certificate"):
        certificate.write(made, tmp_path / "certificate.json", certified.lists)
    written = reports.write_all(made, certified.out, lists=certified.lists)
    assert why in written.refusal
    assert not certified.path.exists(), "the old certificate is not about these results"


def test_a_certificate_is_not_put_beside_the_results_of_another_run(certified: Certified) -> None:
    with pytest.raises(UsageError, match="holds another run"):
        certificate.write(_run(certified.lists, seed=1), certified.path, certified.lists)


def test_the_built_in_distribution_is_hashed_where_it_is_imported_from() -> None:
    files = installed.plugin("dsv3")["files"]
    assert {"dsv3/ops/norm.py", "dsv3_reference/__init__.py"} <= set(files)
    assert not any(name.endswith((".pyc", ".pth", "RECORD")) for name in files)
