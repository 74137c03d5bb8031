"""Warming up: on the command line for accelerators only, with progress, and never while an answer is being timed."""

from __future__ import annotations

from typing import Any

import pytest

from dsv3.cli import main
from dsv3.engine.model import Model
from dsv3.errors import UsageError
from tests.support.failing import Install
from tests.support.plugins import good

CAPTURES = """
def capture(self, step, device):
    return step
def kernels(self, device):
    from dsv3 import ops
    return [Kernel(op, "all", "dsv3_acme_kernels:" + op) for op in ops.names()]
"""


@pytest.fixture
def warmed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `warm_up` was called with; it does its work all the same."""
    calls: list[tuple[Any, ...]] = []
    kept = Model.warm_up

    def record(model: Model, batch: int = 1, progress: bool | None = None, **more: Any) -> None:
        calls.append((batch, progress, *more.values()))
        kept(model, batch, progress, **more)

    monkeypatch.setattr(Model, "warm_up", record)
    return calls


def run(*words: str) -> int:
    return main(["run", "Once upon a time", "--max-new-tokens", "4", "--backend", "acme", *words])


def test_an_accelerator_is_warmed_up_for_the_prompt(
    install: Install, warmed: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsv3.checkpoint.progress._LINE_EVERY_S", 0.0)
    install("acme", good("acme", family="newfamily", body=CAPTURES))
    assert run("--draft", "mtp", "--json") == 0
    assert warmed == [(1, True, 5 + 4, "mtp")]
    printed = capsys.readouterr()
    assert '"graph_steps": 1' in printed.out or '"graph_steps": 2' in printed.out or '"graph_steps": 3' in printed.out
    assert "warming up: 1 of 4: prefill, any tokens" in printed.err
    assert "warming up: 4 of 4: graph of 1 sequences, 2 tokens each, up to 256 cached" in printed.err


def test_no_graphs_warms_up_without_them(
    install: Install, warmed: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsv3.checkpoint.progress._LINE_EVERY_S", 0.0)
    install("acme", good("acme", family="newfamily", body=CAPTURES))
    assert run("--no-graphs", "--json") == 0
    printed = capsys.readouterr()
    assert '"graph_steps": 0' in printed.out and "graph of" not in printed.err and len(warmed) == 1


@pytest.mark.parametrize("device", ["Device('cpu', 'x')", "Device('newfamily', 'x', emulated=True)"])
def test_a_cpu_and_an_emulated_device_are_not(device: str, install: Install, warmed: list[Any]) -> None:
    install("acme", good("acme", body=f"{CAPTURES}\ndef devices(self, emulate=None):\n    return [{device}]"))
    assert run() == 0
    assert not warmed


def test_wrong_arguments_are_named() -> None:
    from tests.support.failing import load

    model = load(backend="reference")
    for wrong in ({"batch": 0}, {"tokens": True}, {"draft": "guess"}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            model.warm_up(**wrong)
