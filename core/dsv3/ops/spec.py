"""Registration of operators: specification, reference and decomposition side by side.

`@primitive(line)` makes a torch function the reference of an operator. `@composite(line)` makes a function of `(ops, ...)`
its decomposition; the reference is then the decomposition over the references. Either way the module's public function is
the reference behind the checks of `shapes`.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dsv3.errors import UsageError, nearest
from dsv3.ops.shapes import Line, Term, meta_outputs

_INVARIANTS = "Invariants:"
# Dimensions that change between steps other than with the number of tokens: unknown when kernels are bound.
STEP_DIMS = frozenset({"S", "Tk", "L", "pages", "page_size", "slots", "maxp"})


@dataclass(frozen=True)
class OpSpec:
    """One operator of the contract. `reference` checks its arguments; `decompose` (composites only) calls other operators
    through its first argument. `since` is the version of the specification. `portable`: the reference is the real thing
    on every device, so that using it is no fallback. `on_host`: the decomposition reads tensors on the host: a step with it
    cannot be captured."""

    name: str
    since: int
    signature: str
    mutates: tuple[str, ...]
    dims: tuple[str, ...]
    reference: Callable[..., Any]
    decompose: Callable[..., Any] | None
    line: Line
    defaults: Mapping[str, Any]
    parameters: tuple[str, ...]
    portable: bool = False
    on_host: bool = False

    def bind(self, arguments: Mapping[str, Any]) -> dict[str, int]:
        """Sizes of the dimensions of a call; OperatorError if the arguments do not fit."""
        return self.line.bind(self.name, arguments)

    def meta(self, arguments: Mapping[str, Any]) -> Any:
        """What a call returns, as meta tensors, from its shapes and dtypes alone: the operator's fake implementation."""
        return meta_outputs(self.name, self.line, arguments)

    @property
    def description(self) -> str:
        """What it computes: the reference's docstring, without its invariants."""
        return inspect.cleandoc(self.reference.__doc__ or "").partition(_INVARIANTS)[0].strip()

    @property
    def invariants(self) -> tuple[str, ...]:
        """What holds for every right kernel, whatever its arithmetic: the list at the end of the reference's docstring."""
        lines = inspect.cleandoc(self.reference.__doc__ or "").partition(_INVARIANTS)[2].splitlines()
        return tuple(line.strip().removeprefix("- ") for line in lines if line.strip())

    @property
    def parts(self) -> tuple[str, ...]:
        """The operators that the decomposition calls, some of them for some arguments only; () for a primitive."""
        if self.decompose is None:
            return ()
        tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(self.decompose)))
        called = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
        called.sort(key=lambda n: (n.lineno, n.col_offset))
        return tuple(dict.fromkeys(n.attr for n in called if isinstance(n.value, ast.Name) and n.value.id == "ops"))

    @property
    def terms(self) -> tuple[Term, ...]:
        """The arguments with a shape."""
        return self.line.inputs

    @property
    def activation(self) -> str | None:
        """The argument whose dtype is the dtype of the outputs; None where all dtypes are fixed."""
        return next((t.path for t in self.terms if t.kind == "[" and t.dtype == "act"), None)

    @property
    def weights(self) -> tuple[str, ...]:
        """The arguments that are `Prepared` weights."""
        return tuple(t.path for t in self.terms if t.kind == "{")


_REGISTRY: dict[str, OpSpec] = {}


class _References:
    """The references by name: what a decomposition gets as `ops` where no backend is involved."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return spec(name).reference


REFERENCES = _References()


def spec(name: str) -> OpSpec:
    """The specification of an operator; UsageError names the closest match for an unknown one."""
    try:
        return _REGISTRY[name]
    except KeyError:
        raise UsageError(f"no operator is called {name!r}{nearest(name, _REGISTRY)}") from None


def names() -> list[str]:
    """All operators, in the order of the contract."""
    return list(_REGISTRY)


def primitive(
    line: str, mutates: tuple[str, ...] = (), portable: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated torch function as an operator's reference."""
    return lambda function: _register(function, line, mutates, composite=False, portable=portable)


def composite(
    line: str, mutates: tuple[str, ...] = (), on_host: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function of (ops, ...) as an operator's decomposition."""
    return lambda function: _register(function, line, mutates, composite=True, on_host=on_host)


def _register(
    function: Callable[..., Any],
    line: str,
    mutates: tuple[str, ...],
    composite: bool,
    portable: bool = False,
    on_host: bool = False,
) -> Callable[..., Any]:
    name = function.__name__
    parsed = Line.parse(line)
    parameters = list(inspect.signature(function).parameters.values())[1 if composite else 0 :]
    order = tuple(p.name for p in parameters)
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    call = functools.partial(function, REFERENCES) if composite else function

    @functools.wraps(function)
    def reference(*args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(order, args, strict=False)), **kwargs} if args else kwargs
        if len(arguments) == len(args) + len(kwargs) <= len(order):  # otherwise the call below says what is wrong
            parsed.bind(name, {**defaults, **arguments})
        return call(*args, **kwargs)

    reference.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    del reference.__wrapped__
    _REGISTRY[name] = OpSpec(
        name=name,
        since=1,
        signature=_signature(name, parameters, line, mutates),
        mutates=mutates,
        dims=parsed.names,
        reference=reference,
        decompose=function if composite else None,
        line=parsed,
        defaults=defaults,
        parameters=order,
        portable=portable,
        on_host=on_host,
    )
    return reference


def _signature(name: str, parameters: list[inspect.Parameter], line: str, mutates: tuple[str, ...]) -> str:
    words = [word for word in line.partition("->")[0].split() if "=" not in word]
    written = {t.split("[")[0].split("{")[0].split("<")[0]: t for t in words}
    arguments = []
    for p in parameters:
        text = written.get(p.name, p.name) + ("!" if p.name in mutates else "")
        arguments.append(text if p.default is p.empty else f"{text}={p.default!r}")
    return f"{name}({', '.join(arguments)}) -> {line.partition('->')[2].strip()}"
