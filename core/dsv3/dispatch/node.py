"""The calls behind a decision: an operator with everything it must serve, and, for a composite, what its parts must serve."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from dsv3.dispatch.site import Example, RecordingOps, examples
from dsv3.ops import spec


class Node:
    """An operator with all the calls it must serve, and, for a composite, the calls its decomposition makes."""

    def __init__(self, op: str, calls: list[Example]) -> None:
        self.op = op
        self.calls = calls

    @functools.cached_property
    def children(self) -> dict[str, Node]:
        decompose = spec(self.op).decompose
        if decompose is None:
            return {}
        first: dict[str, list[Any]] = {}
        second: dict[str, list[Any]] = {}
        for call in self.calls:
            for collected, arguments in zip((first, second), call.arguments, strict=True):
                ops = RecordingOps()
                decompose(ops, **arguments)
                for op, seen in ops.seen.items():
                    collected.setdefault(op, []).extend(seen)
        return {op: Node(op, examples(op, first[op], second[op])) for op in first}

    @functools.cached_property
    def groups(self) -> dict[tuple[int, ...], Node]:
        """The calls by `switch_key`; a node of one shape is its own only group."""
        found: dict[tuple[int, ...], list[Example]] = {}
        for call in self.calls:
            found.setdefault(call.shape_key, []).append(call)
        return {key: self if len(found) == 1 else Node(self.op, calls) for key, calls in found.items()}

    @functools.cached_property
    def inner(self) -> set[str]:
        """All operators below this one."""
        return {node.op for child in self.children.values() for node in child.walk()}

    @functools.cached_property
    def passed_on(self) -> set[int]:
        """Ids of the weights that the decomposition hands to its parts."""
        return {id(w) for child in self.children.values() for call in child.calls for w in call.weights.values()}

    def walk(self) -> Iterator[Node]:
        """This node and all below it."""
        yield self
        for child in self.children.values():
            yield from child.walk()
