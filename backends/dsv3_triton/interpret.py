"""Kernels in Triton's interpreter, on CPU tensors: values and indexing as on a device, without its rounding in tensor cores.

The interpreter is meant to be chosen for a whole process, by a variable that must be set before triton is imported. Here a
kernel is interpreted whenever its tensors are on the CPU, in a process that may compile others: for the time of a launch,
functions that kernels call run as Python too.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, _patch_lang
from triton.runtime.jit import JITFunction

from dsv3_triton.interpret_formats import formats

_OPTIONS = frozenset({"num_warps", "num_stages", "num_ctas", "waves_per_eu", "matrix_instr_nonkdim", "kpack", "maxnreg"})
# A kernel's executor replaces what `tl` offers; Triton's own functions reach for the same through `tl.core`.
_CORE = SimpleNamespace(__globals__={"core": tl.core})
_interpreted: dict[Any, InterpretedFunction] = {}


def interpret(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: Mapping[str, Any]) -> None:
    """Run every program of the grid, one after the other."""
    function = _of(kernel)
    given = {name: value for name, value in constants.items() if name not in _OPTIONS}
    # Kernels may overflow, divide by zero and meet nothing but NaN, as devices do, without a word.
    with formats(), _inner_calls(), np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        GridExecutor(function.rewrite(), function.arg_names, grid, [])(*args, **given)


def _of(kernel: Any) -> InterpretedFunction:
    if isinstance(kernel, InterpretedFunction):  # TRITON_INTERPRET was set when the kernel was made
        return kernel
    found = _interpreted.get(kernel.fn)  # a JITFunction's own hash reads its source
    if found is None:
        found = _interpreted[kernel.fn] = InterpretedFunction(kernel.fn)
    return found


@contextlib.contextmanager
def _inner_calls() -> Iterator[None]:
    """Functions that a kernel calls, Triton's own among them, are interpreted as well."""
    before = JITFunction.__call__
    mode = triton.knobs.runtime.interpret
    JITFunction.__call__ = lambda self, *args, **kwargs: _of(self).rewrite()(*args, **kwargs)
    triton.knobs.runtime.interpret = True
    core = _patch_lang(_CORE)
    try:
        yield
    finally:
        core.restore()
        JITFunction.__call__ = before
        triton.knobs.runtime.interpret = mode
