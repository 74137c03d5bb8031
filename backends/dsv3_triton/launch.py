"""Running a kernel where its tensors are.

GPU tensors: compiled once per combination of dtypes, constants and alignments, then started without Triton's own argument
handling. CPU tensors: Triton's interpreter, which is what emulation is. Meta tensors: nothing runs; a recorder in force is told
what would have been started.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from dsv3_triton.interpret import interpret

Grid = tuple[int, ...]
# (kernel, grid, arguments, constants and options)
Recorder = Callable[[Any, Grid, tuple[Any, ...], Mapping[str, Any]], None]
_recorders: list[Recorder] = []
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: Grid, *args: Any, **constants: Any) -> None:
    """Start `kernel` over `grid`, which is 1 to 3 positive numbers; a grid with a 0 starts nothing.

    args: the kernel's runtime arguments in order, tensors and numbers, at least one tensor. constants: its constexpr
    parameters, and the options num_warps, num_stages and those of AMD's compiler.
    """
    if 0 in grid:
        return
    for told in _recorders:
        told(kernel, grid, args, constants)
    device = next(a for a in args if isinstance(a, Tensor)).device
    if device.type == "cpu":
        interpret(kernel, grid, args, constants)
    elif device.type != "meta":
        _start(kernel, grid, args, constants, device.index)


@contextlib.contextmanager
def recording(told: Recorder) -> Iterator[None]:
    """`told` hears of every launch."""
    _recorders.append(told)
    try:
        yield
    finally:
        _recorders.remove(told)


def _start(kernel: Any, grid: Grid, args: tuple[Any, ...], constants: Mapping[str, Any], device: int) -> None:
    """Triton looks up devices, binds arguments and hashes them at every start, 5 to 20 us. What decides which binary a call
    takes is little: dtypes, whether pointers are multiples of 16, and the values that Triton specialises on."""
    if torch.cuda.current_device() != device:
        with torch.cuda.device(device):
            return _start(kernel, grid, args, constants, device)
    key = (kernel.fn, device, tuple(constants.items()), *map(_specialised, args))
    found = _compiled.get(key)
    if found is None:
        binary = kernel[grid](*args, enable_fp_fusion=True, **constants)
        tail = tuple(constants.get(p.name, p.default) for p in kernel.params[len(args) :])
        _compiled[key] = binary, tail
        return None
    binary, tail = found
    x, y, z = (*grid, 1, 1)[:3]
    stream = triton.runtime.driver.active.get_current_stream(device)
    binary.run(x, y, z, stream, binary.function, binary.packed_metadata, None, None, None, *args, *tail)
    return None


def _specialised(value: Any) -> Any:
    """What of an argument decides which binary takes it. Triton makes constants of 1 and code of its own for multiples of
    16, but for parameters that are marked as not specialised, where this only finds the same binary twice."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() & 15 == 0
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return (int, value == 1, value & 15 == 0, -(1 << 31) <= value < 1 << 31)
    return type(value)
