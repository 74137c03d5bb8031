"""A small builder of ONNX graphs: values with a dtype, arithmetic by operators, names made up automatically.

    y = x * g.op("Sqrt", g.reduce("Mean", x * x, -1) + 1e-6)

Dtypes are torch's names as strings. Nodes are of the standard domain, opset OPSET. Constants are nodes, because bodies of
functions have no initializers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dsv3.export.dtypes import code, numpy_dtype
from dsv3.export.packages import onnx

# Both ONNX Runtime and onnx.reference run all of it; float8 and bfloat16 are in Cast since 19.
OPSET = 21
Shape = tuple[int | None, ...]
Scalar = int | float | bool


@dataclass(eq=False)
class Value:
    """A tensor of the graph. shape: what is known of it before it runs; only inputs have one."""

    graph: Graph
    name: str
    dtype: str
    shape: Shape | None = None

    def _with(self, op: str, other: Value | Scalar, dtype: str | None = None, swap: bool = False) -> Value:
        right = other if isinstance(other, Value) else self.graph.const(other, self.dtype)
        a, b = (right, self) if swap else (self, right)
        return self.graph.op(op, a, b, dtype=dtype)

    def __add__(self, other: Value | Scalar) -> Value:
        return self._with("Add", other)

    def __sub__(self, other: Value | Scalar) -> Value:
        return self._with("Sub", other)

    def __rsub__(self, other: Scalar) -> Value:
        return self._with("Sub", other, swap=True)

    def __mul__(self, other: Value | Scalar) -> Value:
        return self._with("Mul", other)

    def __truediv__(self, other: Value | Scalar) -> Value:
        return self._with("Div", other)

    def __rtruediv__(self, other: Scalar) -> Value:
        return self._with("Div", other, swap=True)

    def __mod__(self, other: Value | Scalar) -> Value:
        return self._with("Mod", other)

    def __xor__(self, other: Value | Scalar) -> Value:
        return self._with("BitwiseXor", other)

    def __neg__(self) -> Value:
        return self.graph.op("Neg", self)

    def __lt__(self, other: Value | Scalar) -> Value:
        return self._with("Less", other, "bool")

    def __le__(self, other: Value | Scalar) -> Value:
        return self._with("LessOrEqual", other, "bool")

    def __gt__(self, other: Value | Scalar) -> Value:
        return self._with("Greater", other, "bool")

    def __ge__(self, other: Value | Scalar) -> Value:
        return self._with("GreaterOrEqual", other, "bool")

    def equal(self, other: Value | Scalar) -> Value:
        return self._with("Equal", other, "bool")

    def __and__(self, other: Value) -> Value:
        return self._with("And", other, "bool")

    def __or__(self, other: Value) -> Value:
        return self._with("Or", other, "bool")

    def __invert__(self) -> Value:
        return self.graph.op("Not", self)

    def to(self, dtype: str) -> Value:
        """Cast; float8 saturates."""
        return self if self.dtype == dtype else self.graph.op("Cast", self, dtype=dtype, to=code(dtype))


@dataclass
class Graph:
    """Nodes in the order in which they were added. scope: put before every name, to keep a subgraph's apart."""

    scope: str = ""
    nodes: list[Any] = field(default_factory=list)
    _constants: dict[tuple[Any, ...], Value] = field(default_factory=dict)
    _count: int = 0

    def op(self, op: str, *inputs: Value | None, dtype: str | None = None, **attributes: Any) -> Value:
        """A node with one output of `dtype` (default: that of the first input)."""
        return self.ops(op, *inputs, dtypes=(dtype or _dtype(inputs),), **attributes)[0]

    def ops(self, op: str, *inputs: Value | None, dtypes: Sequence[str], **attributes: Any) -> list[Value]:
        """A node with several outputs."""
        self._count += 1
        stem = f"{self.scope}{op.lower()}_{self._count}"
        names = [stem] if len(dtypes) == 1 else [f"{stem}_{i}" for i in range(len(dtypes))]
        given = ["" if v is None else v.name for v in inputs]
        self.nodes.append(onnx().helper.make_node(op, given, names, name=stem, **attributes))
        return [Value(self, name, dtype) for name, dtype in zip(names, dtypes, strict=True)]

    def const(self, value: Any, dtype: str) -> Value:
        """A constant; equal ones share a node."""
        array = np.asarray(value, dtype=numpy_dtype(dtype))
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            tensor = onnx().numpy_helper.from_array(array)
            self._constants[key] = self.op("Constant", dtype=dtype, value=tensor)
        return self._constants[key]

    def ints(self, *values: int) -> Value:
        """An int64 vector, as shapes and axes are given."""
        return self.const(list(values), "int64")

    def inside(self) -> Graph:
        """An empty graph for the body of a loop; it may use this one's values."""
        self._count += 1
        return Graph(f"{self.scope}body_{self._count}.")

    # -- shapes

    def size(self, x: Value, axis: int) -> Value:
        """int64 [1]: the size of one axis."""
        return self.op("Shape", x, dtype="int64", start=axis, **({} if axis == -1 else {"end": axis + 1}))

    def scalar(self, x: Value) -> Value:
        """[1] -> []."""
        return self.op("Squeeze", x, self.ints(0))

    def reshape(self, x: Value, *shape: int | Value) -> Value:
        """-1 is what remains, 0 copies the axis; a Value is an int64 [1]."""
        return self.op("Reshape", x, self.shape(*shape))

    def shape(self, *sizes: int | Value) -> Value:
        """An int64 vector of numbers and int64 [1] values."""
        numbers = [s for s in sizes if isinstance(s, int)]
        if len(numbers) == len(sizes):
            return self.ints(*numbers)
        return self.concat([s if isinstance(s, Value) else self.ints(s) for s in sizes], 0)

    def expand(self, x: Value, *shape: int | Value) -> Value:
        return self.op("Expand", x, self.shape(*shape))

    def zeros(self, dtype: str, *shape: int | Value) -> Value:
        return self.expand(self.const(0, dtype), *shape)

    def transpose(self, x: Value, *order: int) -> Value:
        return self.op("Transpose", x, perm=list(order))

    def unsqueeze(self, x: Value, *axes: int) -> Value:
        return self.op("Unsqueeze", x, self.ints(*axes))

    def squeeze(self, x: Value, axis: int) -> Value:
        return self.op("Squeeze", x, self.ints(axis))

    def concat(self, parts: Sequence[Value], axis: int) -> Value:
        return self.op("Concat", *parts, axis=axis)

    def slice(self, x: Value, axis: int, start: int | Value, stop: int | Value, step: int = 1) -> Value:
        first, last = (v if isinstance(v, Value) else self.ints(v) for v in (start, stop))
        return self.op("Slice", x, first, last, self.ints(axis), self.ints(step))

    def split(self, x: Value, axis: int, *sizes: int) -> list[Value]:
        """Parts of the given sizes along an axis."""
        return self.ops("Split", x, self.ints(*sizes), dtypes=(x.dtype,) * len(sizes), axis=axis)

    def halves(self, x: Value) -> tuple[Value, Value]:
        """The two halves of the last axis."""
        a, b = self.ops("Split", x, dtypes=(x.dtype,) * 2, axis=-1, num_outputs=2)
        return a, b

    # -- numbers

    def arange(self, n: Value | int) -> Value:
        """int64 [n]: 0, 1, ...; n is a number or an int64 [1]."""
        stop = self.scalar(n) if isinstance(n, Value) else self.const(n, "int64")
        return self.op("Range", self.const(0, "int64"), stop, self.const(1, "int64"))

    def where(self, condition: Value, a: Value | Scalar, b: Value | Scalar) -> Value:
        """One of a and b may be a number."""
        dtype = a.dtype if isinstance(a, Value) else b.dtype if isinstance(b, Value) else "int64"
        a, b = (v if isinstance(v, Value) else self.const(v, dtype) for v in (a, b))
        return self.op("Where", condition, a, b, dtype=dtype)

    def matmul(self, a: Value, b: Value) -> Value:
        return self.op("MatMul", a, b)

    def reduce(self, kind: str, x: Value, axis: int, keep: bool = True) -> Value:
        """kind: Sum, Max, Min or Mean."""
        return self.op(f"Reduce{kind}", x, self.ints(axis), keepdims=int(keep))

    def count(self, condition: Value, axis: int) -> Value:
        """How many are true along an axis, int64."""
        return self.reduce("Sum", condition.to("int64"), axis, keep=False)

    def gather(self, x: Value, index: Value, axis: int = 0) -> Value:
        return self.op("Gather", x, index, axis=axis)

    def is_nan(self, x: Value) -> Value:
        return self.op("IsNaN", x, dtype="bool")

    def work(self, x: Value) -> Value:
        """In what references compute in: float64 for float64, else float32."""
        return x.to(work_dtype(x.dtype))

    def identity(self, x: Value) -> Value:
        return self.op("Identity", x)


def work_dtype(dtype: str) -> str:
    """float64 for float64, else float32."""
    return "float64" if dtype == "float64" else "float32"


def _dtype(inputs: Sequence[Value | None]) -> str:
    return next(v.dtype for v in inputs if v is not None)
