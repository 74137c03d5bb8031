"""Attention over expanded keys and values: one run per sequence, or per slice of its queries, on slices of the tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dsv3_onnxruntime.emit import attention
from dsv3_onnxruntime.session import run

# Scores held at once: 64 MiB of float32.
MOST_SCORES = 1 << 24


def mla_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool = True,
    *,
    provider: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Reads cu_q and cu_k on the host. Rows past cu_q[S] are 0 and -inf."""
    q, heads = q.contiguous(), q.shape[1]
    o = q.new_zeros(q.shape[0], heads, v.shape[2])
    lse = q.new_full((heads, q.shape[0]), float("-inf"), dtype=torch.float32)
    queries, keys = cu_q.tolist(), cu_k.tolist()
    for first_q, last_q, first_k, last_k in zip(queries, queries[1:], keys, keys[1:], strict=False):
        if last_q <= first_q or last_k <= first_k:
            continue
        ks, vs = k[first_k:last_k].contiguous(), v[first_k:last_k].contiguous()
        shift = (last_k - first_k) - (last_q - first_q)
        hidden = causal and last_q - first_q > 1 and not bool(torch.isfinite(vs).all())
        most = 1 if hidden else max(1, MOST_SCORES // (heads * ks.shape[0]))
        for start, end in _slices(last_q - first_q, most):
            seen = min(end + shift, ks.shape[0]) if causal else ks.shape[0]
            if seen <= 0:
                continue
            rows = slice(first_q + start, first_q + end)
            part = lse.new_empty(heads, end - start)
            inputs = {"q": q[rows], "k": ks[:seen], "v": vs[:seen]}
            masked = causal and end - start > 1
            if masked:
                inputs["offset"] = torch.full((1,), start + shift, dtype=torch.int64, device=q.device)
            outputs = {"o": o[rows], "lse": part}
            run("mla_prefill", attention.prefill, inputs, outputs, provider, scale=scale, masked=masked)
            lse[:, rows] = part
    return o, lse


def _slices(length: int, most: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, most):
        yield start, min(start + most, length)
