"""A backend "acme" whose kernels run the references and fail, or answer wrongly, when and how a test says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dsv3
from tests.support.plugins import good

Install = Callable[..., Any]
TURNED = "Kernel('quant_linear', 'turned', T + 'turned_quant_linear', layouts={'w': 'turned'})"
KERNELS = """
import dataclasses
import functools
import torch
from dsv3 import ops
from dsv3.plugin import Prepared

calls = []    # (function, shape of the first tensor), in order
raises = {}   # function -> exception to raise
after = {}    # function -> how many calls are right before that
widest = {}   # function -> last dimension of the first tensor up to which it raises nothing
changes = {}  # function -> function(outputs, arguments) giving what is returned instead
undone = []   # shapes of the weights that `unprepare` was asked for

def _run(name, op, **arguments):
    shape = tuple(next(v for v in arguments.values() if isinstance(v, torch.Tensor)).shape)
    calls.append((name, shape))
    if name in raises and sum(n == name for n, _ in calls) > after.get(name, 0) and shape[-1] > widest.get(name, 0):
        raise raises[name]
    if name.startswith("turned_"):
        arguments = {k: back(v) if isinstance(v, Prepared) and k[0] == "w" else v for k, v in arguments.items()}
    out = ops.spec(op).reference(**arguments)
    return changes[name](out, arguments) if name in changes else out

def back(weight):
    assert weight.layout == "turned"
    return dataclasses.replace(weight, layout="canonical", tensors={"weight": weight.tensors["weight"].mT})

def __getattr__(name):
    op = name.removeprefix("turned_").removeprefix("second_")
    if op not in ops.names():
        raise AttributeError(name)
    return functools.partial(_run, name, op)
"""
BODY = """
def kernels(self, device):
    import dsv3_reference
    T = "dsv3_acme_kernels:"
    reference = list(dsv3_reference.backend.kernels(device))
    return [{kernels}]
def prepare(self, weight, layout, device):
    import dataclasses
    if layout != "turned":
        return super().prepare(weight, layout, device)
    return dataclasses.replace(weight, layout=layout, tensors={{"weight": weight.tensors["weight"].mT.contiguous()}})
def unprepare(self, weight):
    import dataclasses, dsv3_acme_kernels
    if weight.layout != "turned":
        return super().unprepare(weight)
    dsv3_acme_kernels.undone.append(tuple(weight.shape))
    {undo}
    return dataclasses.replace(weight, layout="canonical", tensors={{"weight": weight.tensors["weight"].mT.contiguous()}})
"""


def source(kernels: str, undo: str = "", family: str = "cpu") -> str:
    """The backend's module. kernels: what its list holds, T + "OPERATOR" being a target of the kernel module."""
    return good("acme", family, body=BODY.format(kernels=kernels, undo=undo or "pass"))


def chosen(model: Any, op: str) -> set[str]:
    """The kernels that run an operator in any step."""
    return {d.kernel.name for _, _, d in model.placement().decisions(op) if d.kernel}


def load(**options: Any) -> Any:
    """The demo model on it, unquantised in float32 unless told otherwise."""
    return dsv3.load("demo", **{"backend": "acme", "dtype": "float32", "quant": "none", **options})
