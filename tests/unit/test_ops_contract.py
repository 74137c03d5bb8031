"""What holds for every operator: the contract's names and arguments, shapes without data, checks, the sampler's generator."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from dsv3 import ops
from dsv3.errors import OperatorError, UsageError
from dsv3.ops.sampling import philox
from dsv3.plugin import LatentCache, Prepared
from dsv3.quant import quantize

# Names, arguments, order and defaults, as published.
CONTRACT = {
    "embedding": "ids, table",
    "rms_norm": "x, weight, eps",
    "apply_rope": "x, positions, cos_sin, interleaved=True",
    "silu_mul": "x",
    "act_quant": "x, group=128, dtype='float8_e4m3fn', scale_fmt='float32', amax_floor=0.0001",
    "quant_int8": "x, amax_floor=1e-10",
    "dequant_block": "weight, scale, dtype='bfloat16'",
    "fn_to_fnuz": "weight, scale",
    "linear": "x, weight, bias=None",
    "bmm": "x, weight",
    "router_gemm": "x, weight",
    "grouped_topk": "logits, bias, n_group, topk_group, topk, score='sigmoid', group_score='top2_sum', renormalize=True, scale=1.0",
    "moe_permute": "ids, n_experts",
    "moe_combine": "y, perm, weights",
    "kv_cache_write": "ckv, kpe, slots, cache",
    "kv_cache_gather": "cache, block_table, seq_lens, total, start=0",
    "mla_prefill": "q, k, v, cu_q, cu_k, max_q, max_k, scale, causal=True",
    "mla_decode": "q_c, q_pe, cache, block_table, seq_lens, cu_q, max_q, max_k, scale, start=0",
    "merge_attn_states": "o1, lse1, o2, lse2",
    "gumbel_argmax": "logits, seeds, positions, temperature",
    "add_rms_norm": "x, residual, weight, eps",
    "rms_norm_quant": "x, weight, eps, group, dtype, scale_fmt",
    "silu_mul_quant": "x, group, dtype, scale_fmt",
    "block_scaled_mm": "a, a_scale, b, b_scale, out_dtype",
    "int8_scaled_mm": "a, a_scale, b, b_scale, out_dtype",
    "quant_linear": "x, w",
    "grouped_linear": "x, w, offsets",
    "route": "x, gate, bias, n_group, topk_group, topk, score, group_score, renormalize, scale",
    "fused_experts": "x, weights, ids, w13, w2",
    "moe": "x, gate, bias, w13, w2, shared13, shared2, n_group, topk_group, topk, score, group_score, renormalize, scale, "
    "expert_map=None",
    "rope_cache_write": "q_pe, kpe, ckv, positions, cos_sin, slots, cache, interleaved=True",
    "mla_prolog": "x, weights, positions, cos_sin, slots, cache, eps, n_heads",
    "mtp_combine": "embedding, hidden, enorm, hnorm, eh_proj, eps",
    "all_reduce": "x, group",
}
COMPOSITES = {
    "add_rms_norm", "rms_norm_quant", "silu_mul_quant", "block_scaled_mm", "int8_scaled_mm", "quant_linear", "grouped_linear",
    "route", "fused_experts", "moe", "rope_cache_write", "mla_prolog", "mtp_combine",
}  # fmt: skip


def test_names_arguments_and_defaults_are_the_contracts() -> None:
    assert sorted(ops.names()) == sorted(CONTRACT)
    for name, wanted in CONTRACT.items():
        parameters = inspect.signature(getattr(ops, name)).parameters.values()
        found = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)
        assert found == wanted, name
        assert (ops.spec(name).decompose is not None) == (name in COMPOSITES), name
        assert ops.spec(name).since == 1
        assert (getattr(ops, name).__doc__ or "").strip(), name


def test_only_cache_writers_mutate() -> None:
    writers = {n for n in ops.names() if ops.spec(n).mutates}
    assert writers == {"kv_cache_write", "rope_cache_write", "mla_prolog"}


def test_an_unknown_operator_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="did you mean 'rms_norm'"):
        ops.spec("rms_nrom")


def _prepared(*shape: int, quant: str = "none", dtype: torch.dtype = torch.float32) -> Prepared:
    *lead, n, k = shape
    parts = [quantize(torch.randn(n, k).to(dtype), quant) for _ in range(lead[0] if lead else 1)]  # type: ignore[arg-type]
    tensors = {key: torch.stack([p[key] for p in parts]) if lead else parts[0][key] for key in parts[0]}
    return Prepared("canonical", quant, shape, tensors)  # type: ignore[arg-type]


def _example(op: str, quant: str = "none", dtype: torch.dtype = torch.float32, t: int = 3) -> dict[str, Any]:
    """Valid arguments for an operator."""
    torch.manual_seed(0)
    h, i, e, k, nh, r, p, dn, dv = 24, 10, 4, 2, 2, 16, 8, 6, 5
    i32, f8 = torch.int32, torch.float8_e4m3fn
    cache = LatentCache(torch.zeros(2, 4, r, dtype=dtype), torch.zeros(2, 4, p, dtype=dtype))
    x = torch.randn(t, h).to(dtype)
    routing = dict(n_group=2, topk_group=1, topk=k, score="sigmoid", group_score="top2_sum", renormalize=True, scale=1.0)
    table, slots, positions = torch.rand(9, p), torch.arange(t, dtype=i32), torch.arange(t, dtype=i32)
    gate, bias = torch.randn(e, h).to(dtype), torch.randn(e)
    experts = dict(w13=_prepared(e, 2 * i, h, quant=quant, dtype=dtype), w2=_prepared(e, h, i, quant=quant, dtype=dtype))
    ids = torch.tensor([[0, 3], [1, -1], [2, 2]], dtype=i32)[:t]
    weights = torch.rand(t, k)
    fp8 = dict(group=128, dtype="float8_e4m3fn", scale_fmt="ue8m0")
    norm = torch.ones(h, dtype=dtype)
    examples: dict[str, dict[str, Any]] = {
        "embedding": dict(ids=slots, table=torch.randn(7, h).to(dtype)),
        "rms_norm": dict(x=x, weight=norm, eps=1e-6),
        "add_rms_norm": dict(x=x, residual=x, weight=norm, eps=1e-6),
        "rms_norm_quant": dict(x=x, weight=norm, eps=1e-6, **fp8),
        "silu_mul_quant": dict(x=x, **fp8),
        "apply_rope": dict(x=torch.randn(t, nh, p).to(dtype), positions=positions, cos_sin=table),
        "silu_mul": dict(x=x),
        "act_quant": dict(x=x),
        "quant_int8": dict(x=x),
        "dequant_block": dict(weight=torch.randn(5, 130).to(f8), scale=torch.ones(1, 2)),
        "fn_to_fnuz": dict(weight=torch.randn(5, 130).to(f8), scale=torch.ones(1, 2)),
        "linear": dict(x=x, weight=torch.randn(9, h).to(dtype)),
        "bmm": dict(x=torch.randn(t, nh, 5).to(dtype), weight=torch.randn(nh, 5, 7).to(dtype)),
        "router_gemm": dict(x=x, weight=gate),
        "grouped_topk": dict(logits=torch.randn(t, e), bias=bias, n_group=2, topk_group=1, topk=k),
        "moe_permute": dict(ids=ids, n_experts=e),
        "moe_combine": dict(y=torch.randn(t * k, h).to(dtype), perm=ops.moe_permute(ids, e)[0], weights=weights),
        "kv_cache_write": dict(ckv=torch.randn(t, r).to(dtype), kpe=torch.randn(t, p).to(dtype), slots=slots, cache=cache),
        "kv_cache_gather": dict(
            cache=cache, block_table=torch.tensor([[1]], dtype=i32), seq_lens=torch.tensor([t], dtype=i32), total=t
        ),
        "mla_prefill": dict(
            q=torch.randn(t, nh, dn + p).to(dtype), k=torch.randn(t, nh, dn + p).to(dtype), v=torch.randn(t, nh, dv).to(dtype),
            cu_q=torch.tensor([0, t], dtype=i32), cu_k=torch.tensor([0, t], dtype=i32), max_q=t, max_k=t, scale=0.5,
        ),
        "mla_decode": dict(
            q_c=torch.randn(t, nh, r).to(dtype), q_pe=torch.randn(t, nh, p).to(dtype), cache=cache,
            block_table=torch.tensor([[1]], dtype=i32), seq_lens=torch.tensor([t], dtype=i32),
            cu_q=torch.tensor([0, t], dtype=i32), max_q=t, max_k=t, scale=0.5,
        ),
        "merge_attn_states": dict(
            o1=torch.randn(t, nh, dv).to(dtype), lse1=torch.randn(nh, t), o2=torch.randn(t, nh, dv).to(dtype),
            lse2=torch.randn(nh, t),
        ),
        "gumbel_argmax": dict(
            logits=torch.randn(t, 11).to(dtype), seeds=torch.arange(t), positions=positions, temperature=torch.tensor([0.0, 1.0, 0.5])[:t]
        ),
        "block_scaled_mm": dict(
            a=torch.randn(t, 130).to(f8), a_scale=torch.ones(t, 2), b=torch.randn(5, 130).to(f8), b_scale=torch.ones(1, 2),
            out_dtype="bfloat16",
        ),
        "int8_scaled_mm": dict(
            a=torch.ones(t, 130, dtype=torch.int8), a_scale=torch.ones(t, 1), b=torch.ones(5, 130, dtype=torch.int8),
            b_scale=torch.ones(5, 1), out_dtype="float32",
        ),
        "quant_linear": dict(x=x, w=_prepared(9, h, quant=quant, dtype=dtype)),
        "grouped_linear": dict(
            x=x, w=_prepared(e, 9, h, quant=quant, dtype=dtype), offsets=torch.tensor([0, 1, 1, 2, 3], dtype=i32).clamp_max(t)
        ),
        "route": dict(x=x, gate=gate, bias=bias, **routing),
        "fused_experts": dict(x=x, weights=weights, ids=ids, **experts),
        "moe": dict(x=x, gate=gate, bias=bias, shared13=None, shared2=None, **experts, **routing),
        "rope_cache_write": dict(
            q_pe=torch.randn(t, nh, p).to(dtype), kpe=torch.randn(t, p).to(dtype), ckv=torch.randn(t, r).to(dtype),
            positions=positions, cos_sin=table, slots=slots, cache=cache,
        ),
        "mla_prolog": dict(
            x=x, positions=positions, cos_sin=table, slots=slots, cache=cache, eps=1e-6, n_heads=nh,
            weights=dict(
                q=_prepared(nh * (dn + p), h, quant=quant, dtype=dtype), kv_a=_prepared(r + p, h, quant=quant, dtype=dtype),
                kv_a_norm=torch.ones(r, dtype=dtype), w_uk=torch.randn(nh, dn, r).to(dtype),
            ),
        ),
        "mtp_combine": dict(
            embedding=x, hidden=x, enorm=norm, hnorm=norm, eh_proj=torch.randn(h, 2 * h).to(dtype), eps=1e-6
        ),
        "all_reduce": dict(x=x, group=None),
    }  # fmt: skip
    return examples[op]


def _to_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, dict):
        return {k: _to_meta(v) for k, v in value.items()}
    if isinstance(value, Prepared):
        return Prepared(value.layout, value.quant, value.shape, _to_meta(value.tensors), value.scale_fmt)
    if isinstance(value, LatentCache):
        return LatentCache(_to_meta(value.ckv), _to_meta(value.kpe), _to_meta(value.scale))
    return value


def _shapes(outputs: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    many = outputs if isinstance(outputs, tuple) else () if outputs is None else (outputs,)
    return [(tuple(o.shape), o.dtype) for o in many]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", CONTRACT)
def test_the_specification_predicts_shapes_and_dtypes(op: str, dtype: torch.dtype) -> None:
    """The line says what the reference returns, on the CPU and in shapes only."""
    known = ops.spec(op)
    arguments = {**known.defaults, **_example(op, dtype=dtype)}
    found = _shapes(known.reference(**arguments))
    assert _shapes(known.meta(_to_meta(arguments))) == found
    assert _shapes(known.reference(**_to_meta(arguments))) == found


@pytest.mark.parametrize("op", CONTRACT)
def test_no_tokens_are_no_error(op: str) -> None:
    known = ops.spec(op)
    arguments = {**known.defaults, **_example(op, t=0)}
    assert _shapes(known.reference(**arguments)) == _shapes(known.meta(_to_meta(arguments)))


@pytest.mark.parametrize("quant", ["none", "fp8-w8a8", "fp8-w8a16", "int8-w8a8", "int8-w8a16", "int4-w4a16"])
@pytest.mark.parametrize("op", ["quant_linear", "grouped_linear", "fused_experts", "moe", "mla_prolog"])
def test_every_scheme_runs_and_comes_near_the_unquantised_result(op: str, quant: str) -> None:
    arguments, plain = _example(op, quant), _example(op)
    found, wanted = ops.spec(op).reference(**arguments), ops.spec(op).reference(**plain)
    first = (found, wanted) if isinstance(found, torch.Tensor) else (found[0], wanted[0])
    error = (first[0] - first[1]).norm() / first[1].norm()
    assert error <= {"none": 0, "int4-w4a16": 0.3}.get(quant, 0.12)
    assert _shapes(ops.spec(op).reference(**_to_meta(arguments))) == _shapes(found)


@pytest.mark.parametrize("op", CONTRACT)
def test_inputs_are_unchanged_and_runs_are_equal(op: str) -> None:
    arguments, again = _example(op), _example(op)
    first = ops.spec(op).reference(**arguments)
    if not ops.spec(op).mutates:
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value.float().nan_to_num(), again[name].float().nan_to_num()), name
    second = ops.spec(op).reference(**again)
    for a, b in zip(*([o] if isinstance(o, torch.Tensor) else list(o or ()) for o in (first, second)), strict=True):
        assert torch.equal(a.float(), b.float())


@pytest.mark.parametrize("op", CONTRACT)
def test_a_wrong_rank_and_a_wrong_dtype_are_refused_by_name(op: str) -> None:
    for name, value in _example(op).items():
        if not isinstance(value, torch.Tensor):
            continue
        if op != "fn_to_fnuz":  # takes any shape
            with pytest.raises(OperatorError, match=rf"{op}: {name} has shape"):
                ops.spec(op).reference(**{**_example(op), name: value[None]})
        with pytest.raises(OperatorError, match=rf"{op}: {name} is bool"):
            ops.spec(op).reference(**{**_example(op), name: torch.zeros(value.shape, dtype=torch.bool)})


@pytest.mark.parametrize(
    ("op", "argument", "shape"),
    [
        ("rms_norm", "weight", (25,)), ("linear", "weight", (9, 23)), ("apply_rope", "cos_sin", (9, 6)),
        ("silu_mul", "x", (3, 7)), ("dequant_block", "scale", (2, 2)), ("moe_combine", "perm", (5,)),
        ("mla_decode", "cu_q", (3,)), ("mla_prefill", "k", (3, 2, 13)), ("kv_cache_write", "ckv", (3, 15)),
        ("merge_attn_states", "lse1", (3, 2)), ("mtp_combine", "eh_proj", (24, 47)), ("grouped_topk", "bias", (5,)),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(op: str, argument: str, shape: tuple[int, ...]) -> None:
    value = _example(op)[argument]
    with pytest.raises(OperatorError, match=rf"{op}: "):
        ops.spec(op).reference(**{**_example(op), argument: torch.zeros(shape).to(value.dtype)})


# -- the sampler


def _philox_python(counter: list[int], key: list[int]) -> list[int]:
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_philox_gives_the_published_vectors() -> None:
    ones = 0xFFFFFFFF
    assert _philox_python([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert _philox_python([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    for token, position, seed in [(0, 0, 0), (5, 7, 123), (129279, 163839, -1), (1, 2, 0x0123456789ABCDEF)]:
        found = philox(torch.tensor([token]), torch.tensor([position]), torch.tensor([seed]))
        unsigned = seed & (1 << 64) - 1
        assert found.item() == _philox_python([token, position, 0, 0], [unsigned & ones, unsigned >> 32])[0]


def test_gumbel_argmax_draws_from_the_softmax() -> None:
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0])
    draws, temperature = 20000, 0.7
    ids = ops.gumbel_argmax(
        logits.expand(draws, 5),
        torch.full((draws,), 42),
        torch.arange(draws, dtype=torch.int32),
        torch.full((draws,), temperature),
    )
    wanted = torch.softmax(logits.double() / temperature, -1)
    found = torch.bincount(ids.long(), minlength=5) / draws
    assert 0.5 * (found - wanted).abs().sum() < 0.012  # total variation; about 0.006 is expected of 20,000 fair draws
    again = ops.gumbel_argmax(logits[None], torch.tensor([42]), torch.tensor([17]), torch.tensor([temperature]))
    assert again[0] == ids[17]


def test_gumbel_argmax_at_temperature_zero_is_the_lowest_best_id() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]]).bfloat16()
    ids = ops.gumbel_argmax(logits, torch.tensor([1, 2]), torch.tensor([0, 0]), torch.zeros(2))
    assert ids.tolist() == [1, 0] and ids.dtype == torch.int32
    assert ops.gumbel_argmax(
        logits[:0], torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int32), torch.zeros(0)
    ).shape == (0,)


def test_dimensions_have_the_contracts_letters() -> None:
    dims = {op: set(ops.spec(op).dims) for op in CONTRACT}
    for op in ("grouped_topk", "route", "fused_experts", "moe", "moe_permute"):
        assert {"T", "k", "E"} <= dims[op], op
    assert {"M", "k"} <= dims["moe"] & dims["fused_experts"] & dims["moe_permute"] & dims["moe_combine"]
    assert ops.spec("moe").bind(_example("moe")) == {"T": 3, "H": 24, "Eg": 4, "E": 4, "I": 10, "k": 2, "M": 6}
