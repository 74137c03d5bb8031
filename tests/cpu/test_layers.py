"""Whole parts of a layer in one kernel, against their decompositions; attention over split keys."""

from __future__ import annotations

import pytest
import torch

from dsv3 import ops
from dsv3.plugin import LatentCache, Prepared
from dsv3_cpu import attention, experts, linear, prolog, team, views
from dsv3_cpu.record import recorded
from tests.cpu.weights import LAYERS, weight

_ROUTING = {"n_group": 4, "topk_group": 2, "topk": 3, "score": "sigmoid", "group_score": "top2_sum", "renormalize": True,
            "scale": 2.5}  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 7, 16])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("quant", LAYERS)
def test_moe_is_its_decomposition(quant: str, shared: bool, tokens: int) -> None:
    w13, w2 = weight(quant, 8, 256, 192), weight(quant, 8, 192, 128)
    both = (weight(quant, 256, 192), weight(quant, 192, 128)) if shared else (None, None)
    x, gate, bias = torch.randn(tokens, 192), torch.randn(8, 192), torch.randn(8)
    where = torch.tensor([3, -1, 0, 1, 2, 4, -1, 5], dtype=torch.int32)
    for local in (None, where):
        arguments = {"gate": gate, "bias": bias, "w13": w13, "w2": w2, "shared13": both[0], "shared2": both[1], **_ROUTING}
        got = experts.moe_few(x=x, **arguments, expert_map=local)
        wanted = ops.moe(x=x, **arguments, expert_map=local)
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("tokens", [1, 5, 32])
@pytest.mark.parametrize(
    "quant", ["int8-w8a16", *(pytest.param(q, marks=pytest.mark.slow) for q in ("int4-w4a16", "int8-w8a8"))]
)
def test_moe_in_whole_numbers_is_its_decomposition_in_float32(quant: str, tokens: int) -> None:
    """bfloat16 in and out, widths that are no multiple of 128, shared experts stored otherwise than the routed ones."""
    w13, w2 = weight(quant, 8, 2 * 96, 200), weight(quant, 8, 200, 96)
    shared = weight("none", 256, 200, dtype=torch.bfloat16), weight("none", 200, 128, dtype=torch.bfloat16)
    x, gate, bias = torch.randn(tokens, 200).to(torch.bfloat16), torch.randn(8, 200), torch.randn(8)
    where = torch.tensor([3, -1, 0, 1, 2, 4, -1, 5])
    for local in (None, where):
        arguments = {"gate": gate, "bias": bias, "w13": w13, "w2": w2, **_ROUTING, "expert_map": local}
        got = experts.moe_few(x=x, **arguments, shared13=shared[0], shared2=shared[1])
        real = [Prepared("canonical", "none", w.shape, {"weight": w.tensors["weight"].float()}) for w in shared]
        wanted = ops.moe(x=x.float(), **arguments, shared13=real[0], shared2=real[1])
        largest = float(wanted.abs().max())
        torch.testing.assert_close(
            got.float(), wanted, rtol=2.0**-7, atol=(0.03 if quant == "int8-w8a8" else 2.0**-8) * largest
        )


@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("quant", LAYERS)
def test_mla_prolog_is_its_decomposition(quant: str, cache_dtype: torch.dtype, low: bool) -> None:
    heads, nope, rope, rank, width, tokens = 3, 32, 16, 128, 192, 4
    kv_b = weight("none", heads * (nope + 24), rank).tensors["weight"].view(heads, nope + 24, rank)
    weights = {"kv_a": weight(quant, rank + rope, width), "kv_a_norm": torch.rand(rank), "w_uk": kv_b[:, :nope]}
    if low:
        weights |= {
            "q_a": weight(quant, 96, width),
            "q_a_norm": torch.rand(96),
            "q_b": weight(quant, heads * (nope + rope), 96),
        }
    else:
        weights |= {"q": weight(quant, heads * (nope + rope), width)}

    def run(kernel):
        scale = torch.zeros(3, 16, 1) if cache_dtype == torch.float8_e4m3fn else None
        cache = LatentCache(torch.zeros(3, 16, rank, dtype=torch.uint8).view(torch.float8_e4m3fn) if scale is not None
                            else torch.zeros(3, 16, rank, dtype=cache_dtype), torch.zeros(3, 16, rope), scale)  # fmt: skip
        generator = torch.Generator().manual_seed(1)
        arguments = {
            "x": torch.randn(tokens, width, generator=generator), "weights": weights, "positions": torch.tensor([9, 3, 0, 70]),
            "cos_sin": torch.rand(80, rope, generator=generator), "slots": torch.tensor([17, -1, 40, 0]), "cache": cache,
            "eps": 1e-6, "n_heads": heads,
        }  # fmt: skip
        return (*kernel(**arguments), cache)

    q_c, q_pe, cache = run(prolog.mla_prolog)
    wanted_c, wanted_pe, wanted = run(ops.mla_prolog)
    torch.testing.assert_close(q_c, wanted_c, rtol=1e-3, atol=1e-3 * float(wanted_c.abs().max()))
    torch.testing.assert_close(q_pe, wanted_pe, rtol=1e-3, atol=1e-3 * float(wanted_pe.abs().max()))
    torch.testing.assert_close(cache.kpe, wanted.kpe, rtol=1e-3, atol=1e-3)
    rows = cache.ckv.float(), wanted.ckv.float()
    if cache.scale is not None and wanted.scale is not None:
        rows = rows[0] * cache.scale, rows[1] * wanted.scale
    torch.testing.assert_close(*rows, rtol=0.07, atol=1e-2)


@pytest.mark.parametrize("rank,rope", [(512, 64), (32, 8), (160, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_contexts_are_split_and_merged(dtype: torch.dtype, rank: int, rope: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths that are whole vectors and widths that are not; sequences of very different lengths, an empty one among them."""
    monkeypatch.setattr(team, "WORTH_THREADS", 0)
    pages, heads = 40, 5
    cache = LatentCache(torch.randn(pages, 16, rank).to(dtype), torch.randn(pages, 16, rope).to(dtype))
    arguments = {
        "q_c": torch.randn(4, heads, rank), "q_pe": torch.randn(4, heads, rope), "cache": cache,
        "block_table": torch.stack([torch.randperm(pages) for _ in range(3)]).to(torch.int32),
        "seq_lens": torch.tensor([600, 0, 37], dtype=torch.int32), "cu_q": torch.tensor([0, 3, 3, 4], dtype=torch.int32),
        "max_q": 3, "max_k": 600, "scale": 0.05, "start": 1,
    }  # fmt: skip
    o, lse = ops.mla_decode(**arguments)
    before = torch.get_num_threads()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(attention.mla_decode(**arguments))
    torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][0], o, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[0][1], lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("heads", [6, 16])
@pytest.mark.parametrize("keys", [1, 23, 48, 97, 130])
def test_few_keys_are_split_and_what_was_in_scratch_is_forgotten(
    keys: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 in, cached and out; the same on one thread and two, where these share keys or heads; after NaN everywhere."""
    monkeypatch.setattr(team, "WORTH_THREADS", 0)
    cache = LatentCache(torch.randn(3, 64, 64).to(torch.bfloat16), torch.randn(3, 64, 32).to(torch.bfloat16))
    arguments = {
        "q_c": torch.randn(1, heads, 64).to(torch.bfloat16), "q_pe": torch.randn(1, heads, 32).to(torch.bfloat16),
        "block_table": torch.tensor([[2, 0, 1]], dtype=torch.int32), "seq_lens": torch.tensor([keys], dtype=torch.int32),
        "cu_q": torch.tensor([0, 1], dtype=torch.int32), "max_q": 1, "max_k": keys, "scale": 0.1, "start": 0,
    }  # fmt: skip
    poison = LatentCache(torch.full_like(cache.ckv, float("nan")), torch.full_like(cache.kpe, float("nan")))
    real = {name: value.float() if name in ("q_c", "q_pe") else value for name, value in arguments.items()}
    o, lse = ops.mla_decode(**real, cache=LatentCache(cache.ckv.float(), cache.kpe.float()))
    before, found = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        assert torch.isnan(attention.mla_decode(**arguments, cache=poison)[0]).all()
        found.append(attention.mla_decode(**arguments, cache=cache))
    torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][0].float(), o, rtol=2.0**-7, atol=1e-3)
    torch.testing.assert_close(found[0][1], lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("length", [3, 64, 66, 129, 258, 700])
def test_a_token_attends_alike_decoded_or_verified_alone_or_beside_a_long_sequence(length: int, start: int) -> None:
    """To the last bit: where keys are split depends on nothing but their places."""
    pages, longest = 24, 1500
    cache = LatentCache(torch.randn(pages, 64, 64).to(torch.bfloat16), torch.randn(pages, 64, 32).to(torch.bfloat16))
    q_c, q_pe = torch.randn(4, 6, 64).to(torch.bfloat16), torch.randn(4, 6, 32).to(torch.bfloat16)

    def index(*values: object) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    def attend(rows: slice, tables: torch.Tensor, lengths: torch.Tensor, bounds: torch.Tensor) -> list[torch.Tensor]:
        most_q, most_k = int(bounds.diff().max()), int(lengths.max()) - start
        o, lse = attention.mla_decode(
            q_c[rows], q_pe[rows], cache, tables, lengths, bounds, most_q, most_k, 0.1, start,
        )  # fmt: skip
        return [o, lse]

    table = list(range(pages))[::-1]
    o, lse = attend(slice(0, 4), index(table, table), index(length, longest), index(0, 3, 4))  # three tokens verified
    for n in range(3):
        found = attend(slice(n, n + 1), index(table), index(length - 2 + n), index(0, 1))
        assert torch.equal(found[0], o[n : n + 1]) and torch.equal(found[1], lse[:, n : n + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rank", "rope"), [(64, 32), (50, 6)])
def test_heads_that_follow_others_for_want_of_memory_get_the_same_bits(
    rank: int, rope: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uncovered rows too, and when the step is recorded and run again."""
    heads, pages = 40, 12
    cache = LatentCache(torch.randn(pages, 64, rank).to(dtype), torch.randn(pages, 64, rope).to(dtype))
    q_c, q_pe = torch.randn(6, heads, rank).to(dtype), torch.randn(6, heads, rope).to(dtype)
    tables = torch.stack([torch.randperm(pages) for _ in range(2)]).to(torch.int32)
    lengths, bounds = (torch.tensor(values, dtype=torch.int32) for values in ([700, 5], [1, 4, 5]))
    asked: list[int] = []
    room = views.scratch_address
    monkeypatch.setattr(attention, "scratch_address", lambda size: asked.append(size) or room(size))

    def attend() -> tuple[torch.Tensor, torch.Tensor]:
        return attention.mla_decode(q_c, q_pe, cache, tables, lengths, bounds, 3, 700, 0.1, 0)

    whole = attend()
    monkeypatch.setattr(attention, "_MOST_SUMS", 1)
    found = attend()
    assert len(asked) == 1 + 3 and max(asked[1:]) <= asked[0] * 0.4, "16, 16 and 8 heads"
    assert torch.equal(found[0], whole[0]) and torch.equal(found[1], whole[1])
    kept: list[torch.Tensor] = []
    again = recorded(lambda: kept.extend(attend()))
    q_c.copy_(torch.randn(6, heads, rank))
    again()
    monkeypatch.undo()
    o, lse = attend()
    assert torch.equal(kept[0], o) and torch.equal(kept[1], lse)


@pytest.mark.parametrize("causal", [True, False])
def test_prefill_in_bfloat16_is_within_its_class(causal: bool) -> None:
    """What runs where the processor multiplies bfloat16; packed sequences, an empty one too, values narrower than keys."""
    cu = torch.tensor([0, 40, 40, 97], dtype=torch.int32)
    q, k, v = (torch.randn(97, 3, width).to(torch.bfloat16) for width in (48, 48, 32))
    arguments = {"cu_q": cu, "cu_k": cu, "max_q": 57, "max_k": 57, "scale": 0.1, "causal": causal}
    o, lse = attention.mla_prefill_bf16(q, k, v, **arguments)
    wanted, sums = ops.mla_prefill(q=q.double(), k=k.double(), v=v.double(), **arguments)
    assert (o.double() - wanted).abs().max() < 2.0**-7 * v.abs().max().double()
    torch.testing.assert_close(lse.double(), sums, rtol=1e-5, atol=1e-4)
    hidden = v.clone()
    hidden[96] = float("nan")
    assert torch.isfinite(attention.mla_prefill_bf16(q, k, hidden, **arguments)[0][:40]).all()


def test_a_layer_is_known_by_all_of_its_weights() -> None:
    """Callers may pair a weight with another partner, other scales or another norm than before; what is kept is not theirs."""
    x, weights = torch.randn(2, 160), torch.rand(2, 3)
    ids = torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.int32)
    w13 = weight("fp8-w8a16", 6, 256, 160)
    for seed in (1, 2):
        w2 = weight("fp8-w8a16", 6, 160, 128, seed=seed)
        few = experts.fused_experts_few(x, weights, ids, w13, w2)
        many = experts.fused_experts_many(x, weights, ids, w13, w2)
        assert (few - many).abs().max() < 1e-3 * many.abs().max()
    plain = weight("fp8-w8a16", 64, 160)
    double = Prepared("canonical", plain.quant, plain.shape, {**plain.tensors, "scale": 2 * plain.tensors["scale"]})
    first, second = (linear.quant_linear_few(x, w) for w in (plain, double))
    assert torch.equal(2 * first, second)


def test_a_prolog_is_known_by_its_norms_too() -> None:
    """Norms that are freed after a call, their memory used for something else."""
    weights = {"kv_a": weight("fp8-w8a16", 144, 192), "w_uk": torch.randn(3, 32, 128), "q": weight("fp8-w8a16", 144, 192)}
    x, found = torch.randn(1, 192), []
    for factor in (1.0, 1.0, 2.0):
        cache = LatentCache(torch.zeros(1, 16, 128), torch.zeros(1, 16, 16))
        norm = torch.full((128,), factor)
        prolog.mla_prolog(
            x, {**weights, "kv_a_norm": norm}, torch.tensor([0]), torch.rand(4, 16), torch.tensor([0]), cache, 1e-6, 3
        )
        found.append(cache.ckv[0, 0])
        del norm
        torch.full((128,), 1e30)
    assert torch.equal(found[0], found[1]) and torch.equal(2 * found[0], found[2])
