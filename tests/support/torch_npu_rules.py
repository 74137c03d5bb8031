"""What the vendor's pages ask of the operators that the backend calls, where the shape rules in the wheel do not look. Ours,
written from those pages (torch_npu/_op_plugin_docs.py of the wheel); `check` is told every call with its arguments by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

BF16, F32, I8, I32, I64 = torch.bfloat16, torch.float32, torch.int8, torch.int32, torch.int64
_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)


def check(name: str, a: dict[str, Any]) -> None:
    """AssertionError where a call asks what the page of the operator does not offer."""
    try:
        RULES[name](a)
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise AssertionError(f"{name}: {error!r}") from error


def _is(tensor: Any, dtype: torch.dtype, *shape: int, dense: bool = True) -> None:
    assert tensor.dtype == dtype, f"{tensor.dtype} instead of {dtype}"
    assert tuple(tensor.shape) == shape, f"shape {tuple(tensor.shape)} instead of {shape}"
    assert not dense or tensor.is_contiguous(), f"a strided tensor of shape {shape}"


def _norm(a: dict[str, Any]) -> None:
    x = a.get("self", a.get("x1"))
    assert x.dtype in (BF16, F32)
    _is(a["gamma"], x.dtype, x.shape[-1])
    if "x2" in a:
        _is(a["x2"], x.dtype, *x.shape)


def _swiglu(a: dict[str, Any]) -> None:
    assert a["self"].dtype in (BF16, F32) and a["self"].shape[a["dim"]] % 2 == 0


def _dynamic_quant(a: dict[str, Any]) -> None:
    assert a["input"].dtype == BF16 and a["input"].dim() == 2 and a["dst_type"] == 1 and a["quant_mode"] == "pertoken"


def _quant_matmul(a: dict[str, Any]) -> None:
    (m, k), n = a["x1"].shape, a["x2"].shape[1]
    _is(a["x1"], I8, m, k)
    _is(a["x2"], I8, k, n, dense=False)
    _is(a["scale"], F32, n)
    _is(a["pertoken_scale"], F32, m)
    assert a["output_dtype"] == 15 and m > 0 and max(k, n) <= 65535


def _weight_quant(a: dict[str, Any]) -> None:
    (m, k), packed = a["x"].shape, a["weight"].dtype == I32
    _is(a["x"], BF16, m, k)
    n = a["weight"].shape[1] * (8 if packed else 1)
    _is(a["weight"], I32 if packed else I8, k, n // 8 if packed else n, dense=packed)
    size = a["antiquant_group_size"]
    assert size == 0 or (size % 32 == 0 and 32 <= size < k)
    _is(a["antiquant_scale"], BF16, -(-k // size) if size else 1, n)
    assert m > 0 and k <= 65535 and n <= 65535 and a["quant_scale"] is None


def _int4_pack(a: dict[str, Any]) -> None:
    assert a["weight"].dtype == I32 and a["weight"].is_contiguous() and a["weight"].shape[-1] % 8 == 0


def _grouped(a: dict[str, Any]) -> None:
    (x,), (w,) = a["x"], a["weight"]
    k, (experts, _, n) = x.shape[1], w.shape
    assert w.shape[1] == k, f"weight is {tuple(w.shape)}, x {tuple(x.shape)}: not [E, K, N]"
    assert experts <= 1024 and max(k, n) < 65536
    _is(a["group_list"], I64, experts)
    assert (a["group_type"], a["group_list_type"], a["split_item"]) == (0, 0, 3) and a["scale"] is None
    kinds = {(BF16, BF16): 15, (I8, I8): 3, (BF16, I8): 15}
    assert a["output_dtype"] == kinds[x.dtype, w.dtype]
    half = (x.dtype, w.dtype) == (BF16, I8)
    for name in ("antiquant_scale", "antiquant_offset"):
        assert (a[name] is not None) == half
        if half:
            _is(a[name][0], BF16, experts, n)


def _dequant_swiglu(a: dict[str, Any]) -> None:
    m, n = a["x"].shape
    experts = a["group_index"].shape[0]
    _is(a["x"], I32, m, n)
    _is(a["weight_scale"], F32, experts, n)
    _is(a["activation_scale"], F32, m)
    _is(a["group_index"], I64, experts)
    assert a["activate_left"] and a["quant_mode"] == 1 and a["swiglu_mode"] == 0 and (n // 2) % 64 == 0 and n // 2 <= 10496


def _gating(a: dict[str, Any]) -> None:
    t, e = a["x"].shape
    _is(a["x"], F32, t, e)
    if a["bias"] is not None:
        _is(a["bias"], F32, e)
    size = e // a["group_count"]
    assert e % a["group_count"] == 0 and size > 2 and -(-size // 32) * 32 * a["group_count"] <= 2048
    assert 1 <= a["k_group"] <= a["group_count"] and a["k"] <= size * a["k_group"]
    assert a["renorm"] == 0 and a["norm_type"] in (0, 1) and a["group_select_mode"] in (0, 1)


def _init_routing(a: dict[str, Any]) -> None:
    t, k = a["expert_idx"].shape
    _is(a["expert_idx"], I32, t, k)
    assert a["x"].dtype in (BF16, I8) and a["x"].shape[0] == t
    first, end = a["active_expert_range"]
    assert 0 <= first < end <= a["expert_num"] and a["active_num"] == t * k
    assert a["expert_tokens_num_flag"] and a["expert_tokens_num_type"] == 1 and a["drop_pad_mode"] == 0
    assert a["quant_mode"] == -1 and a["row_idx_type"] in (0, 1)
    if a["scale"] is not None:
        _is(a["scale"], F32, t)


def _rotary(a: dict[str, Any]) -> None:
    x = a["self"]
    b, s, n, d = x.shape
    assert a["rotary_mode"] in ("interleave", "half") and a["rotate"] is None
    assert x.dtype == F32 and b * n < 1000 and d < 896 and d % 2 == 0
    for table in ("r1", "r2"):
        _is(a[table], x.dtype, 1, s, 1, d, dense=False)


def _transposing(a: dict[str, Any]) -> None:
    (t, heads, inner), weight = a["input"].shape, a["weight"]
    _is(a["input"], weight.dtype, t, heads, inner)
    _is(weight, weight.dtype, heads, inner, weight.shape[2])
    assert heads * inner < 65536 and weight.shape[2] < 65536
    assert list(a["perm_x1"]) == [1, 0, 2] == list(a["perm_y"]) and list(a["perm_x2"]) == [0, 1, 2]


def _attention(a: dict[str, Any]) -> None:
    q = a["query"]
    t, heads, width = q.shape
    assert a["input_layout"] == "TND" and q.dtype == BF16 and a["num_query_heads"] == heads
    ends, lengths = list(a["actual_seq_qlen"]), list(a["actual_seq_kvlen"])
    counts = [e - s for s, e in zip([0, *ends], ends, strict=False)]
    assert ends[-1] == t and len(lengths) == len(ends) <= 4096 and min(counts) > 0
    assert (a["sparse_mode"], a["atten_mask"] is not None) in ((0, False), (3, True))
    if a["atten_mask"] is not None:
        _is(a["atten_mask"], torch.bool, 2048, 2048)
    assert a["return_softmax_lse"]
    paged(a, q, counts, lengths) if width == 512 else packed(a, q, counts, lengths)


def paged(a: dict[str, Any], q: Any, counts: list[int], lengths: list[int]) -> None:
    t, heads, _ = q.shape
    pages, size, _ = a["key"].shape
    assert heads in _HEADS and a["num_key_value_heads"] == 1 and max(counts) <= 16
    assert size in (16, 128) and a["block_size"] == size
    _is(a["key"], BF16, pages, size, 512)
    _is(a["value"], BF16, pages, size, 512)
    _is(a["query_rope"], BF16, t, heads, 64)
    _is(a["key_rope"], BF16, pages, size, 64)
    _is(a["block_table"], I32, len(lengths), a["block_table"].shape[1])
    assert a["block_table"].shape[1] * size >= max(lengths)
    assert all(n <= length for n, length in zip(counts, lengths, strict=True))


def packed(a: dict[str, Any], q: Any, counts: list[int], ends: list[int]) -> None:
    m, heads, _ = a["key"].shape
    assert ends[-1] == m and a["block_table"] is None and a["query_rope"] is None and a["num_key_value_heads"] == heads
    _is(q, BF16, q.shape[0], heads, 192)
    _is(a["key"], BF16, m, heads, 192)
    _is(a["value"], BF16, m, heads, 128)
    keys = [e - s for s, e in zip([0, *ends], ends, strict=False)]
    assert a["sparse_mode"] == 0 or all(n <= k for n, k in zip(counts, keys, strict=True))


def _format(a: dict[str, Any]) -> None:
    assert a["acl_format"] in (2, 29)
    assert a["acl_format"] == 2 or (a["self"].dtype == I8 and a["self"].is_contiguous() and a["self"].dim() in (2, 3))


RULES: dict[str, Callable[[dict[str, Any]], None]] = {
    "npu_rms_norm": _norm,
    "npu_add_rms_norm": _norm,
    "npu_swiglu": _swiglu,
    "npu_dynamic_quant": _dynamic_quant,
    "npu_quant_matmul": _quant_matmul,
    "npu_weight_quant_batchmatmul": _weight_quant,
    "npu_convert_weight_to_int4pack": _int4_pack,
    "npu_grouped_matmul": _grouped,
    "npu_dequant_swiglu_quant": _dequant_swiglu,
    "npu_moe_gating_top_k": _gating,
    "npu_moe_init_routing_v2": _init_routing,
    "npu_rotary_mul": _rotary,
    "npu_transpose_batchmatmul": _transposing,
    "npu_fused_infer_attention_score_v2": _attention,
    "npu_format_cast": _format,
}
# Shapes that come out, for operators that have no shape rule in the wheel.
OUTPUTS: dict[str, Callable[..., Any]] = {
    "npu_format_cast": lambda self, acl_format, **options: torch.empty_like(self, memory_format=torch.contiguous_format),
    "npu_convert_weight_to_int4pack": lambda weight, inner_k_tiles=0: weight.new_empty(
        *weight.shape[:-1], weight.shape[-1] // 8, dtype=I32
    ),
}
