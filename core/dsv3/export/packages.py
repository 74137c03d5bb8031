"""The optional packages, imported where they are used, with an error that says how to get them."""

from __future__ import annotations

import importlib
from typing import Any

from dsv3.errors import UsageError


def onnx() -> Any:
    """The `onnx` package; UsageError if it is not installed."""
    return _imported("onnx", "dsv3[conformance]", "onnx.helper", "onnx.numpy_helper", "onnx.checker")


def onnxruntime() -> Any:
    """The `onnxruntime` package; UsageError if it is not installed."""
    return _imported("onnxruntime", "onnxruntime")


def _imported(name: str, requirement: str, *modules: str) -> Any:
    try:
        package = importlib.import_module(name)
        for module in modules:
            importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"{name} cannot be imported ({error}); pip install '{requirement}'") from error
    return package
