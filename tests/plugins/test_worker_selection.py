"""Worker processes bind the selection that was computed once, and ranks that run different kernels are told."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dsv3
from dsv3.bench.dispatch import counted
from dsv3.errors import KernelWarning
from tests.support.failing import TURNED, Install, load, source

IDS = [0, 933, 643, 263, 506]
KERNELS = (
    "Kernel('rms_norm', 'small', T + 'rms_norm', needs=(AtMost('T', 4),)),"
    f"Kernel('grouped_linear', 'g', T + 'grouped_linear', needs=(AtMost('K', 128),)), {TURNED}"
)
WORKER = """
import json, os, sys
import torch.distributed as dist
import dsv3
from dsv3.dispatch.selection import agree

rank, text = int(sys.argv[1]), open(sys.argv[2]).read()
dist.init_process_group("gloo", rank=rank, world_size=2)
options = {"backend": "acme", "dtype": "float32", "quant": "none"}
model = dsv3.load("demo", **options, selection=json.loads(text))
agree(model.placement(), dist.group.WORLD)
if rank == 1:
    options["pins"] = {"silu_mul": "reference.torch", "rms_norm": "reference.torch"}
other = dsv3.load("demo", **options)
try:
    agree(other.placement(), dist.group.WORLD)
except dsv3.BackendUnavailable as error:
    print(error)
dist.destroy_process_group()
"""


def test_a_worker_binds_the_same_kernels_and_selects_nothing(install: Install) -> None:
    kernels = install("acme", source(KERNELS))
    model = load()
    plain = json.loads(json.dumps(model.placement().selection()))
    with counted() as counts:
        worker = load(selection=plain, backend="auto")
    assert counts["Catalogue.candidates"] == counts["Catalogue.refusals"] == 0 < counts["Assembly.place"]
    ours, theirs = model.placement().to_json(), worker.placement().to_json()
    assert ours["ops"] == theirs["ops"] and worker.placement().selection() == model.placement().selection()
    kernels.calls.clear()
    wanted = model.logits(IDS)
    calls = list(kernels.calls)
    kernels.calls.clear()
    assert torch.equal(worker.logits(IDS), wanted) and kernels.calls == calls


def test_a_selection_that_does_not_fit_is_refused(install: Install) -> None:
    install("acme", source(KERNELS))
    plain = load().placement().selection()
    with pytest.raises(dsv3.UsageError, match="format 1"):
        load(selection={"format": 2})
    with pytest.raises(dsv3.UsageError, match="sha256"):
        load(selection={**plain, "buckets": [[1, 2], [3, 1 << 20]]})
    with pytest.raises(dsv3.UsageError, match="of backend 'acme', not 'reference'"):
        load(selection=plain, backend="reference")
    with pytest.raises(dsv3.BackendUnavailable, match="made for another model"):
        dsv3.load("671B", device="meta", selection=plain)
    with pytest.raises(dsv3.BackendUnavailable, match="this worker has formats"):
        load(selection=plain, dtype="float64")


def test_a_selection_whose_kernel_is_missing_is_refused(install: Install) -> None:
    install("acme", source(KERNELS))
    plain = load().placement().selection()
    install("acme", source("Kernel('silu_mul', 's', T + 'silu_mul')"))
    with pytest.raises(dsv3.BackendUnavailable, match=r"runs \w+ with acme\.\w+, which is not here; install the same plugins"):
        load(selection=plain)


def test_a_quarantine_changes_what_a_rank_runs(install: Install) -> None:
    kernels = install("acme", source("Kernel('rms_norm', 'k', T + 'rms_norm')"))
    model = load()
    before = model.placement().selection()["sha256"]
    kernels.raises["rms_norm"] = ValueError("no such tile")
    with pytest.warns(KernelWarning):
        model.logits(IDS)
    assert model.placement().selection()["sha256"] != before


def test_ranks_that_bind_one_selection_agree_and_others_are_told(tmp_path: Path, install: Install) -> None:
    install("acme", source(KERNELS))
    (tmp_path / "selection.json").write_text(json.dumps(load().placement().selection()))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment: dict[str, Any] = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    command = [sys.executable, "-c", WORKER]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "selection.json")], env=environment, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        out, err = rank.communicate(timeout=120)
        assert rank.returncode == 0, err
        assert out.startswith("ranks 1 run other kernels than rank 0")
