"""Weights in the canonical layout for what cannot read another: each is undone once, by the backend that prepared it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from dsv3.dispatch.guard import root_cause
from dsv3.dispatch.wellformed import prepared_mistake
from dsv3.errors import BackendUnavailable
from dsv3.plugin import Backend, Prepared

T = TypeVar("T")


class PerWeight(Generic[T]):
    """A value per weight object, kept as long as the weight lives."""

    def __init__(self, make: Callable[..., T]) -> None:
        self._make = make
        self._kept: dict[int, tuple[weakref.ref[Prepared], T]] = {}

    def of(self, weight: Prepared, *more: Any) -> T:
        key = id(weight)
        found = self._kept.get(key)
        if found is None or found[0]() is not weight:
            found = (weakref.ref(weight, lambda _: self._kept.pop(key, None)), self._make(weight, *more))
            self._kept[key] = found
        return found[1]


def unprepared(weight: Prepared, backend: Backend) -> Prepared:
    """The weight in its canonical layout; BackendUnavailable, root cause first, if its backend cannot undo its own."""
    if weight.layout == "canonical":
        return weight
    what = f"undoing layout {weight.layout!r} of a weight {list(weight.shape)} {weight.quant} by backend {backend.name!r}"
    try:
        plain = backend.unprepare(weight)
    except Exception as error:
        raise BackendUnavailable(f"{root_cause(error)} ({what})") from error
    if mistake := prepared_mistake(plain, weight, "canonical"):
        raise BackendUnavailable(f"{what} gave {mistake}")
    return plain


def with_canonical(
    function: Callable[..., Any], owners: Mapping[str, Backend], undone: PerWeight[Prepared]
) -> Callable[..., Any]:
    """`function`, called with these weights (argument path -> backend that prepared it) in the canonical layout."""

    def call(**arguments: Any) -> Any:
        for path, backend in owners.items():
            head, _, member = path.partition(".")
            value = arguments[head]
            if member:
                arguments[head] = {**value, member: undone.of(value[member], backend)}
            elif value is not None:
                arguments[head] = undone.of(value, backend)
        return function(**arguments)

    return call
