"""`dsv3 bench decode|prefill|load|ops`: a workload measured, printed, written, compared, drawn."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3.cli.bench_text import compared, shown
from dsv3.cli.common import load_model, settings_of
from dsv3.cli.files import check_outputs
from dsv3.errors import UsageError

if TYPE_CHECKING:
    from dsv3.bench.ceiling import Ceilings
    from dsv3.bench.results import Result
    from dsv3.engine.model import Model


def main(arguments: argparse.Namespace) -> int:
    settings = settings_of(arguments)
    _check(arguments, settings)
    old = None
    if arguments.compare is not None:
        from dsv3.bench.compare import check_same, read

        old = read(Path(arguments.compare))
        check_same(old, arguments.bench, _numbers(arguments))
    result = _measure(arguments, settings)
    if old is not None:
        from dsv3.bench.compare import compare

        rows = compare(old, result)  # before anything is printed: two runs that cannot be compared are a mistake
        print(shown(result))
        print(compared(rows))
    else:
        print(shown(result))
    if arguments.json:
        from dsv3.bench.results import write_json

        write_json(Path(arguments.json), result.to_json())
    if arguments.plot:
        from dsv3.bench.plot import write_plot

        write_plot(result, Path(arguments.plot))
    return 0


def _check(arguments: argparse.Namespace, settings: dict[str, Any]) -> None:
    """UsageError now rather than after the work."""
    if settings["device"] == "meta":
        raise UsageError("device 'meta' has shapes but no weights: there is nothing to time")
    for name in ("batch", "tokens", "repeat"):
        value = getattr(arguments, name, 1)
        if value < 1:
            raise UsageError(f"--{name} {value}: expected at least 1")
    if any(n < 1 for n in contexts(arguments)):
        raise UsageError(f"--context {arguments.context}: expected at least 1 token")
    if arguments.plot is not None and arguments.bench == "load":
        raise UsageError("--plot: loading has no FLOP to draw; plot decode, prefill or ops")
    check_outputs(arguments)


def _numbers(arguments: argparse.Namespace) -> dict[str, int]:
    """What of the subject is known before anything is loaded."""
    found = {name: value for name in ("batch", "tokens") if (value := getattr(arguments, name, None)) is not None}
    if getattr(arguments, "phase", "decode") == "prefill":
        found["tokens"] = 0
    return {**found, **({"context": max(contexts(arguments))} if contexts(arguments) else {})}


def contexts(arguments: argparse.Namespace) -> list[int]:
    """Of prefill several, else one; [] where there is none."""
    given = getattr(arguments, "context", None)
    if given is None or isinstance(given, int):
        return [] if given is None else [given]
    try:
        return [int(word) for word in given.split(",")]
    except ValueError as error:
        raise UsageError(f"--context {given!r}: expected numbers of tokens, such as 512,2048") from error


def _measure(arguments: argparse.Namespace, settings: dict[str, Any]) -> Result:
    import torch

    if settings["threads"] is not None:
        torch.set_num_threads(settings["threads"])  # the ceilings too are of so many
    chosen = {**settings, "check": False}  # what is measured is the path without it

    def load() -> Model:
        _say(f"loading {settings['model']}")
        model = load_model(arguments, chosen, mtp=False)
        _say(model.placement().summary)
        for note in model.placement().notes:
            _say(f"note: {note}")
        return model

    return _SUBJECTS[arguments.bench](arguments, load)


def ceilings(model: Model) -> Ceilings:
    """On the model's device."""
    from dsv3.bench.ceiling import measure

    _say("measuring what the machine can do")
    return measure(model.device)


def _decode(arguments: argparse.Namespace, load: Callable[[], Model]) -> Result:
    from dsv3.bench.decode import bench_decode

    a = arguments
    return bench_decode(load, ceilings, batch=a.batch, context=a.context, tokens=a.tokens, repeats=a.repeat, profiled=a.profile)


def _prefill(arguments: argparse.Namespace, load: Callable[[], Model]) -> Result:
    from dsv3.bench.prefill import bench_prefill

    return bench_prefill(load, ceilings, batch=arguments.batch, contexts=contexts(arguments), repeats=arguments.repeat)


def _load(arguments: argparse.Namespace, load: Callable[[], Model]) -> Result:
    from dsv3.bench.load import bench_load

    return bench_load(load, ceilings, model=settings_of(arguments)["model"], repeats=arguments.repeat)


def _ops(arguments: argparse.Namespace, load: Callable[[], Model]) -> Result:
    from dsv3.bench.ops import bench_ops

    a = arguments
    return bench_ops(
        load, ceilings, phase=a.phase, batch=a.batch, context=a.context, tokens=a.tokens, repeats=a.repeat
    )  # fmt: skip


_SUBJECTS: dict[str, Callable[[argparse.Namespace, Callable[[], Any]], Any]] = {
    "decode": _decode,
    "prefill": _prefill,
    "load": _load,
    "ops": _ops,
}


def _say(text: str) -> None:
    print(f"dsv3: {text}", file=sys.stderr, flush=True)
