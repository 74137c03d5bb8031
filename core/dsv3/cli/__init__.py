"""The command line. Nothing heavy is imported before a command that needs it: `dsv3 --help` answers at once."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dsv3.cli.arguments import COMMANDS, build_parser
from dsv3.cli.streams import one_line, open_streams
from dsv3.errors import Dsv3Error, KernelWarning
from dsv3.settings import resolve


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 1 failure, 2 usage, 3 backend, 4 checkpoint, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    open_streams()
    debug = "--debug" in arguments[: arguments.index("--")] if "--" in arguments else "--debug" in arguments
    try:
        parsed = build_parser().parse_args(arguments)
        parsed.whole_process = argv is None  # the process ends with this command
        if parsed.command != "doctor":  # which shows what is wrong with settings
            debug = bool(resolve(vars(parsed))["debug"].value)
        command = importlib.import_module(f"dsv3.cli.{COMMANDS[parsed.command][0]}")
        with _plain_warnings():
            code = int(command.main(parsed) or 0)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse: --help and --version
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left; say nothing more, also not at exit
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 141
    except Exception as error:  # the last resort: a person, not a traceback, is on the other side
        if debug:
            raise
        if isinstance(error, Dsv3Error):
            print(f"error: {one_line(str(error))}", file=sys.stderr)
            return error.exit_code
        text = one_line(f"{type(error).__name__}: {error}")
        print(f"error: {text}; add --debug for the traceback", file=sys.stderr)
        return 1


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """What the program itself warns of is one line for a person, without the place in its source."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def plain(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, KernelWarning):
                print(f"dsv3: warning: {one_line(str(message))}", file=sys.stderr)
            else:
                show(message, category, *where, **more)

        warnings.showwarning = plain
        yield
