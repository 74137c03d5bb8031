"""The errors a user can meet, each with the exit code the command line ends with.

Every message says what failed, why, and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class Dsv3Error(Exception):
    """Any failure that dsv3 foresees."""

    exit_code = 1


class UsageError(Dsv3Error):
    """A wrong argument, an unknown variable, key or name."""

    exit_code = 2


class BackendUnavailable(Dsv3Error):
    """A backend, device or pinned kernel that was asked for cannot be had."""

    exit_code = 3


class KernelFailed(BackendUnavailable):
    """A kernel raised, and nothing may take its place. selection: "kernel", "op", "site", "shapes", "why" of the call."""

    def __init__(self, message: str, selection: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.selection: Mapping[str, Any] = dict(selection or {})


class KernelWarning(RuntimeWarning):
    """A kernel failed at its first call, and another runs instead."""


class CheckpointError(Dsv3Error):
    """A checkpoint that is not what its configuration says."""

    exit_code = 4


class UnsupportedModel(CheckpointError):
    """An architecture, field or quantisation that dsv3 does not run, by name."""


class OperatorError(UsageError, ValueError):
    """Arguments of an operator whose shapes, dtypes or values do not fit its specification."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest known word, else an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
