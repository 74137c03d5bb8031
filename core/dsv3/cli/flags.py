"""Flags that several commands take, and the parser they are added to."""

from __future__ import annotations

import argparse
from typing import NoReturn

from dsv3.errors import UsageError, nearest
from dsv3.settings import SETTINGS


class Parser(argparse.ArgumentParser):
    """Whose mistakes are UsageErrors, with the nearest word."""

    def error(self, message: str) -> NoReturn:
        hint = ""
        if "invalid choice: " in message:
            word, *choices = message.split("invalid choice: ")[1].split("'")[1::2]
            hint = nearest(word, choices)
        raise UsageError(f"{message}{hint}; see {self.prog} --help")


def setting(parser: argparse.ArgumentParser, *names: str) -> None:
    """A flag for each setting."""
    for name in names:
        known = SETTINGS[name]
        flag = "--" + name.replace("_", "-")
        default = "" if known.default in (None, False) else f" (default: {known.default})"
        if isinstance(known.default, bool):
            parser.add_argument(flag, action="store_const", const=True, help=known.help)
        else:
            parser.add_argument(flag, type=known.convert, help=known.help + default, metavar=name.upper())


def formats(parser: argparse.ArgumentParser) -> None:
    """Which model, on what, in which number formats."""
    setting(parser, "model", "backend", "device", "dtype", "quant", "kv_dtype")
    parser.add_argument(
        "--emulate",
        nargs="?",
        const=True,
        metavar="ARCH",
        help="run the backend's kernels without its device, as on ARCH (after the prompt, or as --emulate=ARCH)",
    )


def placement(parser: argparse.ArgumentParser) -> None:
    """`formats`, and which kernels."""
    formats(parser)
    parser.add_argument(
        "--kernel", action="append", default=[], metavar="OP=BACKEND.KERNEL", help="pin an operator to a kernel; repeatable"
    )
    setting(parser, "strict")
