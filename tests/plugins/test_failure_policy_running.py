"""The failure policy while a model runs: kernels that fail later than at their first call, devices that fail, the command
line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3.errors import KernelFailed
from tests.support.failing import Install, load, source

IDS = [0, 933, 643, 263, 506]
RMS = "Kernel('rms_norm', 'fast', T + 'rms_norm')"


def _sites(model: Any) -> list[Any]:
    graph = model._graph
    blocks = [*graph.blocks, *(m.block for m in graph.mtp)]
    owners = [graph, *graph.mtp, *blocks, *(b.attn for b in blocks), *(b.mlp for b in blocks)]
    return [v for owner in owners for v in vars(owner).values() if type(v).__name__ == "Site"]


# -- a kernel raises later


def test_a_kernel_that_fails_later_is_named_with_operator_and_site(install: Install) -> None:
    kernels = install("acme", source(RMS))
    kernels.raises["rms_norm"], kernels.after["rms_norm"] = ValueError("no more"), 100
    model = load()
    with pytest.raises(KernelFailed, match=r"^ValueError: no more \(kernel acme\.fast of rms_norm at layers\.") as caught:
        for _ in range(100):
            model.logits(IDS)
    assert caught.value.__cause__ is kernels.raises["rms_norm"]
    assert model.placement().to_json()["quarantined"] == []


def test_every_site_of_the_graph_is_named_right() -> None:
    """Whichever of its bound callables raises, at whatever depth of whichever layer, the error names it."""
    model = load(backend="reference", quant="fp8-w8a8")
    called: dict[Any, None] = {}
    for site in (bound := [s for s in [*_sites(model), model._sample] if len(s)]):

        def spy(kept: Any = site[0], site: Any = site, **arguments: Any) -> Any:
            called[site] = None
            return kept(**arguments)

        site[0] = spy
    model.generate(IDS, max_new_tokens=5, draft="mtp")
    assert len(called) > 0.9 * len(bound) > 90
    for site in called:

        def broken(**arguments: Any) -> Any:
            raise ArithmeticError("made to fail")

        kept, site[0] = site[0], broken
        try:
            with pytest.raises(KernelFailed, match="made to fail") as caught:
                model.generate(IDS, max_new_tokens=5, draft="mtp")
            assert (caught.value.selection["op"], caught.value.selection["site"]) == (site.op, site.where)
        finally:
            site[0] = kept


def test_a_part_that_fails_later_is_named_inside_its_composite(install: Install) -> None:
    kernels = install("acme", source("Kernel('grouped_linear', 'g', T + 'grouped_linear')"))
    kernels.raises["grouped_linear"], kernels.after["grouped_linear"] = ValueError("no more"), 20
    with pytest.raises(KernelFailed) as caught:
        load().generate(IDS, max_new_tokens=10)
    assert caught.value.selection["kernel"] == "acme.g" and caught.value.selection["op"] == "grouped_linear"
    assert caught.value.selection["site"].endswith(".mlp, inside moe")
    assert "x [" in caught.value.selection["shapes"]


# -- a device error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("HIP error: invalid device function"),
        RuntimeError("NPU error, code is 507011"),
        MemoryError("no memory"),
    ],
)
def test_a_device_error_is_raised_with_the_selection_and_nothing_else_is_tried(error: Exception, install: Install) -> None:
    kernels = install("acme", source(f"{RMS}, Kernel('rms_norm', 'second', T + 'rms_norm')"))
    kernels.raises["rms_norm"] = error
    model = load()
    with pytest.raises(KernelFailed, match="A device error") as caught:
        model.logits(IDS)
    assert caught.value.selection["kernel"] == "acme.fast" and caught.value.selection["site"] == "layers.0.input_layernorm"
    assert len(kernels.calls) == 1 and model.placement().to_json()["quarantined"] == []


def test_a_device_error_behind_a_wrapper_is_one_too(install: Install) -> None:
    kernels = install("acme", source(RMS))
    wrapper = ValueError("launch failed")
    wrapper.__cause__ = RuntimeError("CUDA error: device-side assert triggered")
    kernels.raises["rms_norm"] = wrapper
    with pytest.raises(KernelFailed, match=r"^RuntimeError: CUDA error"):
        load().logits(IDS)


def test_a_device_error_that_is_reported_late_is_one_too(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("acme", source(RMS))
    model = load()

    def full(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("dsv3.engine.sample._truncated", full)
    with pytest.raises(KernelFailed, match=r"^OutOfMemoryError: CUDA out of memory \(outside a kernel") as caught:
        model.generate(IDS, max_new_tokens=2, temperature=1.0, top_p=0.5)
    assert "acme.fast" in caught.value.selection["kernels"]


def test_a_kernel_that_exits_does_not_end_the_program(install: Install) -> None:
    kernels = install("acme", source(RMS))
    kernels.raises["rms_norm"], kernels.after["rms_norm"] = SystemExit("no licence"), 100
    with pytest.raises(KernelFailed, match=r"^SystemExit: no licence"):
        load().generate(IDS, max_new_tokens=100)


# -- on the command line


def test_the_command_line_warns_in_one_line_and_goes_on(tmp_path: Path, install: Install) -> None:
    install("acme", source(RMS))
    path = tmp_path / "dsv3_acme_kernels.py"
    path.write_text(path.read_text() + "\nraises['rms_norm'] = ValueError('no such\\ntile')\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "dsv3", "run", "Once", "--backend", "acme", "--max-new-tokens", "3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip()
    lines = [line for line in done.stderr.splitlines() if "quarantined" in line]
    assert len(lines) == 1 and lines[0].startswith("dsv3: warning: kernel acme.fast is quarantined: ValueError: no such tile")
    done = subprocess.run(
        [*command, "--kernel", "rms_norm=acme.fast"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith("error: ValueError: no such tile (kernel acme.fast of rms_norm at ")
