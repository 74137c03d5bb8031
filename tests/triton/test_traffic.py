"""The bytes that decode kernels move, counted while they are interpreted: every byte of weights and cache once.

Activations are left out: programs that share a token read it again from a cache. Sizes keep the ratios of DeepSeek-V3: 16
heads on a rank of 8, a latent of 512 with 64 rotary dimensions, more experts than are chosen.
"""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from dsv3.bench.calls.shapes import V3, Maker
from dsv3.conformance.target import Target, source_of
from dsv3.plugin import LatentCache, Prepared
from dsv3_triton.traffic import counted

SIZES = replace(
    V3, hidden=1024, q_rank=256, dense=8192, expert=256, experts=8, topk=2, groups=1, kept_groups=1, vocabulary=8192, tp=8,
    ep=1, context=300,
)  # fmt: skip
SCHEMES = ("none", "fp8-w8a8", "fp8-w8a16", "int8-w8a8", "int8-w8a16", "int4-w4a16")


@pytest.fixture(scope="module", params=["sm_90", "sm_80", "gfx942"])
def target(request):
    return Target(source_of("rocm" if request.param.startswith("gfx") else "cuda", request.param))


def _tensors(name, value):
    if isinstance(value, Prepared):
        return {f"{name}.{k}": t for k, t in value.tensors.items()}
    if isinstance(value, LatentCache):
        return {f"{name}.{k}": t for k in ("ckv", "kpe", "scale") if (t := getattr(value, k)) is not None}
    return {name: value}


def _run(target, op, arguments, hot):
    """Loaded over least, of the arguments named in `hot`, whose least is what is touched, or the number given."""
    kernel = next(k for k in target.kernels(op) if not target.refusal(k, arguments, ()))
    given = target.prepare(kernel, arguments)
    tensors = {k: t for name in hot for k, t in _tensors(name, given[name]).items()}
    with counted(tensors) as found:
        target.function(op, kernel.name)(**given)
    loaded = sum(found[k].loaded for k in tensors)
    touched = sum(found[k].touched for k in tensors)
    whole = sum(t.numel() * t.element_size() for t in tensors.values())
    print(
        f"\n{target.source.device.arch} {op} {kernel.name}: {loaded} bytes loaded, {touched} different, {whole} in all", end=""
    )
    return loaded, touched, whole


def _once(loaded, least):
    assert least <= loaded <= 1.1 * least


@pytest.mark.parametrize("quant", SCHEMES)
@pytest.mark.parametrize("tokens", [1, 8])
def test_a_projection_reads_its_weight_once(target, quant, tokens):
    maker = Maker(SIZES, "cpu")
    x = maker.normal(tokens, 1024)
    loaded, touched, whole = _run(target, "quant_linear", {"x": x, "w": maker.prepared(quant, 576, 1024)}, ["w"])
    assert touched == whole
    _once(loaded, whole)


def test_the_head_and_the_absorbed_projections_read_their_weights_once(target):
    maker = Maker(SIZES, "cpu")
    x, w = maker.normal(2, 1024), maker.weight(640, 1024)
    loaded, _, whole = _run(target, "linear", {"x": x, "weight": w, "bias": None}, ["weight"])
    _once(loaded, whole)
    heads = {"x": maker.normal(2, 4, 128), "weight": maker.weight(4, 128, 512)}
    loaded, _, whole = _run(target, "bmm", heads, ["weight"])
    _once(loaded, whole)


@pytest.mark.parametrize("quant", SCHEMES)
def test_experts_read_the_weights_of_the_chosen_ones_once(target, quant):
    maker = Maker(SIZES, "cpu")
    ids = torch.tensor([[0, 3], [3, 5]], dtype=torch.int32)
    arguments = {
        "x": maker.normal(2, 256), "weights": torch.rand(2, 2), "ids": ids, "w13": maker.prepared(quant, 8, 256, 256),
        "w2": maker.prepared(quant, 8, 256, 128),
    }  # fmt: skip
    loaded, touched, whole = _run(target, "fused_experts", arguments, ["w13", "w2"])
    assert touched * 8 == whole * 3  # three of eight experts
    _once(loaded, touched)


@pytest.mark.parametrize("kv", ["bfloat16", "fp8"])
@pytest.mark.parametrize("queries", [1, 2])
def test_attention_reads_each_cached_row_once(target, kv, queries):
    """16 heads, with one query and with a draft to verify: one tile."""
    _once(*_attention(target, kv, queries, heads=16))


@pytest.mark.parametrize("kv", ["bfloat16", "fp8"])
def test_attention_over_all_heads_reads_the_cache_once_per_tile(target, kv):
    """128 heads are more rows than accumulators fit into registers for: every tile of 32 or 64 rows reads the cache."""
    loaded, least = _attention(target, kv, 1, heads=128)
    assert loaded <= 4.4 * least


def _attention(target, kv, queries, heads):
    maker, length = Maker(SIZES, "cpu"), 300
    arguments = {
        "q_c": maker.normal(queries, heads, 512), "q_pe": maker.normal(queries, heads, 64), "cache": maker.cache(kv, length),
        **maker.tables(1, length), "cu_q": torch.tensor([0, queries], dtype=torch.int32), "max_q": queries, "max_k": length,
        "scale": 0.1, "start": 0,
    }  # fmt: skip
    loaded, touched, _ = _run(target, "mla_decode", arguments, ["cache"])
    assert touched == length * (512 + 16 + 128 if kv == "fp8" else 2 * 576)
    return loaded, touched
