"""Writing a small ONNX model: nodes in order, constants once, inputs and outputs by the name of the operator's arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 19  # float8 in Cast, Scan and Reshape's neighbours; every provider that matters has it
IR_VERSION = 9
FLOAT, INT64, BOOL = int(TensorProto.FLOAT), int(TensorProto.INT64), int(TensorProto.BOOL)


class Graph:
    """A model under construction, or the body of a Scan or an If inside one (`inside`), which sees its values.

    inputs: argument -> (ONNX element type, rank). outputs: result -> ONNX element type. All arithmetic is in float32:
    `real` gives an input as float32, `give` rounds a result once to the type of the output.
    """

    def __init__(
        self,
        inputs: Mapping[str, tuple[int, int]] | None = None,
        outputs: Mapping[str, int] | None = None,
        inside: Graph | None = None,
    ) -> None:
        self.types, self.outputs = dict(inputs or {}), dict(outputs or {})
        self.root: Graph = inside.root if inside else self
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[tuple[Any, ...], onnx.TensorProto] = {}
        self.given: list[str] = []
        self._real: dict[str, str] = {}
        self._count = 0

    def has(self, name: str) -> bool:
        """Whether an optional input is there."""
        return name in self.types

    def fresh(self) -> str:
        """A name that nothing else in the model has."""
        self.root._count += 1
        return f"v{self.root._count}"

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Append a node with one output."""
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, outputs: int, *inputs: str, **attributes: Any) -> list[str]:
        """Append a node with several outputs."""
        names = [self.fresh() for _ in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names

    def const(self, value: float | Sequence[float], kind: Any = np.float32) -> str:
        """A constant of the model: float32 scalar by default."""
        array = np.asarray(value, dtype=kind)
        key = (array.dtype.str, array.shape, array.tobytes())
        known = self.root.constants
        if key not in known:
            known[key] = numpy_helper.from_array(array, self.fresh())
        return known[key].name

    def ints(self, *values: int) -> str:
        """A constant int64 vector: axes, shapes, indices."""
        return self.const(list(values), np.int64)

    def cast(self, value: str, to: int) -> str:
        """Round to nearest even; float8 saturates."""
        return self.op("Cast", value, to=to)

    def real(self, name: str) -> str:
        """An input of the model as float32, converted once."""
        if self.root is not self:
            return self.root.real(name)
        if name not in self._real:
            self._real[name] = name if self.types[name][0] == FLOAT else self.cast(name, FLOAT)
        return self._real[name]

    def give(self, name: str, value: str) -> None:
        """`value`, float32, is the result `name`."""
        to = self.outputs[name]
        if to == FLOAT:
            self.nodes.append(helper.make_node("Identity", [value], [name]))
        else:
            self.nodes.append(helper.make_node("Cast", [value], [name], to=to))
        self.given.append(name)

    def shape(self, value: str) -> str:
        return self.op("Shape", value)

    def size(self, value: str, axis: int) -> str:
        """Length of one axis as an int64 vector of one element."""
        return self.op("Shape", value, start=axis, end=axis + 1)

    def body(self, name: str, inputs: Sequence[tuple[str, int]], outputs: Sequence[tuple[str, int]]) -> onnx.GraphProto:
        """This graph as the body of a control-flow node; (name, ONNX type) of what goes in and comes out. What comes out
        is a matrix: Scan must know the rank."""
        ins = [helper.make_tensor_value_info(n, t, None) for n, t in inputs]
        outs = [helper.make_tensor_value_info(n, t, [None, None]) for n, t in outputs]
        return helper.make_graph(self.nodes, name, ins, outs)

    def model(self, name: str) -> bytes:
        """The model, serialised; every dimension is dynamic."""
        missing = set(self.outputs) - set(self.given)
        assert not missing, f"{name}: nothing gives {missing}"
        ins = [
            helper.make_tensor_value_info(n, t, [f"{n}_{axis}" for axis in range(rank)]) for n, (t, rank) in self.types.items()
        ]
        outs = [helper.make_tensor_value_info(n, t, None) for n, t in self.outputs.items()]
        graph = helper.make_graph(self.nodes, name, ins, outs, list(self.constants.values()))
        made = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="dsv3-onnxruntime"
        )
        return bytes(made.SerializeToString())
