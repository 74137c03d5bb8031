"""The backends of this repository against the suite: no false alarm, whatever the seed."""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dsv3 import conformance

ROOT = Path(__file__).parents[2]


def _plugin(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The backend instance of a plugin in plugins/, not installed."""
    module = name.replace("-", "_")
    monkeypatch.syspath_prepend(str(ROOT / "plugins" / name))
    sys.modules.pop(module, None)
    return importlib.import_module(module).backend


@pytest.mark.parametrize("name", ["dsv3-numpy", pytest.param("dsv3-onnxruntime", marks=pytest.mark.slow)])
def test_a_plugin_of_this_repository_passes_up_to_level_3(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "dsv3-onnxruntime":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    report = conformance.run(_plugin(name, monkeypatch), level="L3", size="quick")
    assert not report.failed, report.failed[0]
    assert {c.level for c in report.cases if c.status == "passed"} == {"L0", "L1", "L2", "L3"}
    assert not report.info["notes"]


@pytest.mark.parametrize("level", ["L2", pytest.param("L3", marks=pytest.mark.slow)])
def test_the_reference_passes(level: str) -> None:
    report = conformance.run("reference", level=level, size="quick")
    assert not report.failed, report.failed[0]
    assert {c.level for c in report.cases if c.status == "passed"} == set(("L0", "L1", "L2", "L3")[: int(level[1]) + 1])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["reference", "dsv3-onnxruntime"])
def test_no_false_alarm_at_size_small(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = name if name == "reference" else _plugin(name, monkeypatch)
    start = time.perf_counter()
    report = conformance.run(backend, level="L1" if seed else "L2", size="small", seed=seed)
    assert not report.failed, report.failed[0]
    margin = max(c.margin for c in report.cases)
    seconds = time.perf_counter() - start
    print(f"{name}, seed {seed}: {report.count('passed')} passed, worst margin {margin:.2f}, {seconds:.0f} s")
