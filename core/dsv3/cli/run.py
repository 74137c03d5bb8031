"""`dsv3 run`: text from a prompt, a file of prompts, or a conversation."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dsv3.cli.chat import converse
from dsv3.cli.common import load_model, settings_of
from dsv3.cli.streams import read_stdin, text_stream
from dsv3.cli.text import statistics
from dsv3.engine.options import MAX_BATCH, check_options
from dsv3.engine.text import check_unicode
from dsv3.errors import UsageError

if TYPE_CHECKING:
    from dsv3.engine.model import Model
    from dsv3.engine.request import Generation

_CONVERSATION = 4096  # tokens that a conversation is expected to have
_SAMPLING = ("max_new_tokens", "temperature", "top_p", "seed", "draft")


def main(arguments: argparse.Namespace) -> int:
    settings = settings_of(arguments)
    prompts = _prompts(arguments)
    options = {name: settings[name] for name in _SAMPLING}
    options |= {"stop": arguments.stop, "ignore_eos": arguments.ignore_eos}
    check_options(**options)
    if settings["device"] == "meta":
        raise UsageError("device 'meta' has shapes but no weights; `dsv3 explain --model NAME` shows the plan")
    with text_stream(restore=not arguments.whole_process) as out:
        return _run(arguments, settings, prompts, options, out)


def _run(
    arguments: argparse.Namespace,
    settings: dict[str, Any],
    prompts: list[str] | None,
    options: dict[str, Any],
    out: TextIO,
) -> int:
    model = load_model(arguments, settings)
    placement = model.placement()
    device = placement.device
    if device.family != "cpu" and not device.emulated:  # else compiling would count into the time to the first token
        _warm_up(model, prompts, options, arguments.input_file)
    print(f"dsv3: {placement.summary}", file=sys.stderr)
    for note in placement.notes:
        print(f"dsv3: note: {note}", file=sys.stderr)
    try:
        _answer(model, arguments, prompts, options, out)
    finally:
        if (report := model.check_report()) is not None:
            print(f"dsv3: check: {report}", file=sys.stderr)
    return 0


def _warm_up(model: Model, prompts: list[str] | None, options: Mapping[str, Any], file: str | None) -> None:
    """Ready for these prompts, or for a conversation of some length."""
    if prompts is None:
        batch, tokens = 1, _CONVERSATION
    else:
        batch = min(len(prompts), MAX_BATCH)
        tokens = max(len(_encoded(model, prompt, number, file)) for number, prompt in enumerate(prompts))
    model.warm_up(batch, True, tokens=tokens + max(options["max_new_tokens"], 1), draft=options["draft"])


def _answer(
    model: Model, arguments: argparse.Namespace, prompts: list[str] | None, options: dict[str, Any], out: TextIO
) -> None:
    if prompts is None:
        converse(model, dict(options), out)
    elif arguments.input_file is None and not arguments.json:
        _stream(model, prompts[0], options, out)
    else:
        _batch(model, prompts, options, arguments, out)


def _prompts(arguments: argparse.Namespace) -> list[str] | None:
    """The prompts, read before anything is loaded; None for a conversation."""
    given = [arguments.prompt is not None, arguments.interactive, arguments.input_file is not None]
    if sum(given) > 1:
        raise UsageError("give one of: a prompt, --interactive, --input-file")
    if arguments.interactive and arguments.json:
        raise UsageError("--json is for prompts; a conversation is text")
    if arguments.interactive:
        return None
    if arguments.prompt is not None:
        check_unicode(arguments.prompt)
        return [arguments.prompt]
    if arguments.input_file is not None:
        try:
            text = Path(arguments.input_file).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--input-file {arguments.input_file}: {error}; name a text file in UTF-8") from error
        if not text:
            raise UsageError(f"--input-file {arguments.input_file} is empty; write a prompt per line")
        # Only line feeds separate prompts: str.splitlines would also split at form feeds and the like.
        return [line.strip() for line in text.removesuffix("\n").split("\n")]
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError('no prompt; try: dsv3 run "Once upon a time"')
    return [read_stdin().removesuffix("\n")]


def _stream(model: Model, prompt: str, options: Mapping[str, Any], out: TextIO) -> None:
    result = _show(model, prompt, options, out)
    if result is not None:
        print(statistics(result.stats), file=sys.stderr)


def _show(model: Model, prompt: Any, options: Mapping[str, Any], out: TextIO) -> Generation | None:
    """Write the text as it appears, then a line end; the finished Generation."""
    result = None
    for piece, result in model.stream_events(prompt, **options):  # noqa: B007
        out.write(piece)
        out.flush()
    print(file=out, flush=True)
    return result


def _batch(model: Model, prompts: list[str], options: Mapping[str, Any], arguments: argparse.Namespace, out: TextIO) -> None:
    """Answer many prompts, a batch at a time; what is done is written before the next begins."""
    ids = [_encoded(model, prompt, number, arguments.input_file) for number, prompt in enumerate(prompts)]
    results: list[Generation] = []
    start = time.perf_counter()
    for first in range(0, len(prompts), MAX_BATCH):
        done = model.generate(ids[first : first + MAX_BATCH], **options)
        for number, result in enumerate(done, first):
            if arguments.json:
                print(json.dumps({"prompt": prompts[number], **_fields(result)}, ensure_ascii=False), file=out)
            else:
                print(("\n" if number else "") + result.text, file=out)
        out.flush()
        results += done
    counts = ("prompt_tokens", "new_tokens", "drafted", "accepted", "steps")
    total = {name: sum(r.stats[name] for r in results) for name in counts}
    total["ttft_s"] = results[0].stats["ttft_s"]
    total["decode_tok_s"] = total["new_tokens"] / (time.perf_counter() - start)
    print(statistics(total), file=sys.stderr)


def _encoded(model: Model, prompt: str, number: int, file: str | None) -> list[int]:
    """The prompt's ids, checked: one that is too long is an error that names its line, before any other is answered."""
    try:
        return model.prompt_ids(prompt)
    except UsageError as error:
        raise UsageError(f"{file}:{number + 1}: {error}" if file else str(error)) from error


def _fields(result: Generation) -> dict[str, Any]:
    return {"text": result.text, "ids": result.ids, "finish_reason": result.finish_reason, "stats": result.stats}
