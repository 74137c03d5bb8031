"""Standard streams as a command finds them: closed, in another encoding, or shared with a plugin that prints."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from dsv3.errors import UsageError


def open_streams() -> None:
    """A stream that was closed before we started swallows what is written; no character is a reason to fail."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def text_stream(restore: bool) -> Iterator[TextIO]:
    """Where generated text goes, and nothing else: standard output, of which everybody else then has only standard
    error. A plugin, or a C library below it, may print at any time, also after the text is finished: `restore` gives
    standard output back, to a caller that goes on."""
    kept: Any = sys.stdout
    if not _is_process_output(kept):
        yield kept
        return
    kept.flush()
    private = os.dup(1)
    os.dup2(2, 1)
    out = open(private, "w", encoding=kept.encoding, errors="backslashreplace")  # noqa: SIM115
    try:
        yield out
        out.flush()
    finally:
        kept.flush()
        if restore:
            os.dup2(private, 1)
        with suppress(BrokenPipeError):
            out.close()


def _is_process_output(stream: TextIO | None) -> bool:
    """Whether this is the process's own standard output, and not what a test or an embedding program put there."""
    return stream is sys.__stdout__ and _is_descriptor(stream, 1) and _is_descriptor(sys.stderr, 2)


def _is_descriptor(stream: TextIO | None, number: int) -> bool:
    try:
        return stream is not None and stream.fileno() == number
    except (OSError, ValueError, AttributeError):
        return False


def read_stdin() -> str:
    """All of standard input. UsageError if it is closed or not UTF-8."""
    if sys.stdin is None:
        raise UsageError("standard input is closed; give a prompt")
    return decoded(sys.stdin.buffer.read(), "standard input")


def read_line(prompt: str) -> str | None:
    """One line of standard input, None at its end. On a terminal with a prompt and line editing. UsageError for a line that
    is not UTF-8."""
    if sys.stdin is None:
        return None
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  (input() edits lines where it is there)
        try:
            return input(prompt) + "\n"
        except EOFError:
            print(file=sys.stderr)
            return None
    raw = sys.stdin.buffer.readline()
    return decoded(raw, "the line") if raw else None


def decoded(raw: bytes, what: str) -> str:
    """Bytes as text; UsageError if they are not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{what} is not UTF-8 (byte {error.start}); encode it as UTF-8") from error


def one_line(text: str) -> str:
    """Text with its line ends folded: an error is one line."""
    return " ".join(text.split("\n")).replace("\r", " ")
