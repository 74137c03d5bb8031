"""A plugin with kernels to tune: slow, fast and wrong ones, and ones with configurations."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dsv3
import dsv3.conformance
from dsv3.dispatch.select import Catalogue
from dsv3.dispatch.tuning.database import Database
from dsv3.dispatch.tuning.tune import TuneReport, tune
from dsv3.loading import calls
from tests.support.plugins import good, write_plugin

KERNELS = """
import time
from dsv3 import ops

calls = []

def slow(x, weight, eps):
    time.sleep(0.005)
    return ops.rms_norm(x, weight, eps)

def fast(x, weight, eps):
    calls.append("fast")
    return ops.rms_norm(x, weight, eps)

def wrong(x, weight, eps):
    calls.append("wrong")
    return x

def raises(x, weight, eps):
    raise RuntimeError("no such instruction")

def scribbles(x, weight, eps):
    y = ops.rms_norm(x, weight, eps)
    x.zero_()
    return y

def tiled(x, weight, eps, config):
    calls.append(config["BLOCK"])
    time.sleep(config["SLEEP"])
    return ops.rms_norm(x, weight, eps) * (1 if config.get("RIGHT", True) else 2)

def turned(x, w):
    assert w.layout == "turned"
    return x @ w.tensors["weight"]

def plain(x, w):
    time.sleep(0.005)
    return ops.quant_linear(x, w)

def linear(x, weight, bias=None):
    calls.append("linear")
    return ops.linear(x, weight, bias)
"""
BACKEND = """
version = "{version}"
def devices(self, emulate=None):
    return [Device("cpu", emulate if emulate not in (None, "default") else "cpu_1", memory={memory}, emulated=bool(emulate))]
def probe(self, device):
    return Probe("usable", Capability(dtypes=frozenset({{"float32"}}), limits={{"compute_units": {units}}}))
def kernels(self, device):
    T = "dsv3_acme_kernels:"
    return [{kernels}]
def prepare(self, weight, layout, device):
    import dataclasses
    if layout != "turned":
        return super().prepare(weight, layout, device)
    return dataclasses.replace(weight, layout=layout, tensors={{"weight": weight.tensors["weight"].T.contiguous()}})
"""
THREE = (
    "Kernel('rms_norm', 'slow', T + 'slow', priority=5), Kernel('rms_norm', 'fast', T + 'fast'),"
    "Kernel('rms_norm', 'wrong', T + 'wrong', priority=9)"
)
OPTIONS: dict[str, Any] = {"backend": "acme", "dtype": "float32", "quant": "none"}
FLAGS = ["--backend", "acme", "--dtype", "float32", "--quant", "none"]
Install = Callable[..., Any]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install backend "acme" anew, with these kernels, version, memory and code; returns its kernel module."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("DSV3_TUNING_DIR", str(tmp_path / "tuning"))
    monkeypatch.setattr("dsv3.dispatch.tuning.measure.SECONDS", 0.005)
    monkeypatch.setattr("dsv3.dispatch.tuning.plan.MOST_TOKENS", 4)
    monkeypatch.setattr("dsv3.dispatch.tuning.tuned.MOST_TOKENS", 4)

    def build(kernels: str = THREE, code: str = "", version: str = "1", memory: int = 0, units: int = 4) -> Any:
        body = BACKEND.format(kernels=kernels, version=version, memory=memory, units=units)
        write_plugin(tmp_path, "acme", good("acme", body=body))
        (tmp_path / "dsv3_acme_kernels.py").write_text(KERNELS + code)
        for loaded in ("dsv3_acme", "dsv3_acme_kernels"):
            sys.modules.pop(loaded, None)
        importlib.invalidate_caches()
        return importlib.import_module("dsv3_acme_kernels")

    return build


def run(tmp_path: Path, budget_s: float = 60.0, emulate: str | bool = False, **options: Any) -> TuneReport:
    source, sites = calls("demo", emulate=emulate, **OPTIONS)
    folder = tmp_path / "tuning"
    return tune(Catalogue(source, folder), sites, Database(folder, source.device.arch), budget_s=budget_s, **options)


def chosen(op: str = "rms_norm", **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = dsv3.load("demo", **OPTIONS, device="meta", **options).placement().to_json()["ops"][op]
    return found


def notes(**options: Any) -> str:
    return "\n".join(dsv3.load("demo", **OPTIONS, device="meta", **options).placement().to_json()["notes"])


CONFIGURED = "Kernel('rms_norm', 'tiled', T + 'tiled', configs='dsv3_acme_data:tiled.json')"


def table(tmp_path: Path, *configs: Any, **changes: Any) -> None:
    (tmp_path / "dsv3_acme_data").mkdir(exist_ok=True)
    (tmp_path / "dsv3_acme_data" / "__init__.py").write_text("")
    whole = {"op": "rms_norm", "configs": list(configs), **changes}
    (tmp_path / "dsv3_acme_data" / "tiled.json").write_text(json.dumps(whole))
    forget()


def forget() -> None:
    from dsv3.dispatch import configs

    configs._read.cache_clear()
    sys.modules.pop("dsv3_acme_data", None)
    importlib.invalidate_caches()
