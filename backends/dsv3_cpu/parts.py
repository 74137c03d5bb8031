"""How functions are compiled that only kernels call: as far as a kernel needs them to be, and no further.

numba makes machine code of every function by itself, and optimises it by itself, before the kernel that calls it is optimised
as a whole and made machine code of once more. Left out here, that is half of the time of a first start. What is overridden is
not numba's public interface; where a version of it has other names, it does as it always does.
"""

from __future__ import annotations

from itertools import count
from typing import Any

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler

_numbers = count()


class _Library(JITCodeLibrary):
    """A library that is only ever linked into another."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True


class Part(Compiler):
    """numba's compiler, without the steps after the function's own."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        state = self.state
        if state.library is None:
            state.library = _Library(state.targetctx.codegen(), f"dsv3_cpu.part{next(_numbers)}")
            state.library.enable_object_caching()
        state.flags.no_compile = True

    def compile_extra(self, func: Any) -> Any:
        target = self.state.targetctx
        # numba wants something that Python could call, and knows the function by it: a method of a new list is like no other.
        made = super().compile_extra(func)._replace(entry_point=[].append)
        target.insert_user_function(made.entry_point, made.fndesc, [made.library])
        return made
