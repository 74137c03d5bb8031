"""The page about the operators is what `dsv3.ops` says today, and what it says is complete and true."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3 import ops

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made() -> str:
    found = importlib.util.spec_from_file_location("operators_page", ROOT / "ci" / "docs" / "operators.py")
    assert found is not None and found.loader is not None
    module: Any = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return str(module.page())


def test_the_page_is_current(made: str) -> None:
    stored = (ROOT / "ci" / "docs" / "operators.md").read_text(encoding="utf-8")
    assert made == stored, "run: python ci/docs/operators.py ci/docs/operators.md"


def test_every_operator_has_its_section_and_every_link_leads_somewhere(made: str) -> None:
    sections = re.findall(r"^## (\w+)$", made, re.M)
    assert sections == ops.names()
    assert set(re.findall(r"\]\(#(\w+)\)", made)) <= set(sections)
    for name in ops.names():
        spec = ops.spec(name)
        assert spec.description and spec.invariants and "Invariants" not in spec.description
        assert bool(spec.parts) == (spec.decompose is not None)
        assert set(spec.parts) <= set(ops.names())


def _scaled(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 200, generator=generator)
    return x, x * 8


@pytest.mark.parametrize("seed", range(3))
def test_scaling_by_a_power_of_two_is_exact_where_the_page_says_so(seed: int) -> None:
    x, more = _scaled(seed)
    weight = torch.randn(7, 200, generator=torch.Generator().manual_seed(seed + 9))
    assert torch.equal(ops.linear(more, weight), 8 * ops.linear(x, weight))
    assert torch.equal(ops.rms_norm(x, weight[0] * 8, 1e-6), 8 * ops.rms_norm(x, weight[0], 1e-6))
    up = torch.cat([x[:, :100], more[:, 100:]], dim=1)
    assert torch.equal(ops.silu_mul(up), 8 * ops.silu_mul(x))
    for quantise in (ops.act_quant, ops.quant_int8):
        (q, scale), (q8, scale8) = quantise(x), quantise(more)
        assert torch.equal(q.view(torch.int8), q8.view(torch.int8)) and torch.equal(scale8, 8 * scale)


def test_zeros_and_identities_are_what_the_page_says() -> None:
    x, _ = _scaled(0)
    zero = torch.zeros(2, 200)
    assert not ops.rms_norm(zero, x[0], 1e-6).any()
    for q, scale in (ops.act_quant(zero), ops.quant_int8(zero)):
        assert not q.to(torch.float32).any() and bool((scale > 0).all()) and bool(torch.isfinite(scale).all())
    rotated = ops.apply_rope(x.view(5, 4, 50), torch.zeros(5, dtype=torch.int32), torch.tensor([[1.0] * 25 + [0.0] * 25]))
    assert torch.equal(rotated, x.view(5, 4, 50))
    nothing = torch.full((4, 5), float("-inf"))
    o, lse = x.view(5, 4, 50), torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    for merged in (ops.merge_attn_states(o, lse, o * float("nan"), nothing), ops.merge_attn_states(o, nothing, o, lse)):
        assert torch.equal(merged[0], o) and torch.equal(merged[1], lse)
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8).view(torch.float8_e4m3fn)
    fnuz, doubled = ops.fn_to_fnuz(codes, torch.ones(1))
    assert len(codes) == 254 and torch.equal(fnuz.to(torch.float32) * doubled, codes.to(torch.float32))


def test_routing_is_what_the_page_says() -> None:
    generator = torch.Generator().manual_seed(2)
    logits, bias = torch.randn(40, 16, generator=generator), torch.randn(16, generator=generator)
    weights, ids = ops.grouped_topk(logits, bias, 4, 2, 3, scale=2.5)
    assert all(len(set(row)) == 3 and len({i // 4 for i in row}) <= 2 for row in ids.tolist())
    torch.testing.assert_close(weights.sum(dim=-1), torch.full((40,), 2.5))
    assert torch.equal(ops.grouped_topk(logits, bias + 4, 4, 2, 3)[1], ids)
    perm, offsets = ops.moe_permute(torch.where(ids == 3, -1, ids), 16)
    assert sorted(perm[: int(offsets[-1])].tolist()) == (ids.flatten() != 3).nonzero().flatten().tolist()
