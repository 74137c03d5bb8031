"""The experts' kernels: what the conformance suite does not show."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import torch

from dsv3.ops import fused_experts as reference
from dsv3.ops import moe_permute as sorted_by_torch
from dsv3.plugin import Prepared
from dsv3_triton.experts import fused_experts, grouped_linear
from dsv3_triton.launch import recording
from dsv3_triton.permute import sort_pairs

SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "DOWN_BLOCK_N": 16, "BLOCK_K": 16, "BAND": 2, "num_warps": 1, "num_stages": 1}


def plain(*shape: int, device: str = "cpu") -> Prepared:
    weight = torch.randn(*shape, device=device) if device == "cpu" else torch.empty(*shape, device=device)
    return Prepared("canonical", "none", shape, {"weight": weight})


def test_rows_are_the_inverse_of_perm_and_ids_out_of_range_have_none() -> None:
    ids = torch.tensor([[2, 0], [-1, 2], [5, 1], [0, 99]], dtype=torch.int64)
    rows = torch.empty(8, dtype=torch.int32)
    perm, offsets = sort_pairs(ids, 3, rows, {"BLOCK": 4, "num_warps": 1})
    wanted_perm, wanted_offsets = sorted_by_torch(ids, 3)
    assert torch.equal(perm, wanted_perm)
    assert torch.equal(offsets, wanted_offsets)
    assert rows.tolist() == [perm.tolist().index(pair) if pair in perm.tolist() else -1 for pair in range(8)]


@pytest.mark.parametrize("counts", [(20, 0, 1, 33), (0, 0, 0, 54), (54, 0, 0, 0), (16, 16, 16, 6)])
@pytest.mark.parametrize("band", [1, 3])
def test_tiles_cover_every_row_of_every_expert_whatever_the_band(counts: tuple[int, ...], band: int) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(54 + 5, 24), plain(4, 20, 24)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    y = grouped_linear(x, w, offsets, {**SMALL, "BAND": band})
    experts = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    wanted = torch.einsum("mk,mnk->mn", x[:54], w.tensors["weight"][experts])
    torch.testing.assert_close(y[:54], wanted, rtol=1e-5, atol=1e-5)
    assert not y[54:].any()


def test_rows_of_x_may_lie_apart_and_weights_may_be_columns_of_more() -> None:
    torch.manual_seed(0)
    x, w13, w2 = torch.randn(5, 40)[:, 3:27], plain(3, 24, 24), plain(3, 24, 12)
    ids = torch.tensor([[0, 1], [2, -1], [1, 0], [2, 1], [-1, -1]], dtype=torch.int32)
    weights = torch.rand(5, 4)[:, ::2]
    y = fused_experts(x, weights, ids, w13, w2, SMALL)
    torch.testing.assert_close(y, reference(x=x, weights=weights, ids=ids, w13=w13, w2=w2), rtol=1e-5, atol=1e-5)


def test_the_grid_knows_only_how_many_rows_there_are() -> None:
    """Never more than one unfilled tile per expert, and no more tiles than rows."""
    grids = []
    with recording(lambda kernel, grid, args, constants: grids.append((kernel.fn.__name__, grid))):
        for rows in (3, 64):
            x = torch.empty(rows, 24, device="meta")
            offsets = torch.empty(5, dtype=torch.int32, device="meta")
            grouped_linear(x, plain(4, 16, 24, device="meta"), offsets, SMALL)
    assert grids == [("grouped_kernel", (3,)), ("grouped_kernel", ((64 + 5 * 15) // 16,))]
