"""Made-up calls of an operator that a kernel's needs allow: what `accepts` and the layouts are tried with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping

from dsv3.dispatch.select import Catalogue
from dsv3.ops import OpSpec, spec
from dsv3.ops.shapes import Term
from dsv3.ops.spec import STEP_DIMS
from dsv3.plugin import AtLeast, AtMost, Call, Divides, DType, Kernel
from dsv3.quant import SCHEMES

TOKENS = (1, 5, 64)
# Sizes that share factors with every tile, and sizes that share none.
_ALIGNED = {"k": 2, "E": 4, "Eg": 4, "Nh": 4, "N": 384, "H": 256, "K": 256}
_RAGGED = {"k": 3, "E": 3, "Eg": 3, "Nh": 3, "N": 129, "H": 200, "K": 200, "P": 6, "I": 72, "Is": 40}
_STORED = {"fp8": "float8_e4m3fn", "int8": "int8", "int4": "uint8"}
_CLASSES = {"f32": "float32", "int": "int32", "i8": "int8", "f8": "float8_e4m3fn"}


def accepted_calls(kernel: Kernel, catalogue: Catalogue) -> Iterator[Call]:
    """The calls that the kernel takes."""
    return (call for call in calls(kernel, catalogue) if not catalogue.refusals(kernel, call))


def calls(kernel: Kernel, catalogue: Catalogue) -> Iterator[Call]:
    """All combinations of sizes, dtypes and schemes worth asking about, bent to the kernel's needs where these say how."""
    known, source = spec(kernel.op), catalogue.source
    schemes = list(SCHEMES) if known.weights else ["none"]
    activations = [d for d in ("float32", "bfloat16", "float16", "float64") if d in source.capability.dtypes]
    for sizes, scheme, act, tokens in itertools.product((_ALIGNED, _RAGGED), schemes, activations, TOKENS):
        dims = _dims(known, kernel, sizes, tokens, scheme)
        yield Call(kernel.op, dims, _dtypes(known, kernel, act, scheme), scheme, source.device)


def _dims(known: OpSpec, kernel: Kernel, sizes: Mapping[str, int], tokens: int, scheme: str) -> dict[str, int]:
    other = 128 if sizes is _ALIGNED else 100
    dims = {name: sizes.get(name, other) for name in known.dims if name not in STEP_DIMS or name == "S"}
    for name in ("T", "M", "Tq", "S"):
        if name in dims:
            dims[name] = tokens
    for name in ("I", "Is"):  # which the loader pads for FP8
        if name in dims and SCHEMES[scheme].weights == "fp8":
            dims[name] = 128
    derived = dict(known.line.derived)
    for name in dims:
        if name not in derived:
            dims[name] = _bent(name, dims[name], kernel)
    for name, dim in known.line.derived:
        dims[name] = dim.value(dims) or dims[name]
    return dims


def _bent(name: str, size: int, kernel: Kernel) -> int:
    """The nearest size that the bounds on this dimension allow."""
    needs = [n for n in kernel.needs if getattr(n, "dim", None) == name]
    step = math.lcm(1, *(n.value for n in needs if isinstance(n, Divides)))
    low = max([1, *(n.value for n in needs if isinstance(n, AtLeast))])
    high = min([1 << 40, *(n.value for n in needs if isinstance(n, AtMost))])
    size = -(-min(max(size, low), high) // step) * step
    return size if size <= high else high // step * step


def _dtypes(known: OpSpec, kernel: Kernel, act: str, scheme: str) -> dict[str, str]:
    found = {term.path: _dtype(term, act, scheme) for term in known.terms}
    for name in ("dtype", "out_dtype"):
        if name in known.parameters:
            found[name] = str(known.defaults.get(name, act))
    for need in kernel.needs:  # but not of activations, which vary anyway
        if isinstance(need, DType) and found.get(need.argument) not in need.allowed and need.argument != known.activation:
            term = next((t for t in known.terms if t.path == need.argument), None)
            if term is None or term.dtype != "act":
                found[need.argument] = need.allowed[0]
    return found


def _dtype(term: Term, act: str, scheme: str) -> str:
    if term.kind == "{":
        return _STORED.get(SCHEMES[scheme].weights, act)
    return _CLASSES.get(term.dtype, act)
