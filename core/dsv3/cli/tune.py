"""`dsv3 tune`: measure the kernels that could serve a model's calls on this machine, and keep the times for later loads."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from dsv3.cli.common import settings_of, table
from dsv3.cli.tune_progress import watching
from dsv3.errors import UsageError
from dsv3.settings import tuning_folder

if TYPE_CHECKING:
    from dsv3.dispatch.select import Catalogue
    from dsv3.dispatch.tuning.database import Database
    from dsv3.dispatch.tuning.tune import Row, TuneReport

_NAMES = ("backend", "device", "dtype", "quant", "kv_dtype")
_SHOWN, _REASONS = 200, 10  # lines of the table, of reasons below it


def main(arguments: argparse.Namespace) -> int:
    settings = settings_of(arguments)
    ops = _operators(arguments.ops)
    if arguments.budget <= 0:
        raise UsageError(f"--budget is {arguments.budget:g}; expected seconds, more than 0")

    from dsv3.dispatch.choose import choose
    from dsv3.dispatch.select import Catalogue
    from dsv3.dispatch.tuning.database import Database
    from dsv3.loading import calls

    folder = tuning_folder(settings["tuning_dir"])
    emulate = arguments.emulate or False
    if arguments.list or arguments.clear:
        source = choose(settings["backend"], settings["device"], "default" if emulate is True else emulate or None)
        database = Database(folder, source.device.arch)
        if arguments.clear:
            return _clear(database, source.name, source.device, ops)
        return _list(Catalogue(source, folder), database, ops)
    options = {name: settings[name] for name in _NAMES}
    source, sites = calls(settings["model"], emulate=emulate, **options)
    return _tune(Catalogue(source, folder), sites, Database(folder, source.device.arch), arguments.budget, ops)


def _operators(text: str | None) -> list[str]:
    if text is None:
        return []
    from dsv3.dispatch.registration import unknown_operator
    from dsv3.ops import names

    found = [word.strip() for word in text.split(",") if word.strip()]
    for op in found:
        if op not in names():
            raise unknown_operator(op)
    if not found:
        raise UsageError(f"--ops {text!r} names no operator; expected a list such as quant_linear,mla_decode")
    return found


def _tune(catalogue: Catalogue, sites: Any, database: Database, budget_s: float, ops: list[str]) -> int:
    from dsv3.dispatch.tuning.tune import tune

    print(f"dsv3: tuning {catalogue.source.name} on {catalogue.source.device} for {budget_s:g} s", file=sys.stderr)
    for note in catalogue.tuned.notes if catalogue.tuned is not None else ():
        print(f"dsv3: note: {note}", file=sys.stderr)
    with watching() as (watch, warn):
        report = tune(catalogue, sites, database, budget_s=budget_s, ops=ops, watch=watch, warn=warn)
    print(_text(report))
    return 130 if report.stopped == "interrupted" else 0


def _text(report: TuneReport) -> str:
    if not report.total:
        return f"nothing to tune: each of the {report.single} calls of this model has exactly one candidate"
    lines = []
    if report.rows:
        header = ("operator", "tokens", "times", "winner", "speed-up")
        lines.append(table([header, *map(_cells, report.rows[:_SHOWN])]))
        if len(report.rows) > _SHOWN:
            lines.append(f".. and {len(report.rows) - _SHOWN} more; `dsv3 tune --list` shows all")
    lines += _skipped(report)
    lines += _wrong(report)
    earlier = sum(row.earlier for row in report.rows)
    done = f"{len(report.rows)} of {report.total} calls and token counts measured"
    done += f", {earlier} of them before (dsv3 tune --clear forgets them)" if earlier else ""
    done += f"; {report.single} calls have one candidate, nothing to tune there" if report.single else ""
    lines.append(f"{done}; {report.stopped}: run it again to go on" if report.stopped else done)
    lines.append(f"measurements: {report.path}")
    return "\n".join(lines)


def _skipped(report: TuneReport) -> list[str]:
    """The calls that were left out, with the first reason of each."""
    from dsv3.dispatch.tuning.tune import label

    reasons: dict[str, list[str]] = {}
    for task, reason in report.skipped:
        call, _, tokens = label(task).rpartition(", ")
        reasons.setdefault(call, []).append(f"{tokens}: {reason}")
    found = [f"not measured: {call}, at {len(all_)} token counts, {all_[0]}" for call, all_ in reasons.items()]
    more = [f".. and {len(found) - _REASONS} more calls"] if len(found) > _REASONS else []
    return found[:_REASONS] + more


def _wrong(report: TuneReport) -> list[str]:
    """The wrong candidates, with the first fault of each for a call."""
    from dsv3.dispatch.tuning.tune import label

    faults: dict[str, list[str]] = {}
    for task, result in report.wrong:
        call = label(task).rpartition(", ")[0]
        faults.setdefault(f"WRONG, and not used: {result.name} for {call}", []).append(result.wrong)
    return [f"{which}, at {len(found)} token counts: {found[0]}" for which, found in faults.items()]


def _cells(row: Row) -> tuple[str, ...]:
    from dsv3.dispatch.tuning.tune import label

    call, _, tokens = label(row.task).rpartition(", ")
    times = ", ".join(f"{r.name} {'WRONG' if r.median_us is None else f'{r.median_us:.1f} us'}" for r in row.results)
    winner = row.winner.name if row.winner is not None else "none"
    speed_up = f"{row.speed_up:.2f}x" if row.speed_up is not None else "-"
    return call, tokens.removesuffix(" tokens"), times, winner, speed_up


def _list(catalogue: Catalogue, database: Database, ops: list[str]) -> int:
    """The measurements that count now, and those that do not, with the reason."""
    from dsv3.dispatch.tuning.tune import record_cells

    tuned = catalogue.tuned
    assert tuned is not None
    fresh = [r for r in tuned.fresh if not ops or r.key["op"] in ops]
    stale = [s for s in tuned.stale if not ops or s.record.key["op"] in ops]
    if fresh or stale:
        rows = [(*record_cells(r), "") for r in fresh] + [(*record_cells(s.record), f"ignored: {s.reason}") for s in stale]
        print(table([("operator", "tokens", "kernel", "time", "measured", "state"), *rows]))
    for note in tuned.notes:
        print(f"note: {note}")
    print(f"{len(fresh)} measurements of {catalogue.source.name} on {catalogue.source.device}, {len(stale)} ignored")
    print(f"measurements: {database.path}")
    return 0


def _clear(database: Database, backend: str, device: Any, ops: list[str]) -> int:
    def unwanted(record: Any) -> bool:
        key = record.key
        mine = key["kernel"].partition(".")[0] == backend and key["emulated"] == device.emulated
        return mine and key["family"] == device.family and (not ops or key["op"] in ops)

    removed = database.clear(unwanted)
    print(f"{removed} measurements of {backend} on {device} removed from {database.path}")
    return 0
