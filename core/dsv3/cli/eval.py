"""`dsv3 eval`: the quality of a checkpoint on texts, alone or beside another one."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dsv3.checkpoint.folder import DEMO, model_folder
from dsv3.cli.common import load_model, settings_of, table
from dsv3.errors import UsageError, nearest
from dsv3.eval.texts import read_texts
from dsv3.plugin import Quant

if TYPE_CHECKING:
    from dsv3.engine.model import Model
    from dsv3.eval.results import Evaluation, FileRow


def main(arguments: argparse.Namespace) -> int:
    settings = settings_of(arguments)
    outputs = _outputs(arguments)
    if settings["device"] == "meta":
        raise UsageError("device 'meta' has shapes but no weights; `dsv3 explain --model NAME` shows the plan")
    other = None if arguments.against is None else _other(arguments.against, settings)
    texts = read_texts(arguments.text)
    models = [load_model(arguments, settings, mtp=not arguments.no_mtp)]
    if other is not None:
        unpinned = argparse.Namespace(**{**vars(arguments), "kernel": []})
        models.append(load_model(unpinned, other, mtp=not arguments.no_mtp))
    _introduce(models)

    from dsv3.eval.measure import evaluate

    found = evaluate(
        models[0], texts, against=models[1] if other else None, window=arguments.window, tokens=arguments.tokens,
        mtp=not arguments.no_mtp, progress=True,
    )  # fmt: skip
    print(_text(found))
    for model in models:
        if (report := model.check_report()) is not None:
            print(f"dsv3: check: {report}", file=sys.stderr)
    _write(found, outputs)
    return 0


def _outputs(arguments: argparse.Namespace) -> dict[str, Path]:
    """Where to write; UsageError now rather than after the work."""
    if arguments.window < 2:
        raise UsageError(f"--window {arguments.window}: expected at least 2 tokens")
    if arguments.tokens is not None and arguments.tokens < 2:
        raise UsageError(f"--tokens {arguments.tokens}: expected at least 2")
    chosen = {name: Path(value) for name in ("json", "plot") if (value := getattr(arguments, name)) is not None}
    for name, path in chosen.items():
        if path.is_dir() or not path.parent.is_dir():
            why = "is a folder" if path.is_dir() else f"is in {str(path.parent)!r}, which is no folder"
            raise UsageError(f"--{name} {str(path)!r} {why}; name a file in a folder that exists")
    if "plot" in chosen and chosen["plot"].suffix.lower() != ".svg":
        raise UsageError(f"--plot {str(chosen['plot'])!r}: only SVG is written; name a file that ends in .svg")
    return chosen


def _other(against: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of the model to compare with. A word that is a scheme is one; write ./none for a folder of that name."""
    shared = {**settings, "kv_dtype": None}
    if against in get_args(Quant):
        return {**shared, "quant": against}
    if against != DEMO and not os.path.exists(os.path.expanduser(against)):
        words = [*get_args(Quant), DEMO]
        listed = ", ".join(words)
        raise UsageError(f"--against {against!r} is neither a folder nor one of {listed}{nearest(against, words)}")
    model_folder(against, False)
    return {**shared, "model": against, "quant": None}


def _introduce(models: Sequence[Model]) -> None:
    placements = [model.placement() for model in models]
    lines = [p.summary for p in placements] + [f"note: {note}" for p in placements for note in p.notes]
    for said in dict.fromkeys(lines):  # both have the notes of the same backend
        print(f"dsv3: {said}", file=sys.stderr)


def _write(found: Evaluation, outputs: dict[str, Path]) -> None:
    from dsv3.conformance.report.files import write_text
    from dsv3.eval.plot import svg

    if "json" in outputs:
        write_text(outputs["json"], json.dumps(found.to_json(), indent=2, allow_nan=False) + "\n")
    if "plot" in outputs:
        write_text(outputs["plot"], svg(found))


def _text(found: Evaluation) -> str:
    head = f"{found.tokens:,} tokens in {found.windows:,} windows of {found.window}"
    return "\n\n".join([head, _aligned(_figures(found)), *_difference(found), _aligned(_files(found.files))])


def _figures(found: Evaluation) -> list[list[str]]:
    """A row per figure, a column per model, and how they differ."""
    this, other = found.model, found.against
    rated = [this] if other is None else [this, other]
    rows = [["", *found.labels[: len(rated)], *(["difference"] if other else [])]]

    def row(what: str, name: str, form: str, change: str) -> None:
        values = [getattr(r, name) for r in rated]
        if all(v is None for v in values):
            return
        cells = ["-" if v is None else format(v, form) for v in values]
        rows.append([what, *cells, *([_change(values, change)] if other else [])])

    row("loss, nats per token", "loss", ".4f", "percent")
    row("perplexity", "perplexity", ".3f", "percent")
    row("bits per byte", "bits_per_byte", ".4f", "percent")
    row("MTP loss, nats per token", "mtp_loss", ".4f", "percent")
    row("MTP acceptance", "mtp_acceptance", ".4f", "plain")
    row("weights, bytes", "weight_bytes", ",", "ratio")
    row("tokens/s", "tokens_per_s", ",.0f" if min(r.tokens_per_s for r in rated) >= 10 else ".2g", "ratio")
    return rows


def _change(values: Sequence[float | None], kind: str) -> str:
    this, other = values
    if this is None or other is None or (kind != "plain" and not other):
        return "-"
    if kind == "plain":
        return f"{this - other:+.4f}"
    return f"x {this / other:.3f}" if kind == "ratio" else f"{100 * (this / other - 1):+.2f} %"


def _difference(found: Evaluation) -> list[str]:
    d = found.difference
    if d is None:
        return []
    this, other = found.labels
    spread = f"median {d.kl_median:.2e}, 99 % below {d.kl_99:.2e}, largest {d.kl_max:.2e}"
    kl = f"{d.kl:.3e}{_error(d.kl_error, '.1e')} nats per token; {spread}"
    loss = f"{d.loss_percent:+.3f} %{_error(d.loss_percent_error, '.3f')}"
    rows = [(f"KL({other} || {this})", kl), ("loss difference", loss), ("top-1 agreement", f"{100 * d.agreement:.2f} %")]
    return [table(rows)]


def _error(value: float | None, form: str) -> str:
    return "" if value is None else f" ± {value:{form}}"


def _files(files: Sequence[FileRow]) -> list[list[str]]:
    two = any(row.against_loss is not None for row in files)
    rows = [
        ["text", "tokens", "loss", *(["other"] if two else []), "bits per byte", *(["other", "KL", "agreement"] if two else [])]
    ]
    for f in files:
        cells: list[tuple[float | None, str]] = [(f.loss, ".4f"), (f.bits_per_byte, ".4f")]
        if two:
            cells = [(f.loss, ".4f"), (f.against_loss, ".4f"), (f.bits_per_byte, ".4f"), (f.against_bits_per_byte, ".4f"),
                     (f.kl, ".2e"), (f.agreement, ".2%")]  # fmt: skip
        rows.append([f.name, f"{f.tokens:,}", *("-" if v is None else format(v, form) for v, form in cells)])
    return rows


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns of numbers end together."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return table([[row[0], *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))] for row in rows])
