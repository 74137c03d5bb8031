"""Kernels: linked from the cache or compiled on the first call for the types of their arguments, and run by a team of threads.

A kernel is a function of (team, me, crew, arguments..), which every thread of a crew calls: `team` is memory that they share
(see kernels/atoms.py), `me` the thread's number below `crew`. Arguments travel as one block of int64 words, so that a call
costs the same for every kernel, and threads need no more than its address.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import struct
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np

from dsv3_cpu import ahead, objects, team
from dsv3_cpu.progress import compiling


class Kernel:
    """A kernel, by its name below dsv3_cpu.kernels ("product.grouped"), and its programs, one for each types of arguments.

    A signature is a string with a letter code per argument: an array is its dtype and dimensions ("u2:3", "f4:1"), an integer
    "i", a number "f". `function`: of a kernel that is not this package's; its programs are not kept on disk.
    """

    def __init__(self, name: str, function: Callable[..., Any] | None = None) -> None:
        self.name, self._function = name, function
        self._programs: dict[str, int] = {}

    def program(self, signature: str) -> int:
        """The address of the program, read from the cache or compiled if it is not there yet."""
        found = self._programs.get(signature)
        if found is None:
            with _loading:
                found = self._programs[signature] = self._load(signature)
                used.append((self.name, signature))
        return found

    def _load(self, signature: str) -> int:
        name = program_name(self.name, signature)
        if self._function is not None:
            return objects.link(name, _compiled(lambda: self._function, signature, name))
        return loaded(name, lambda: _compiled(lambda: defined(self.name), signature, name))

    def __call__(self, work: int, *arguments: Any) -> None:
        """Runs over arrays, integers and floats. work: how much it is, see `team.run`."""
        team.hold(*arguments)
        team.run(self.program(signature_of(arguments)), work, words_of(*arguments))


def exported(function: str) -> Callable[..., int]:
    """A function of EXPORTED as something that Python calls, without Python's lock."""
    words = EXPORTED[function]
    name = program_name(function, str(words))

    def make() -> bytes:
        from dsv3_cpu import compile

        return compile.exported(defined(function), words, name)

    with _loading:
        address = loaded(name, lambda: _watched(make))
    return ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * words)(address)


# Functions that are called without a block of arguments, and of how many int64 each is.
EXPORTED = {"crew.run_all": 4, "crew.join": 4, "crew.work": 4, "crew.alone": 3, "crew.wake": 1}


def program_name(kernel: str, signature: str) -> str:
    """What a program is called in its object, and what tells it apart."""
    return f"dsv3_{kernel}_{signature}".translate(_IN_NAMES)


def defined(kernel: str) -> Callable[..., Any]:
    """The function that a kernel's name stands for."""
    module, _, function = kernel.partition(".")
    found: Callable[..., Any] = getattr(importlib.import_module(f"dsv3_cpu.kernels.{module}"), function)
    return found


def _compiled(function: Callable[[], Any], signature: str, name: str) -> bytes:
    def make() -> bytes:
        from dsv3_cpu import compile

        return compile.program(function(), signature, name)

    return _watched(make)


def _watched(make: Callable[[], bytes]) -> bytes:
    """make(), which may take a while."""
    with compiling():
        code: bytes = _in_a_thread(make)
    return code


def loaded(name: str, make: Callable[[], bytes]) -> int:
    """The address of a C function: its object from the cache, else made and kept there; by one process at a time."""
    code = objects.read(name)
    if code is None:
        with ahead.alone(name):
            code = objects.read(name)  # another process may just have made it
            if code is None:
                code = make()
                objects.keep(name, code)
    return objects.link(name, code)


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


_loading = threading.RLock()
used: list[tuple[str, str]] = []  # (kernel, signature) of every program of this process
_IN_NAMES = str.maketrans({":": "_", ",": "_", ".": "_"})


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
