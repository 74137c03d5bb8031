"""Products and the router in Triton's interpreter: what the conformance suite does not show."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import pytest

pytest.importorskip("triton")

import torch
import triton
import triton.language as tl

from dsv3.errors import OperatorError
from dsv3.plugin import Prepared
from dsv3.quant import quantize
from dsv3_triton.facts import ARCHITECTURES
from dsv3_triton.launch import launch
from dsv3_triton.layouts import from_fnuz, to_fnuz
from dsv3_triton.routing import grouped_topk, route

TABLES = Path(__file__).parents[2] / "configs" / "kernels"
FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


@triton.jit
def convert(x_ptr, y_ptr, N: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(y_ptr + lane, tl.load(x_ptr + lane).to(y_ptr.dtype.element_ty))


@triton.jit
def multiply(a_ptr, b_ptr, y_ptr, K: tl.constexpr):
    row, k = tl.arange(0, 16)[:, None], tl.arange(0, K)[None, :]
    a, b = tl.load(a_ptr + row * K + k), tl.load(b_ptr + row * K + k)
    tl.store(y_ptr + row * 16 + tl.arange(0, 16)[None, :], tl.dot(a, tl.trans(b)))


def _interpreted(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty(x.numel(), dtype=dtype)
    launch(convert, (1,), x, y, N=x.numel())
    return y


def test_interpreted_float32_rounds_to_bfloat16_as_torch_does() -> None:
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F80FFFF, 0x7F7FFFFF, 0x00008001], dtype=torch.int32).view(torch.float32)
    odd = torch.tensor([float("nan"), float("inf"), -0.0])
    x = torch.cat([ties, odd, torch.randn(248, generator=torch.Generator().manual_seed(0))])
    torch.testing.assert_close(_interpreted(x, torch.bfloat16), x.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("encoding", FP8)
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float32])
def test_interpreted_fp8_codes_are_the_numbers_that_torch_reads(encoding: torch.dtype, to: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(encoding)
    torch.testing.assert_close(_interpreted(codes, to), codes.to(to), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, *FP8])
def test_interpreted_products_are_those_of_the_numbers(dtype: torch.dtype) -> None:
    a, b = torch.randint(-4, 5, (2, 16, 32), generator=torch.Generator().manual_seed(0)).to(dtype)
    y = torch.empty(16, 16)
    launch(multiply, (1,), a, b, y, K=32)
    assert torch.equal(y, a.float() @ b.float().T)


def _fp8_weight(*codes: int) -> Prepared:
    made = dict(quantize(torch.randn(130, 200, generator=torch.Generator().manual_seed(0)), "fp8-w8a16"))
    made["weight"].view(torch.uint8)[0, : len(codes)] = torch.tensor(codes, dtype=torch.uint8)
    return Prepared("canonical", "fp8-w8a16", (130, 200), made)


def test_fnuz_weights_are_the_same_numbers_and_come_back() -> None:
    weight = _fp8_weight(0x80)
    changed = to_fnuz(weight)
    assert changed.layout == "fnuz" and changed.tensors["weight"].dtype == torch.float8_e4m3fnuz
    assert torch.equal(changed.tensors["weight"].float() * 2, weight.tensors["weight"].float())
    assert torch.equal(changed.tensors["scale"], weight.tensors["scale"] * 2)
    back = from_fnuz(changed)
    assert back.tensors["weight"].view(torch.uint8)[0, 0] == 0  # -0 became 0
    assert torch.equal(back.tensors["weight"].float(), weight.tensors["weight"].float())


def test_fnuz_refuses_nan_codes_and_counts_them() -> None:
    with pytest.raises(OperatorError, match="3 NaN codes"):
        to_fnuz(_fp8_weight(0x7F, 0xFF, 0x7F))


def test_all_254_codes_that_are_numbers_keep_their_value_as_fnuz() -> None:
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8).view(1, 254)
    weight = Prepared("canonical", "fp8-w8a8", (1, 254), {"weight": codes.view(torch.float8_e4m3fn), "scale": torch.ones(1, 2)})
    changed = to_fnuz(weight)
    bits = changed.tensors["weight"].view(torch.uint8)
    assert torch.equal(bits, torch.where(codes == 0x80, 0, codes))
    independent = torch.from_numpy(bits.numpy().view(ml_dtypes.float8_e4m3fnuz).astype("float32"))
    assert torch.equal(independent * changed.tensors["scale"][0, 0], weight.tensors["weight"].float())


_V3 = {
    "n_group": 4,
    "topk_group": 2,
    "topk": 3,
    "score": "sigmoid",
    "group_score": "top2_sum",
    "renormalize": True,
    "scale": 1.0,
}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0])
def test_equal_logits_of_any_kind_choose_the_lowest_ids(value: float) -> None:
    _, ids = grouped_topk(torch.full((2, 16), value), None, **_V3, config={"BLOCK_T": 1})
    assert ids.tolist() == [[0, 1, 2]] * 2


def test_a_nan_logit_is_chosen_and_spoils_its_token_only() -> None:
    logits = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    logits[1, 9] = float("nan")
    weights, ids = grouped_topk(logits, None, **_V3, config={"BLOCK_T": 4})
    assert 9 in ids[1].tolist() and len(set(ids[1].tolist())) == 3
    assert not weights[[0, 2]].isnan().any() and weights[1].isnan().all()


def test_route_chooses_alike_however_the_gate_is_cut() -> None:
    generator = torch.Generator().manual_seed(0)
    x, gate = torch.randn(5, 40, generator=generator), torch.randn(16, 40, generator=generator)
    answers = [
        route(x, gate, None, **_V3, config={"BLOCK_T": t, "BLOCK_E": e, "BLOCK_H": 64}) for t, e in ((1, 4), (4, 16), (8, 2))
    ]
    for weights, ids in answers[1:]:
        assert torch.equal(ids, answers[0][1])
        torch.testing.assert_close(weights, answers[0][0])


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("table", sorted(p.stem for p in TABLES.glob("quant_linear_*.json")))
def test_tables_cover_every_architecture_and_tiles_never_straddle_a_block(table: str, arch: str) -> None:
    entries = json.loads((TABLES / f"{table}.json").read_text())["configs"]
    mine = [e for e in entries if arch in e.get("arch", [arch])]
    assert any("when" not in e for e in mine)
    if "fp8" in table or "int4" in table:
        assert all(128 % e["config"]["BLOCK_N"] == 0 and 128 % e["config"].get("BLOCK_K", 128) == 0 for e in mine)
