"""Models run by stock runtimes, with arrays of any dtype in and out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dsv3.errors import UsageError, nearest
from dsv3.export.dtypes import NAMES, bits_dtype, code, numpy_dtype
from dsv3.export.packages import onnx, onnxruntime

Arrays = dict[str, np.ndarray[Any, Any]]


def run_reference(model: Any, inputs: Mapping[str, np.ndarray[Any, Any]]) -> Arrays:
    """By onnx.reference."""
    from onnx.reference import ReferenceEvaluator

    names = [o.name for o in model.graph.output]
    with np.errstate(all="ignore"):
        found = ReferenceEvaluator(model).run(names, dict(inputs))
    return {name: np.asarray(value) for name, value in zip(names, found, strict=True)}


def run_onnxruntime(model: Any, inputs: Mapping[str, np.ndarray[Any, Any]]) -> Arrays:
    """By ONNX Runtime on the CPU.

    It takes bfloat16 and float8 as bits, but does not give them back to numpy: such outputs leave the model as float32, which
    holds them exactly, and become what they were here.
    """
    ort = onnxruntime()
    widened, exotic = _widened(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(widened.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {name: _ort_value(ort, array) for name, array in inputs.items()}
    names = [o.name for o in session.get_outputs()]
    found = session.run_with_ort_values(names, feed)
    arrays = {name: value.numpy() for name, value in zip(names, found, strict=True)}
    return {name: array.astype(numpy_dtype(exotic[name])) if name in exotic else array for name, array in arrays.items()}


RUNTIMES: dict[str, Callable[[Any, Mapping[str, np.ndarray[Any, Any]]], Arrays]] = {
    "onnxruntime": run_onnxruntime,
    "reference": run_reference,
}


def runtime(name: str) -> Callable[[Any, Mapping[str, np.ndarray[Any, Any]]], Arrays]:
    """A runtime by name; UsageError for one that is not known."""
    if name not in RUNTIMES:
        raise UsageError(f"runtime {name!r} is not one of {', '.join(RUNTIMES)}{nearest(name, RUNTIMES)}")
    return RUNTIMES[name]


def _ort_value(ort: Any, array: np.ndarray[Any, Any]) -> Any:
    bits = bits_dtype(array.dtype.name)
    if bits is None:
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(bits), code(array.dtype.name))


def _widened(model: Any) -> tuple[Any, dict[str, str]]:
    """The model with outputs of types that numpy lacks cast to float32, and what they were."""
    exotic = {o.name: NAMES[o.type.tensor_type.elem_type] for o in model.graph.output}
    exotic = {name: dtype for name, dtype in exotic.items() if bits_dtype(dtype) is not None}
    if not exotic:
        return model, {}
    wide = onnx().ModelProto()
    wide.CopyFrom(model)
    helper = onnx().helper
    for node in wide.graph.node:
        node.output[:] = [f"{name}/narrow" if name in exotic else name for name in node.output]
    for o in wide.graph.output:
        if o.name in exotic:
            o.type.tensor_type.elem_type = code("float32")
            wide.graph.node.append(helper.make_node("Cast", [f"{o.name}/narrow"], [o.name], to=code("float32")))
    return wide, exotic
