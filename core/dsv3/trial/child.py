"""A process of its own for one plugin: `python -m dsv3.trial.child REQUEST.json`.

It imports the plugin as core would and notes what that changes, then runs the checks of the instance; or, with
"hidden", asks for devices only. Each finding is a line of JSON in the request's "results", flushed, so that the parent
knows what was going on when the process dies. Nothing heavy is imported before the plugin is.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from dsv3.dispatch.guard import CALL_LIMIT_S, IMPORT_LIMIT_S
from dsv3.dispatch.plugins import Plugin, discover, load_plugin
from dsv3.trial.findings import ENTRY_IDS, HIDDEN_ID, INSTANCE_IDS, Answer, Finding, absent, finding
from dsv3.trial.footprint import Footprint, changes, footprint, settled
from dsv3.trial.subject import Ear, Subject, quoted

SLOW_IMPORT_S = 1.0
HIDDEN_LIMIT_S = 30.0


class Reporter:
    """Writes the lines."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def begin(self, case: str, limit_s: float) -> None:
        self._write({"begin": case, "limit_s": limit_s})

    def emit(self, found: Finding) -> None:
        self._write(asdict(found))

    def _write(self, line: dict[str, Any]) -> None:
        self._out.write(json.dumps(line) + "\n")
        self._out.flush()


def main(request_path: str) -> None:
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    import stevedore.driver  # noqa: F401  (its import is not the plugin's)

    with open(request["results"], "w", encoding="utf-8") as out:
        reporter = Reporter(out)
        ear, errors = Ear(Path(request["stdout"])), Path(request["stderr"])
        plugin = next(p for p in discover() if (p.name, p.dist, p.value) == tuple(request["plugin"]))
        if request["hidden"]:
            _hidden(plugin, ear, reporter)
        else:
            _everything(plugin, request["emulate"], ear, errors, reporter)
        out.flush()
    # A call that was given up on may still be running, and the plugin may have left threads and exit handlers.
    os._exit(0)


def _hidden(plugin: Plugin, ear: Ear, reporter: Reporter) -> None:
    reporter.begin(HIDDEN_ID, 3 * IMPORT_LIMIT_S)
    load_plugin(plugin, ear.stream)
    if plugin.backend is None:
        return reporter.emit(Finding(HIDDEN_ID, "absent", "not tried: the plugin does not load"))
    from dsv3.trial.devices import hidden

    # torch is not imported here, which costs a second: the plugin's first call may have to, and gets the time for it.
    reporter.emit(finding(HIDDEN_ID, hidden(Subject(plugin.backend, plugin.source, None, ear, HIDDEN_LIMIT_S))))


def _limit(plugin: Plugin) -> float:
    """Seconds for each call of devices and probe, as in `choose.probe_plugin`."""
    return IMPORT_LIMIT_S if plugin.builtin else CALL_LIMIT_S


def _everything(plugin: Plugin, emulate: str | None, ear: Ear, errors: Path, reporter: Reporter) -> None:
    reporter.begin("l0/entry-point", IMPORT_LIMIT_S)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        before = footprint()
        load_plugin(plugin, ear.stream)
        after = settled(before)
    sys.stderr.flush()
    for found in _imported(plugin, before, after, ear.heard(), errors, [str(w.message) for w in warned]):
        reporter.emit(found)
    if plugin.backend is None:
        for found in absent(INSTANCE_IDS, "not tried: l0/entry-point failed"):
            reporter.emit(found)
        return
    reporter.begin(INSTANCE_IDS[0], IMPORT_LIMIT_S)
    from dsv3.trial.checks import run_checks

    run_checks(Subject(plugin.backend, plugin.source, emulate, ear, _limit(plugin)), reporter.begin, reporter.emit)


def _imported(plugin: Plugin, before: Footprint, after: Footprint, said: str, errors: Path, warned: list[str]) -> list[Finding]:
    """The cases about the import, in the order of ENTRY_IDS."""
    loaded = plugin.backend is not None
    problem = plugin.problem
    mistakes = [f"{problem.detail}; {problem.remedy}"] if problem else []
    seconds = plugin.load_seconds
    took = Answer(note=f"{1000 * seconds:.0f} ms")
    if seconds > SLOW_IMPORT_S:
        took.warnings.append(f"its import takes {seconds:.1f} s; import what is slow inside functions")
    answers = (
        Answer(mistakes=mistakes, note=plugin.value),
        Answer(note=plugin.group),
        Answer(note=plugin.name),
        _metadata(plugin),
        changes(before, after) if loaded else Answer(absent="not tried: l0/entry-point failed"),
        took if loaded else Answer(absent="not tried: l0/entry-point failed"),
        _printed(said, errors.read_text(encoding="utf-8", errors="replace"), warned),
    )
    return [finding(case, a, seconds if i == 0 else 0.0) for i, (case, a) in enumerate(zip(ENTRY_IDS, answers, strict=True))]


def _printed(said: str, errors: str, warned: list[str]) -> Answer:
    answer = Answer(note="silent")
    if said:
        answer.warnings.append(f"its import prints {quoted(said)} to standard output, which belongs to generated text")
    if errors:
        answer.warnings.append(f"its import prints {quoted(errors)} to standard error; use the logging module")
    if warned:
        answer.warnings.append(f"its import warns {quoted(warned[0])}")
    return answer


def _metadata(plugin: Plugin) -> Answer:
    """What the package says about itself: certificates and reports name it by this."""
    answer, dist = Answer(note=plugin.source), importlib.metadata.distribution(plugin.dist)
    version = getattr(plugin.backend, "version", None)
    if plugin.backend is not None and not plugin.builtin and version != dist.version:
        answer.warnings.append(f"the backend's version is {version!r}, its package's {dist.version!r}; make them equal")
    if dist.files is None:
        answer.warnings.append("its package lists no files (RECORD): a certificate cannot name what was tested")
    if not plugin.builtin and not any(re.match(r"dsv3(?![\w.-])", r) for r in dist.requires or ()):
        answer.warnings.append("its package does not depend on dsv3; add dependencies = ['dsv3>=0.1']")
    return answer


if __name__ == "__main__":
    main(sys.argv[1])
