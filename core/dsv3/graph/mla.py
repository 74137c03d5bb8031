"""Multi-head latent attention: naive over expanded keys and values, absorbed over the latent cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv3.graph.config import ModelConfig
from dsv3.graph.step import Step
from dsv3.graph.weights import AttentionWeights
from dsv3.graph.yarn import softmax_scale
from dsv3.plugin import LatentCache

# The norms of the compressed queries and latents were trained with this, whatever rms_norm_eps says.
LATENT_EPS = 1e-6


class Attention:
    """One layer's attention. Shapes come from the weights: a rank that holds some of the heads runs the same code."""

    def __init__(self, c: ModelConfig, w: AttentionWeights, sites: Any, where: str) -> None:
        self.w = w
        self.nope, self.value, self.scale = c.qk_nope_head_dim, c.v_head_dim, softmax_scale(c)
        self.q_a = sites("quant_linear", f"{where}.q_a_proj")
        self.q_a_norm = sites("rms_norm", f"{where}.q_a_layernorm")
        self.q_b = sites("quant_linear", f"{where}.q_b_proj")
        self.kv_a = sites("quant_linear", f"{where}.kv_a_proj_with_mqa")
        self.kv_a_norm = sites("rms_norm", f"{where}.kv_a_layernorm")
        self.rope_write = sites("rope_cache_write", where)
        self.gather = sites("kv_cache_gather", where)
        self.kv_b = sites("quant_linear", f"{where}.kv_b_proj")
        self.prefill = sites("mla_prefill", where)
        self.prolog = sites("mla_prolog", where)
        self.decode = sites("mla_decode", where)
        self.up_v = sites("bmm", f"{where}.kv_b_proj")
        self.o = sites("quant_linear", f"{where}.o_proj")

    def __call__(self, x: Tensor, step: Step, cache: LatentCache, cos_sin: Tensor) -> Tensor:
        if step.parts:
            rows = x.split([part.ids.shape[0] for part in step.parts])
            o = torch.cat([self._attend(r, part, cache, cos_sin) for r, part in zip(rows, step.parts, strict=True)])
        else:
            o = self._attend(x, step, cache, cos_sin)
        return self.o[step.bucket](x=o.flatten(1), w=self.w.o)

    def _attend(self, x: Tensor, step: Step, cache: LatentCache, cos_sin: Tensor) -> Tensor:
        return (self._absorbed if step.absorbed else self._naive)(x, step, cache, cos_sin)

    def _naive(self, x: Tensor, step: Step, cache: LatentCache, cos_sin: Tensor) -> Tensor:
        b, w, rank = step.bucket, self.w, self.w.w_uk.shape[2]
        heads = w.w_uk.shape[0]
        if w.q_a is not None:
            q_a = self.q_a[b](x=x, w=w.q_a)
            q = self.q_b[b](x=self.q_a_norm[b](x=q_a, weight=w.q_a_norm, eps=LATENT_EPS), w=w.q_b)
        else:
            q = self.q_b[b](x=x, w=w.q)
        q = q.view(x.shape[0], heads, -1)
        kv = self.kv_a[b](x=x, w=w.kv_a)
        q_pe = self.rope_write[b](
            q_pe=q[..., self.nope :],
            kpe=kv[:, rank:],
            ckv=self.kv_a_norm[b](x=kv[:, :rank], weight=w.kv_a_norm, eps=LATENT_EPS),
            positions=step.positions,
            cos_sin=cos_sin,
            slots=step.slots,
            cache=cache,
            interleaved=True,
        )
        # Keys are read back from the cache, this step's among them: an FP8 cache must round them the same way every time.
        ckv, kpe = self.gather[b](
            cache=cache, block_table=step.block_table, seq_lens=step.seq_lens, total=step.total_k, start=step.start
        )
        kv_b = self.kv_b[step.bucket_k](x=ckv.to(x.dtype), w=w.kv_b).view(ckv.shape[0], heads, -1)
        q[..., self.nope :] = q_pe
        k = q.new_empty(ckv.shape[0], heads, q.shape[2])
        k[..., : self.nope] = kv_b[..., : self.nope]
        k[..., self.nope :] = kpe[:, None, :]
        o, _ = self.prefill[b](
            q=q,
            k=k,
            v=kv_b[..., self.nope :],
            cu_q=step.cu_q,
            cu_k=step.cu_k,
            max_q=step.max_q,
            max_k=step.max_k,
            scale=self.scale,
            causal=True,
        )
        return o

    def _absorbed(self, x: Tensor, step: Step, cache: LatentCache, cos_sin: Tensor) -> Tensor:
        b, w = step.bucket, self.w
        q_c, q_pe = self.prolog[b](
            x=x,
            weights=self._prolog_weights(),
            positions=step.positions,
            cos_sin=cos_sin,
            slots=step.slots,
            cache=cache,
            eps=LATENT_EPS,
            n_heads=w.w_uk.shape[0],
        )
        o, _ = self.decode[b](
            q_c=q_c,
            q_pe=q_pe,
            cache=cache,
            block_table=step.block_table,
            seq_lens=step.seq_lens,
            cu_q=step.cu_q,
            max_q=step.max_q,
            max_k=step.max_k,
            scale=self.scale,
            start=step.start,
        )
        return self.up_v[b](x=o, weight=w.w_uv)

    def _prolog_weights(self) -> dict[str, Any]:
        w = self.w
        shared = {"kv_a": w.kv_a, "kv_a_norm": w.kv_a_norm, "w_uk": w.w_uk}
        if w.q_a is None:
            return {"q": w.q, **shared}
        return {"q_a": w.q_a, "q_a_norm": w.q_a_norm, "q_b": w.q_b, **shared}
