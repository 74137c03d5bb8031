"""Call sites: where the graph calls an operator, and what it was seen to call it with.

A `Site` is a list with one callable per token bucket, so that a call costs a list index and a call:
`site[bucket](x=x, ...)`. The graph is run twice on meta tensors, with 1 and with 2 tokens, while every site records
its arguments. Shapes, dtypes and weights of all calls are then known from the graph itself, and sizes at any number
of tokens by extrapolation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dsv3.ops import OpSpec, spec
from dsv3.ops.spec import STEP_DIMS
from dsv3.plugin import LatentCache, Prepared


class Site(list[Callable[..., Any]]):
    """One place in the graph that calls an operator."""

    def __init__(self, op: str, where: str) -> None:
        super().__init__()
        self.op = op
        self.where = where
        self.seen: list[list[Mapping[str, Any]]] = [[], []]

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Site({self.op} at {self.where})"


class Sites:
    """All call sites of a graph. Calling it declares one: `sites("rms_norm", "layers.0.input_layernorm")`."""

    def __init__(self) -> None:
        self.all: list[Site] = []

    def __call__(self, op: str, where: str) -> Site:
        spec(op)
        site = Site(op, where)
        self.all.append(site)
        return site

    @contextmanager
    def recording(self, run: int) -> Iterator[None]:
        """While open, every site answers in shapes only and keeps its arguments as those of run 0 (one token) or 1."""
        for site in self.all:
            site[:] = [_recorder(site.op, site.seen[run])]
        yield
        for site in self.all:
            site.clear()

    def calls(self) -> list[int]:
        """How many calls each site has recorded."""
        return [sum(map(len, site.seen)) for site in self.all]

    def called_since(self, before: list[int]) -> set[Site]:
        """The sites that were called since `calls()` gave that."""
        return {site for site, now, then in zip(self.all, self.calls(), before, strict=True) if now > then}


def _recorder(op: str, seen: list[Mapping[str, Any]]) -> Callable[..., Any]:
    known = spec(op)

    def record(**arguments: Any) -> Any:
        if len(arguments) != len(known.parameters):  # a bound kernel gets what its caller passes, and nothing else
            missing = [p for p in known.parameters if p not in arguments]
            raise TypeError(f"{op} is called without {', '.join(missing)}; callers of bound operators pass every argument")
        seen.append(arguments)
        return known.meta(arguments)

    return record


class RecordingOps:
    """What a decomposition gets as `ops` while it is traced."""

    def __init__(self) -> None:
        self.seen: dict[str, list[Mapping[str, Any]]] = {}

    def __getattr__(self, op: str) -> Callable[..., Any]:
        return _recorder(op, self.seen.setdefault(op, []))


@dataclass(frozen=True)
class Example:
    """One recorded call: its sizes at T tokens are base + slope * T; those of ragged dimensions at most that."""

    op: str
    base: Mapping[str, int]
    slope: Mapping[str, int]
    ragged: frozenset[str]
    dtypes: Mapping[str, str]
    quant: str
    weights: Mapping[str, Prepared]
    arguments: tuple[Mapping[str, Any], Mapping[str, Any]]

    def dims(self, tokens: int) -> dict[str, int]:
        return {name: self.base[name] + self.slope[name] * tokens for name in self.base}

    @functools.cached_property
    def key(self) -> Hashable:
        """Equal for calls that a kernel cannot tell apart when it is bound."""
        return (*self.base.items(), *self.slope.items(), *self.dtypes.items(), self.quant)

    @property
    def shape_key(self) -> tuple[int, ...]:
        """What tells calls of one operator within one decomposition apart at run time: see `switch_key`."""
        return switch_key(spec(self.op), self.arguments[0])


def switch_key(known: OpSpec, arguments: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of the first weight, else the trailing shape of the first tensor."""
    for term in known.terms:
        if term.kind == "{" and (value := term.find(arguments)) is not None:
            return tuple(value.shape)
    for term in known.terms:
        if term.kind == "[" and (value := term.find(arguments)) is not None:
            return tuple(value.shape[1:])
    return ()


def switch_on(
    known: OpSpec, calls: list[Mapping[str, Any]], table: Mapping[tuple[int, ...], Callable[..., Any]]
) -> Callable[..., Any]:
    """A callable that calls table[switch_key(call)]. What the key is read from is settled here, not at every call."""
    for term in known.terms:
        if term.kind == "{" and "." not in term.path and all(isinstance(call.get(term.path), Prepared) for call in calls):
            weight = term.path
            return lambda **arguments: table[arguments[weight].shape](**arguments)
        if term.kind == "{" and any(term.find(call) is not None for call in calls):
            break
    return lambda **arguments: table[switch_key(known, arguments)](**arguments)


def examples(op: str, first: list[Mapping[str, Any]], second: list[Mapping[str, Any]]) -> list[Example]:
    """The recorded calls of an operator with 1 and with 2 tokens, paired in order; equal ones only once."""
    if len(first) != len(second):
        raise RuntimeError(f"{op} was called {len(first)} times with 1 token and {len(second)} times with 2")
    found: dict[Any, Example] = {}
    for one, two in zip(first, second, strict=True):
        example = _example(op, one, two)
        weights = tuple((path, id(w)) for path, w in example.weights.items())
        key = (*sorted(example.base.items()), *sorted(example.dtypes.items()), example.quant, weights)
        found.setdefault(key, example)
    return list(found.values())


def _example(op: str, one: Mapping[str, Any], two: Mapping[str, Any]) -> Example:
    known = spec(op)
    d1, d2 = known.bind(one), known.bind(two)
    slope = {name: d2[name] - size for name, size in d1.items()}
    ragged = {"S"} if slope.get("S") == 0 else set()
    for name in ragged:  # a step of T tokens is of 1 to T sequences
        d1[name], slope[name] = 1, 1
    known_dims = [name for name in d1 if name not in STEP_DIMS or name == "S"]
    base = {name: d1[name] - slope[name] for name in known_dims}
    dtypes, quant = described(known, one)
    weights = {t.path: value for t in known.terms if isinstance(value := t.find(one), Prepared)}
    slope = {name: slope[name] for name in known_dims}
    return Example(op, base, slope, frozenset(ragged), dtypes, quant, weights, (one, two))


def described(known: OpSpec, arguments: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """What a `Call` says of the arguments beside their sizes: the dtype of each tensor, and the scheme of the weights."""
    dtypes: dict[str, str] = {}
    quants = set()
    for term in known.terms:
        value = term.find(arguments)
        if isinstance(value, torch.Tensor):
            dtypes[term.path] = _name(value.dtype)
        elif isinstance(value, LatentCache):
            dtypes[term.path] = _name(value.ckv.dtype)
        elif isinstance(value, Prepared):
            dtypes[term.path] = _name(value.tensors["weight"].dtype)
            quants.add(value.quant)
    dtypes |= {name: arguments[name] for name in ("dtype", "out_dtype") if isinstance(arguments.get(name), str)}
    quants.discard("none")
    return dtypes, min(quants) if quants else "none"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
