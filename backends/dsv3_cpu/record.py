"""A step as a list of what it ran: kernels' programs over the same words, and torch's operators over the same tensors.

Run again, it does without the Python between kernels, a quarter of a small model's decode step. All that it reads and writes
keeps its address: tensors that the step made live as long as the list.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv3_cpu import team

_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Recording(TorchDispatchMode):
    """While it is entered, what this thread runs is noted as well as run.

    An operator that makes a tensor is repeated into that tensor; one that answers with anything else, read on the host, cannot
    be: RuntimeError.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: to be hidden from torch's compiler costs its import, 2 seconds, and nothing here is compiled by it."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()
        self.held: list[Any] = []
        self._done: list[team.Call | Callable[[], Any]] = []

    def note(self, call: team.Call) -> None:
        self._done.append(call)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.held.append(out)
        schema = func._schema
        if schema.name.partition("::")[2] in _ALLOCATIONS:
            return out
        if schema.is_mutable:
            self._done.append(partial(func, *args, **kwargs))
            return out
        tensors = tuple(out) if isinstance(out, tuple | list) else (out,)
        if not all(isinstance(t, Tensor) for t in tensors):
            raise RuntimeError(f"{func} reads a number on the host")
        # Whether an operator made a view shows in where it lies; its schema says only that it may have.
        given = {_place(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        if not all(_place(t) in given for t in tensors):
            self._done.append(partial(_again, tensors, func, args, kwargs))
        return out

    def replay(self) -> Callable[[], None]:
        """What runs it all again."""
        parts: list[Callable[[], Any]] = []
        for programs, group in groupby(self._done, lambda done: isinstance(done, team.Call)):
            run: Any = tuple(group)
            parts += [partial(team.run_all, run)] if programs else run

        def again() -> None:
            with torch.inference_mode():
                for part in parts:
                    part()

        again.held = self.held  # type: ignore[attr-defined]
        return again


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _again(out: tuple[Tensor, ...], func: Any, args: Any, kwargs: Any) -> None:
    found = func(*args, **kwargs)
    for old, new in zip(out, found if isinstance(found, tuple | list) else (found,), strict=True):
        old.copy_(new)


def recorded(step: Callable[[], Any]) -> Callable[[], None]:
    """What repeats a step, which runs once."""
    recording = Recording()
    with torch.inference_mode(), team.recording(recording), recording:
        step()
    return recording.replay()
