"""`dsv3 plugin new` writes a distribution to start from; `dsv3 plugin check` tells whether one loads and registers rightly."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from pathlib import Path
from typing import Any

from dsv3.cli.common import settings_of, table
from dsv3.errors import BackendUnavailable
from dsv3.trial.findings import Finding
from dsv3.trial.run import repeat, try_plugin


def main(arguments: argparse.Namespace) -> int:
    settings_of(arguments)
    if arguments.action == "new":
        return _new(arguments.name, Path(arguments.into))
    return _check(arguments.name, arguments.json)


def _new(name: str, into: Path) -> int:
    from dsv3.cli.scaffold import write_plugin

    made = write_plugin(name, into)
    print(f"made {made}; next:")
    for command in (
        f"cd {shlex.quote(str(made))} && pip install -e .",
        f"dsv3 plugin check {name}",
        f"dsv3 conformance --backend {name}",
    ):
        print(f"  {command}")
    return 0


def _check(name: str | None, as_json: bool) -> int:
    from dsv3.dispatch.plugins import discover

    plugins = discover()
    names = [name] if name else list(dict.fromkeys(p.name for p in plugins if not p.builtin))
    checked = []
    for each in names:
        start = time.perf_counter()
        cases = try_plugin(each)
        package = next((p.source for p in plugins if p.name == each), "")
        checked.append((each, package, cases, time.perf_counter() - start))
    if as_json:
        print(json.dumps([_plain(*entry) for entry in checked], indent=2))
    elif not checked:
        print("no backend from outside dsv3 is installed; `dsv3 plugin new NAME` starts one")
    else:
        print("\n\n".join(_text(*entry) for entry in checked))
    bad = any(case.status == "failed" for _, _, cases, _ in checked for case in cases)
    return BackendUnavailable.exit_code if bad else 0


def _state(case: Finding) -> str:
    """ok, warning, FAILED, or - for what could not be asked."""
    if case.status == "passed":
        return "warning" if case.message.startswith("warning: ") else "ok"
    return {"failed": "FAILED", "absent": "-"}[case.status]


def _text(name: str, package: str, cases: list[Finding], seconds: float) -> str:
    rows = [(f"  {_state(case)}", case.id, case.message.removeprefix("warning: ")) for case in cases]
    states = [_state(case) for case in cases]
    counts = f"{states.count('ok')} ok, {states.count('warning')} warnings, {states.count('FAILED')} failed"
    lines = [f"{name} ({package})", table(rows), f"{counts}, {states.count('-')} not asked, in {seconds:.1f} s"]
    lines += [f"  again: {repeat(name, case.id)}" for case in cases if case.status == "failed"]
    return "\n".join(lines)


def _plain(name: str, package: str, cases: list[Finding], seconds: float) -> dict[str, Any]:
    return {
        "plugin": name,
        "package": package,
        "seconds": round(seconds, 3),
        "failed": sum(case.status == "failed" for case in cases),
        "cases": [_plain_case(name, case) for case in cases],
    }


def _plain_case(name: str, case: Finding) -> dict[str, str]:
    again = repeat(name, case.id)
    return {"id": case.id, "state": _state(case), "status": case.status, "message": case.message, "repeat": again}
