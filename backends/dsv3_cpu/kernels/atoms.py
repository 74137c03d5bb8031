"""What threads that run one kernel together need: numbers shared in memory, a way to wait, a call by address.

A team's memory is laid out in constants.py.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from dsv3_cpu.compile import strict
from dsv3_cpu.constants import ARRIVED, COUNTERS, LINE, PASSED

_WORD = ir.IntType(64)
_X86, _ARM = ("x86_64", "AMD64"), ("aarch64", "arm64")
_PATIENCE = 2000  # pauses before a waiting thread gives its processor away between looks


_yield = types.ExternalFunction("dsv3_yield", types.int32())


@intrinsic
def load(typing, address):
    """The word there, as the thread that wrote it last left it."""

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(builder.inttoptr(arguments[0], _WORD.as_pointer()), "seq_cst", 8)

    return types.intp(types.intp), generate


@intrinsic
def store(typing, address, value):
    """Writes a word for all to see."""

    def generate(context, builder, signature, arguments):
        builder.store_atomic(arguments[1], builder.inttoptr(arguments[0], _WORD.as_pointer()), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@intrinsic
def add(typing, address, value):
    """Adds to a word -> what it was before."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", builder.inttoptr(arguments[0], _WORD.as_pointer()), arguments[1], "seq_cst")

    return types.intp(types.intp, types.intp), generate


@intrinsic
def exchange(typing, address, value):
    """Writes a word -> what it was before."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("xchg", builder.inttoptr(arguments[0], _WORD.as_pointer()), arguments[1], "seq_cst")

    return types.intp(types.intp, types.intp), generate


@intrinsic
def pause(typing):
    """Tells the processor that this is a waiting loop."""

    def generate(context, builder, signature, arguments):
        machine, nothing = platform.machine(), ir.VoidType()
        if machine in _X86:
            builder.call(
                cgutils.get_or_insert_function(builder.module, ir.FunctionType(nothing, []), "llvm.x86.sse2.pause"), []
            )
        elif machine in _ARM:
            hint = ir.FunctionType(nothing, [ir.IntType(32)])
            builder.call(
                cgutils.get_or_insert_function(builder.module, hint, "llvm.aarch64.hint"), [ir.Constant(ir.IntType(32), 1)]
            )
        return context.get_dummy_value()

    return types.void(), generate


def prefetch(b: Any, address: Any, near: bool = True) -> None:
    """Asks for the line at an address: to be read, and kept nearest to the core, or near."""
    pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
    ask = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    b.call(ask, [b.inttoptr(address, pointer), *(ir.Constant(number, n) for n in (0, 3 if near else 2, 1))])


@intrinsic
def fetch(typing, address):
    """Asks memory for the line there, to be kept near."""

    def generate(context, builder, signature, arguments):
        prefetch(builder, arguments[0], near=False)
        return context.get_dummy_value()

    return types.void(types.intp), generate


@intrinsic
def call(typing, program, arguments, team, me, crew):
    """Calls a compiled program by its address -> its status, 0 unless it failed."""

    def generate(context, builder, signature, values):
        kind = ir.FunctionType(_WORD, [_WORD] * 4)
        return builder.call(builder.inttoptr(values[0], kind.as_pointer()), values[1:])

    return types.intp(*[types.intp] * 5), generate


@intrinsic
def word(typing, team, index):
    """The address of a word of a team's memory."""

    def generate(context, builder, signature, arguments):
        at = context.cast(builder, arguments[1], index, types.intp)
        return builder.add(arguments[0], builder.mul(at, ir.Constant(_WORD, 8)))

    return types.intp(types.intp, index), generate


@strict
def rest(spins):
    """Waits a moment: the longer the wait so far, the less it keeps others from running."""
    pause()
    if spins > _PATIENCE:
        _yield()


@intrinsic
def take(typing, team, phase):
    """The next piece of work of a phase: 0, 1, 2 and so on over all threads."""

    def generate(context, builder, signature, arguments):
        line = builder.mul(context.cast(builder, arguments[1], phase, types.intp), ir.Constant(_WORD, 8 * LINE))
        at = builder.add(builder.add(arguments[0], ir.Constant(_WORD, 8 * COUNTERS)), line)
        return builder.atomic_rmw("add", builder.inttoptr(at, _WORD.as_pointer()), ir.Constant(_WORD, 1), "seq_cst")

    return types.intp(types.intp, phase), generate


@strict
def wait_for_all(team, crew):
    """Returns when every thread of the crew has called it."""
    if crew == 1:
        return
    passed = load(word(team, PASSED))
    if add(word(team, ARRIVED), 1) == crew - 1:
        store(word(team, ARRIVED), 0)
        store(word(team, PASSED), passed + 1)
        return
    spins = 0
    while load(word(team, PASSED)) == passed:
        spins += 1
        rest(spins)
