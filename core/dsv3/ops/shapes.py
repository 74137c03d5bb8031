"""The shape language of the operators: one line per operator that is checked, documented, and read by the dispatcher.

    x[T,K] w{N,K} bias[N]:f32? cache<pages,page_size,R,P> -> y[T,N]

`[..]` a tensor, `{..}` a `Prepared` weight (its logical shape), `<..>` a `LatentCache`, `:f32` a dtype class, `?` may
be None, `weights.q_a` a member of a mapping. A dimension is a name, an integer, or `2*I`, `T*k`, `R+P`,
`ceil(N/128)`; `[...]` is any shape (in outputs: that of the input of this name). `k=topk` and `M=T*k` name further
dimensions, from integer arguments or other dimensions; in outputs a name may also be an integer argument. Outputs
have the dtype of the first activation unless marked: `:f32` (float64 for float64), `:F32` (always), `:i32`, `:i8`,
`:fnuz`, `:dtype` (the argument `dtype` or `out_dtype`), `:kv` (that of cache.kpe).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dsv3.errors import OperatorError
from dsv3.plugin import LatentCache, Prepared

_TERM = re.compile(r"^(?P<path>[\w.]+)(?P<open>[\[{<])(?P<dims>[^\]}>]*)[\]}>](:(?P<dtype>\w+))?(?P<optional>\?)?$")
_FP8 = frozenset({torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz})
DTYPES: dict[str, frozenset[torch.dtype]] = {
    "act": frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16}),
    "f32": frozenset({torch.float32, torch.float64}),
    "int": frozenset({torch.int32, torch.int64}),
    "i8": frozenset({torch.int8}),
    "f8": _FP8,
}


@dataclass(frozen=True)
class Dim:
    """times * name + plus, or ceil(name / by), or name + other, or name * factor; `by` is a number or a name."""

    text: str
    name: str | None
    times: int = 1
    plus: int = 0
    other: str | None = None
    factor: str | None = None
    by: str | None = None

    @staticmethod
    def parse(text: str) -> Dim:
        if text.isdigit():
            return Dim(text, None, plus=int(text))
        if m := re.fullmatch(r"ceil\((\w+)/(\w+)\)", text):
            return Dim(text, m[1], by=m[2])
        if m := re.fullmatch(r"(\d+)\*(\w+)", text):
            return Dim(text, m[2], times=int(m[1]))
        if m := re.fullmatch(r"(\w+)\*(\w+)", text):
            return Dim(text, m[1], factor=m[2])
        if m := re.fullmatch(r"(\w+)\+(\d+)", text):
            return Dim(text, m[1], plus=int(m[2]))
        if m := re.fullmatch(r"(\w+)\+(\w+)", text):
            return Dim(text, m[1], other=m[2])
        if text == "...":
            return Dim(text, None)
        if not re.fullmatch(r"\w+", text):
            raise ValueError(f"not a dimension: {text!r}")
        return Dim(text, text)

    def value(self, dims: Mapping[str, int]) -> int | None:
        """The size, or None while a name in it is unbound."""
        if self.name is None:
            return self.plus
        if any(name not in dims for name in self.names):
            return None
        size = dims[self.name]
        if self.by is not None:
            return -(-size // (int(self.by) if self.by.isdigit() else dims[self.by]))
        if self.factor is not None:
            return size * dims[self.factor]
        return size * self.times + self.plus + (dims[self.other] if self.other else 0)

    @property
    def names(self) -> tuple[str, ...]:
        """The dimensions it is made of."""
        by = None if self.by is None or self.by.isdigit() else self.by
        return tuple(n for n in (self.name, self.other, self.factor, by) if n is not None)

    def solve(self, size: int, dims: dict[str, int]) -> None:
        """Bind the one unbound name from the size, where that has one answer."""
        if self.name is None or self.by is not None or self.factor is not None:
            return
        if self.other is not None:
            if (self.name in dims) != (self.other in dims):
                known, unknown = (self.name, self.other) if self.name in dims else (self.other, self.name)
                dims[unknown] = size - dims[known]
        elif self.name not in dims and (size - self.plus) % self.times == 0:
            dims[self.name] = (size - self.plus) // self.times


@dataclass(frozen=True)
class Term:
    """One argument of the line: where it is, its kind, its dimensions, its dtype class."""

    path: str
    kind: str
    dims: tuple[Dim, ...]
    dtype: str
    optional: bool

    @staticmethod
    def parse(text: str) -> Term:
        m = _TERM.match(text)
        if m is None:
            raise ValueError(f"not a shape term: {text!r}")
        dims = tuple(Dim.parse(d) for d in re.split(r",(?![^(]*\))", m["dims"]) if d)
        return Term(m["path"], m["open"], dims, m["dtype"] or "act", bool(m["optional"]))

    @property
    def any_shape(self) -> bool:
        return bool(self.dims) and self.dims[0].text == "..."

    def find(self, arguments: Mapping[str, Any]) -> Any:
        head, _, member = self.path.partition(".")
        value = arguments.get(head)
        if member and value is not None:
            value = value.get(member)
        return value

    def shape_of(self, value: Any) -> tuple[int, ...]:
        if self.kind == "<":
            return (*value.ckv.shape, value.kpe.shape[-1])
        return tuple(value.shape)


@dataclass(frozen=True)
class Line:
    """A parsed line: input and output terms, and derived dimensions in order."""

    inputs: tuple[Term, ...]
    outputs: tuple[Term, ...]
    derived: tuple[tuple[str, Dim], ...]

    @staticmethod
    def parse(line: str) -> Line:
        """An operator without outputs has "None" after the arrow."""
        inputs, _, outputs = line.partition("->")
        terms, derived = [], []
        for word in inputs.split():
            name, equals, value = word.partition("=")
            if equals:
                derived.append((name, Dim.parse(value)))
            else:
                terms.append(Term.parse(word))
        made = [t.replace("'", "") for t in outputs.split() if t != "None"]
        return Line(tuple(terms), tuple(Term.parse(t) for t in made), tuple(derived))

    @property
    def names(self) -> tuple[str, ...]:
        """All dimensions, in order."""
        written = [n for t in self.inputs for d in t.dims for n in d.names]
        return tuple(dict.fromkeys([*written, *(name for name, _ in self.derived)]))

    def bind(self, op: str, arguments: Mapping[str, Any]) -> dict[str, int]:
        """Sizes of all dimensions of a call; OperatorError where an argument does not fit."""
        dims = bind_dims(op, self.inputs, arguments)
        for name, dim in self.derived:
            size = dim.value({**_integers(arguments), **dims})
            if size is not None:
                dims.setdefault(name, size)
        return dims


def _integers(arguments: Mapping[str, Any]) -> dict[str, int]:
    return {name: v for name, v in arguments.items() if isinstance(v, int) and not isinstance(v, bool)}


def meta_outputs(op: str, line: Line, arguments: Mapping[str, Any]) -> torch.Tensor | tuple[torch.Tensor, ...] | None:
    """What a call returns, as meta tensors: shapes and dtypes only, from the line alone."""
    sizes = {**_integers(arguments), **line.bind(op, arguments)}
    made = []
    for term in line.outputs:
        shape = [dim.value(sizes) for dim in term.dims]
        if term.any_shape:
            shape = list(term.find(arguments).shape)
        assert None not in shape, f"{op}: {term.path} has an unknown dimension"
        dtype = _output_dtype(term, line.inputs, arguments)
        made.append(torch.empty(shape, dtype=dtype, device="meta"))  # type: ignore[arg-type]
    return None if not made else made[0] if len(made) == 1 else tuple(made)


_FIXED = {"F32": torch.float32, "i32": torch.int32, "i8": torch.int8, "fnuz": torch.float8_e4m3fnuz}


def _output_dtype(term: Term, terms: tuple[Term, ...], arguments: Mapping[str, Any]) -> torch.dtype:
    if term.dtype in _FIXED:
        return _FIXED[term.dtype]
    if term.dtype == "dtype":
        found = getattr(torch, str(arguments.get("out_dtype", arguments.get("dtype"))))
        assert isinstance(found, torch.dtype)
        return found
    if term.dtype == "kv":
        return arguments["cache"].kpe.dtype
    tensors = [t for t in terms if t.kind == "[" and isinstance(t.find(arguments), torch.Tensor)]
    first = next((t for t in tensors if t.dtype == "act"), tensors[0]).find(arguments).dtype
    if term.dtype == "f32":
        return torch.float64 if first == torch.float64 else torch.float32
    return first


def bind_dims(op: str, terms: tuple[Term, ...], arguments: Mapping[str, Any]) -> dict[str, int]:
    """Sizes of all named dimensions of a call; OperatorError where an argument does not fit."""
    found: list[tuple[Term, tuple[int, ...]]] = []
    for term in terms:
        value = term.find(arguments)
        if value is None:
            if not term.optional:
                raise OperatorError(f"{op}: {term.path} is missing; expected {_expected(term, {})}")
            continue
        _check_kind(op, term, value)
        shape = term.shape_of(value)
        if term.any_shape:
            continue
        if len(shape) != len(term.dims):
            raise OperatorError(f"{op}: {term.path} has shape {list(shape)}; expected {_expected(term, {})}")
        found.append((term, shape))
    dims: dict[str, int] = {}
    for plain in (True, False):
        for term, shape in found:
            for dim, size in zip(term.dims, shape, strict=True):
                if (dim.text == dim.name) is plain and dim.value(dims) is None:
                    dim.solve(size, dims)
    for term, shape in found:
        for dim, size in zip(term.dims, shape, strict=True):
            if dim.value(dims) != size:
                raise OperatorError(f"{op}: {term.path} has shape {list(shape)}; expected {_expected(term, dims)}")
    return dims


def _expected(term: Term, dims: Mapping[str, int]) -> str:
    shape = "[" + ", ".join(d.text for d in term.dims) + "]"
    names = dict.fromkeys(n for d in term.dims for n in d.names if n in dims)
    sizes = ", ".join(f"{n}={dims[n]}" for n in names)
    return shape + (f" with {sizes}" if sizes else "")


def _check_kind(op: str, term: Term, value: Any) -> None:
    if term.kind == "{":
        if not isinstance(value, Prepared):
            raise OperatorError(f"{op}: {term.path} is {type(value).__name__}; expected a Prepared weight")
    elif term.kind == "<":
        if not isinstance(value, LatentCache):
            raise OperatorError(f"{op}: {term.path} is {type(value).__name__}; expected a LatentCache")
        if value.ckv.shape[:2] != value.kpe.shape[:2] or value.kpe.dim() != 3:
            raise OperatorError(
                f"{op}: {term.path}.ckv is {list(value.ckv.shape)} and kpe {list(value.kpe.shape)}; "
                "expected [pages, page_size, R] and [pages, page_size, P]"
            )
    elif not isinstance(value, torch.Tensor):
        raise OperatorError(f"{op}: {term.path} is {type(value).__name__}; expected a tensor {_expected(term, {})}")
    elif value.dtype not in DTYPES[term.dtype]:
        allowed = ", ".join(sorted(str(d).removeprefix("torch.") for d in DTYPES[term.dtype]))
        raise OperatorError(f"{op}: {term.path} is {str(value.dtype).removeprefix('torch.')}; expected one of {allowed}")
