"""What several commands share: settings to a loaded model, and plain tables."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dsv3.errors import UsageError
from dsv3.settings import resolve

if TYPE_CHECKING:
    from dsv3.dispatch.placement import Placement
    from dsv3.engine.model import Model


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The values of all settings for this call."""
    return {name: found.value for name, found in resolve(vars(arguments)).items()}


def load_model(arguments: argparse.Namespace, settings: dict[str, Any], mtp: bool = True) -> Model:
    """The model that the flags ask for. mtp: with its MTP modules."""
    if not getattr(arguments, "whole_process", False):
        return _loaded(arguments, settings, mtp)
    # What modules and weights consist of stays: collecting among them takes a tenth of a start, and stalls what is served.
    gc.disable()
    try:
        return _loaded(arguments, settings, mtp)
    finally:
        gc.freeze()
        gc.enable()


def _loaded(arguments: argparse.Namespace, settings: dict[str, Any], mtp: bool) -> Model:
    from dsv3.loading import load

    graphs = False if getattr(arguments, "no_graphs", False) else None
    options = {"threads": settings["threads"], "check": settings["check"], "progress": True, "graphs": graphs, "mtp": mtp}
    model = load(settings["model"], **options, **_placement(arguments, settings))
    model.chat_family = getattr(arguments, "chat_format", None)
    return model


def place_model(arguments: argparse.Namespace, settings: dict[str, Any]) -> Placement:
    """The placement that the flags ask for, without its weights."""
    from dsv3.loading import place

    return place(settings["model"], **_placement(arguments, settings))


def _placement(arguments: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    names = ("backend", "device", "dtype", "quant", "kv_dtype", "strict")
    chosen = {name: settings[name] for name in names}
    return {**chosen, "pins": pins_of(arguments.kernel), "emulate": arguments.emulate or False}


def pins_of(texts: Sequence[str]) -> dict[str, str]:
    """["op=backend.kernel"] as a mapping."""
    pins: dict[str, str] = {}
    for text in texts:
        op, equals, kernel = text.partition("=")
        if not equals or not op or "." not in kernel:
            raise UsageError(f"--kernel {text!r} is not OP=BACKEND.KERNEL")
        pins[op] = kernel
    return pins


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as aligned columns; the last is not padded."""
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths[:-1], strict=True)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return "\n".join(lines)
