"""Running plugin code so that nothing it does can take the program down, short of killing the process."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TextIO, TypeVar

T = TypeVar("T")
IMPORT_LIMIT_S = 30.0
CALL_LIMIT_S = 2.0
LATE = "gave no answer within"


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What came of a guarded call: a value, or the exception; `late` if it was given up on."""

    value: T | None
    error: BaseException | None
    seconds: float
    late: bool = False


def guarded(call: Callable[[], T], limit_s: float, out: TextIO | None = None) -> Outcome[T]:
    """Run `call` in a thread of its own for at most limit_s seconds.

    Any exception is returned, SystemExit and KeyboardInterrupt raised by the plugin included. What it prints goes to `out`,
    else to stderr: stdout belongs to generated text. A call that does not return is left behind in a daemon thread.
    """
    result: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            result.append(call())
        except BaseException as error:  # kept and reported; a plugin's SystemExit must not end the program
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="dsv3-plugin")
    start = time.perf_counter()
    with contextlib.redirect_stdout(out or sys.stderr):
        thread.start()
        thread.join(limit_s)
    seconds = time.perf_counter() - start
    if thread.is_alive():
        return Outcome(None, TimeoutError(f"{LATE} {limit_s:g} s"), seconds, late=True)
    return Outcome(result[0] if result else None, errors[0] if errors else None, seconds)


def root_cause(error: BaseException) -> str:
    """The innermost cause as "Type: message": what a wrapper's message so often hides."""
    seen = {id(error)}
    while True:
        inner = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if inner is None or id(inner) in seen:
            break
        seen.add(id(inner))
        error = inner
    text = str(error) or "no message"
    return f"{type(error).__name__}: {text}"
