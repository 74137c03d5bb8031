"""A plugin with kernels of every sort, which record what ran; each test registers those it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dsv3

KERNELS = """
import dataclasses
import torch
from dsv3 import ops

calls = []

def rms_small(x, weight, eps):
    calls.append(("rms_small", x.shape[0]))
    return ops.rms_norm(x, weight, eps)

def rms_any(x, weight, eps):
    calls.append(("rms_any", x.shape[0]))
    return ops.rms_norm(x, weight, eps)

def turned(x, w):
    assert w.layout == "turned"
    calls.append(("turned", x.shape[0]))
    return x @ w.tensors["weight"]

def plain(x, w):
    assert w.layout == "canonical"
    calls.append(("plain", x.shape[0]))
    return ops.quant_linear(x, w)

def experts(x, w, offsets):
    calls.append(("experts", x.shape[0]))
    return ops.grouped_linear(x, w, offsets)

def grouped_turned(x, w, offsets):
    assert w.layout == "turned3"
    calls.append(("grouped_turned", x.shape[0]))
    return ops.grouped_linear(x, dataclasses.replace(w, layout="canonical"), offsets)

def silu(x):
    calls.append(("silu", x.shape[0]))
    return ops.silu_mul(x)

def linear(x, weight, bias):
    return ops.linear(x, weight, bias)

def moe(**arguments):
    calls.append(("moe", arguments["x"].shape[0]))
    assert set(arguments) == set(ops.spec("moe").parameters)
    return ops.moe(**arguments)

def prolog(**arguments):
    raise AssertionError("never called: the model is on device meta")

def refuse_wide(call):
    return f"K is {call.dims['K']}, too wide" if call.dims["K"] > 130 else None
"""
BODY = """
def kernels(self, device):
    T = "{module}_kernels:"
    return [{kernels}]
def prepare(self, weight, layout, device):
    import dataclasses
    if layout == "turned3":
        return dataclasses.replace(weight, layout=layout)
    if layout in ("nothing", "forgotten"):
        return None if layout == "nothing" else weight
    if layout != "turned":
        return super().prepare(weight, layout, device)
    return dataclasses.replace(weight, layout=layout, tensors={{"weight": weight.tensors["weight"].T.contiguous()}})
"""
Make = Callable[[str], Any]


def load(**options: Any) -> dsv3.Model:
    return dsv3.load("demo", **{"backend": "acme", "dtype": "float32", "quant": "none", **options})
