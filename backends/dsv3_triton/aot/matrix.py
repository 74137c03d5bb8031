"""The hook that `dsv3 bench aot` calls: launches recorded from calls on meta tensors, then compiled, inspected and judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import triton
from torch import Tensor

from dsv3_triton.aot.build import build
from dsv3_triton.aot.expect import violations
from dsv3_triton.aot.inspect import inspect
from dsv3_triton.facts import ARCHITECTURES
from dsv3_triton.launch import recording


class Matrix:
    """Binaries of one architecture, each compiled once. cache: the folder for Triton's own files."""

    def __init__(self, arch: str, cache: str) -> None:
        triton.knobs.cache.dir = cache
        self.facts = ARCHITECTURES[arch]
        self._known: set[tuple[Any, ...]] = set()

    def rows(self, call: Callable[[], Any]) -> Iterator[dict[str, Any]]:
        """A row per binary that the call on meta tensors would start and that was not compiled yet: kernel, constants, what
        `inspect.Binary` holds, "violations", or "error" where it does not compile."""
        launches: list[tuple[Any, ...]] = []
        with recording(lambda *launch: launches.append(launch)):
            call()
        for kernel, _, args, constants in launches:
            dtypes = [_name(a) for a in args if isinstance(a, Tensor)]
            numbers = tuple((a == 1, a % 16 == 0) if isinstance(a, int) else None for a in args)
            key = (kernel.fn, tuple(dtypes), numbers, tuple(sorted(constants.items())))
            if key in self._known:
                continue
            self._known.add(key)
            row: dict[str, Any] = {
                "kernel": kernel.fn.__name__,
                "constants": {k: v if isinstance(v, int | float | str) else str(v) for k, v in constants.items()},
                "dtypes": dtypes,
            }
            try:
                binary = inspect(build(kernel, args, constants, self.facts.arch), self.facts)
            except Exception as error:  # noqa: BLE001  whatever a compiler raises is the row's result
                row |= {"error": f"{type(error).__name__}: {error}"[:300], "violations": ["expected a binary"]}
            else:
                row |= asdict(binary)
                row["violations"] = violations(kernel.fn.__name__, constants, dtypes, binary, self.facts)
            yield row


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
