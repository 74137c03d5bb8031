"""Kernels: compiled on the first call for the types of their arguments, and run by a team of threads.

A kernel is a function of (team, me, crew, arguments..), which every thread of a crew calls: `team` is memory that they share
(see kernels/atoms.py), `me` the thread's number below `crew`. Arguments travel as one block of int64 words, so that a call
costs the same for every kernel, and threads need no more than its address.
"""

from __future__ import annotations

import functools
import struct
import threading
import types
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numba
import numpy as np

from dsv3_cpu import team
from dsv3_cpu.ahead import alone
from dsv3_cpu.compile import cached, inner
from dsv3_cpu.kernels.arguments import unpacker
from dsv3_cpu.progress import compiling

_PROGRAM = numba.void(*[numba.types.intp] * 4)


def _entry(block: int, team: int, me: int, crew: int) -> None:
    """What a program is: the kernel with its arguments read from their block. Its globals are set for each program."""
    _kernel(team, me, crew, *_unpack(block))  # type: ignore[name-defined]  # noqa: F821


class Kernel:
    """A kernel and its programs, one for each types of arguments.

    A signature is a string with a letter code per argument: an array is its dtype and dimensions ("u2:3", "f4:1"), an integer
    "i", a number "f".
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._programs: dict[str, Any] = {}

    def program(self, signature: str) -> int:
        """The address of the program, compiled or read from the cache if it is not there yet."""
        found = self._programs.get(signature)
        if found is None:
            with _compiling:
                found = self._programs[signature] = self._compile(signature)
                used.append((self._function.__module__, self._function.__name__, signature))
        address: int = found.address
        return address

    def name_of(self, signature: str) -> str:
        """What tells programs apart."""
        return f"{self._function.__module__}.{self._function.__name__}_{signature.translate(_IN_NAMES)}"

    def _compile(self, signature: str) -> Any:
        f, name = self._function, self.name_of(signature)
        scope = {"_kernel": inner(f), "_unpack": unpacker(signature)}
        entry = types.FunctionType(_entry.__code__, scope, name.rpartition(".")[2])
        # numba's cache tells functions apart by module, qualified name and line.
        entry.__qualname__, entry.__module__ = name, __name__
        with compiling(), alone(name):
            return _in_a_thread(lambda: cached(lambda cache: numba.cfunc(_PROGRAM, cache=cache, error_model="numpy")(entry)))

    def __call__(self, work: int, *arguments: Any) -> None:
        """Runs over arrays, integers and floats. work: how much it is, see `team.run`."""
        team.run(self.program(signature_of(arguments)), work, words_of(*arguments))


def _in_a_thread(make: Callable[[], Any]) -> Any:
    """make(), which Ctrl-C does not reach; the caller, who waits, is interrupted at once. LLVM's callbacks would lose it."""
    found: list[Any] = []
    errors: list[BaseException] = []

    def keep(kind: Any, error: BaseException | None, trace: Any) -> bool:
        if error is not None:
            errors.append(error)
        return True

    def run() -> None:
        with ExitStack() as stack:
            stack.push(keep)
            found.append(make())

    worker = threading.Thread(target=run, name="dsv3-cpu-compiler", daemon=True)
    worker.start()
    worker.join()
    if errors:
        raise errors[0]
    return found[0]


_compiling = threading.RLock()
used: list[tuple[str, str, str]] = []  # (module, kernel, signature) of every program of this process
_IN_NAMES = str.maketrans({":": "_", ",": "_"})


def signature_of(arguments: tuple[Any, ...]) -> str:
    """See `Kernel`."""
    return ",".join(_code(argument) for argument in arguments)


def _code(argument: Any) -> str:
    if isinstance(argument, np.ndarray):
        return f"{argument.dtype.kind}{argument.dtype.itemsize}:{argument.ndim}"
    return "f" if isinstance(argument, float) else "i"


def words_of(*arguments: Any) -> tuple[int, ...]:
    """Arguments as the words of a block."""
    found: list[int] = []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            found.append(argument.ctypes.data)
            found += argument.shape
        else:
            found.append(float_word(argument) if isinstance(argument, float) else int(argument))
    return tuple(found)


@functools.lru_cache(4096)
def float_word(value: float) -> int:
    """A float64's bits."""
    word: int = struct.unpack("q", struct.pack("d", value))[0]
    return word


def kernel(function: Callable[..., Any]) -> Kernel:
    """The decorated function of (team, me, crew, arguments..) as a kernel."""
    return Kernel(function)
