"""Memory for weights: zero, aligned, of large pages where the system grants them; what was read of a file is given back."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dsv3.checkpoint import memory
from dsv3.checkpoint.folder import folder_config
from dsv3.checkpoint.layout import open_checkpoint
from dsv3.checkpoint.reader import Reader
from dsv3.checkpoint.validate import plan_load
from dsv3.resources import resources

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(3, 5), (3000, 1000), (0, 4), (2, 1200, 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_it_is_a_tensor_of_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = memory.zeros(shape, dtype, CPU)
    assert made.shape == shape and made.dtype == dtype and made.is_contiguous()
    assert not made.view(torch.uint8).any()


def test_it_stays_while_a_view_does() -> None:
    part = memory.zeros((4000, 1000), torch.float32, CPU)[3999]
    part += 1
    assert part.sum() == 1000


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked for on Linux")
def test_large_weights_begin_at_a_large_page_and_are_counted() -> None:
    made = memory.zeros((8, 1 << 20), torch.float32, CPU)
    assert made.data_ptr() % memory.LARGE_PAGE == 0
    before = memory.large_pages()
    made.fill_(1)
    after = memory.large_pages()
    assert before is not None and after is not None
    assert after[1] - before[1] >= made.nbytes * 0.9, "filled memory is anonymous memory of this process"
    granted = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if granted.exists() and "[never]" not in granted.read_text():
        assert after[0] - before[0] >= made.nbytes // 2


def test_arrays_stay_right_when_their_memory_is_given_back() -> None:
    folder = resources("configs", "demo")
    config = folder_config(folder)
    plan, reader = plan_load(config, open_checkpoint(folder), folder), Reader()
    for item in plan.items[:20]:
        array = reader.array(item.entry)
        before = array.copy()
        reader.release(item.entry)
        assert np.array_equal(array.view(np.uint8), before.view(np.uint8))


@pytest.mark.skipif(sys.platform != "linux", reason="the call is Linux's")
def test_pages_are_taken_from_memory_nodes_in_turn() -> None:
    """On this machine's nodes, be it one: the system says of the mapping what was asked for."""
    held = mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    raw = np.frombuffer(held, np.uint8)
    if not memory.interleave(raw.ctypes.data, raw.size, memory.memory_nodes()):
        pytest.skip("this system does not let a process say where its memory comes from")
    held[: 4 << 20] = bytes(4 << 20)
    lines = Path("/proc/self/numa_maps").read_text().splitlines()
    (mine,) = [line for line in lines if line.startswith((f"{raw.ctypes.data:08x} ", f"{raw.ctypes.data:x} "))]
    assert "interleave:" in mine and "anon=" in mine
