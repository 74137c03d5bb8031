"""all_reduce over two real processes (gloo), and experts split over them: partial sums add up to the whole layer."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import torch

from dsv3 import ops

WORKER = """
import os, sys, torch
import torch.distributed as dist
from dsv3 import ops
from dsv3.plugin import Prepared

rank = int(sys.argv[1])
dist.init_process_group("gloo", rank=rank, world_size=2)
generator = torch.Generator().manual_seed(0)
randn = lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64)
x, gate, w13, w2 = randn(5, 8), randn(4, 8), randn(4, 12, 8), randn(4, 8, 6)
p = lambda w: Prepared("canonical", "none", tuple(w.shape), {"weight": w})
routing = dict(bias=None, shared13=None, shared2=None, n_group=1, topk_group=1, topk=2, score="sigmoid", group_score="max",
               renormalize=True, scale=1.0)
here = [0, 1] if rank == 0 else [2, 3]
local = torch.full((4,), -1, dtype=torch.int32)
local[here] = torch.tensor([0, 1], dtype=torch.int32)
part = ops.moe(x=x, gate=gate, w13=p(w13[here]), w2=p(w2[here]), expert_map=local, **routing)
before = part.clone()
total = ops.all_reduce(x=part, group=dist.group.WORLD)
assert torch.equal(part, before), "all_reduce changed its input"
whole = ops.moe(x=x, gate=gate, w13=p(w13), w2=p(w2), **routing)
assert (total - whole).abs().max() < 1e-12
assert not torch.allclose(part, whole)
dist.destroy_process_group()
print("ok")
"""


def test_two_ranks_sum_to_the_whole_layer() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank)], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True) for rank in range(2)
    ]  # fmt: skip
    for worker in workers:
        out, err = worker.communicate(timeout=100)
        assert worker.returncode == 0, err
        assert out.strip() == "ok"


def test_one_rank_is_the_identity() -> None:
    x = torch.randn(2, 3)
    assert ops.all_reduce(x, None) is x
