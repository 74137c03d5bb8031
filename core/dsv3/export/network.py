"""The model's graph in standard operators: what `dsv3.graph` is over torch, for one sequence, latent cache in and out."""

from __future__ import annotations

from collections.abc import Mapping

from dsv3.export.builder import Graph, Value, work_dtype
from dsv3.export.emit.attention import attend
from dsv3.export.emit.linear import bmm, linear
from dsv3.export.emit.norm import add_rms_norm, rms_norm
from dsv3.export.emit.rope import apply_rope
from dsv3.export.network_moe import mlp, moe
from dsv3.graph.config import ModelConfig
from dsv3.graph.mla import LATENT_EPS
from dsv3.graph.yarn import softmax_scale


class Network:
    """weights: by their names in the weight tree. absorbed: attend over the latents themselves, and gather the experts of
    each token, for few tokens; else over expanded keys, and expert by expert, for many."""

    def __init__(self, g: Graph, c: ModelConfig, weights: Mapping[str, Value], absorbed: bool) -> None:
        self.g, self.c, self.w, self.absorbed = g, c, weights, absorbed

    def __call__(self, ids: Value, cache_ckv: Value, cache_kpe: Value) -> tuple[Value, Value, Value]:
        """ids int64 [T], cache_ckv [L, past, R], cache_kpe [L, past, P] -> logits [T, V], and the caches with T more rows."""
        g, c, w = self.g, self.c, self.w
        past, keys = g.size(cache_ckv, 1), g.size(cache_ckv, 1) + g.size(ids, 0)
        self.cos_sin = w["cos_sin"]
        self.positions = g.op("Range", g.scalar(past), g.scalar(keys), g.const(1, "int64"))
        self.visible = g.unsqueeze(g.arange(keys), 0) <= g.unsqueeze(self.positions, 1)
        residual, x = g.gather(w["embed"], ids), None
        ckv, kpe = [], []
        for i in range(c.num_hidden_layers):
            layer = f"layers.{i}"
            if x is None:
                normed = rms_norm(g, residual, w[f"{layer}.input_norm"], c.rms_norm_eps)
            else:
                normed, residual = add_rms_norm(g, x, residual, w[f"{layer}.input_norm"], c.rms_norm_eps)
            before = (g.gather(plane, g.const(i, "int64")) for plane in (cache_ckv, cache_kpe))
            a, latents, rotated = self._attention(normed, f"{layer}.attn", *before)
            normed, residual = add_rms_norm(g, a, residual, w[f"{layer}.post_norm"], c.rms_norm_eps)
            x = self._feed_forward(normed, i)
            ckv.append(g.unsqueeze(latents, 0))
            kpe.append(g.unsqueeze(rotated, 0))
        assert x is not None
        hidden, _ = add_rms_norm(g, x, residual, w["norm"], c.rms_norm_eps)
        return g.work(linear(g, hidden, w["head"])), g.concat(ckv, 0), g.concat(kpe, 0)

    def _feed_forward(self, x: Value, layer: int) -> Value:
        where = f"layers.{layer}.mlp"
        if self.c.is_moe(layer):
            return moe(self.g, x, self.w, where, self.c, gather=self.absorbed)
        return mlp(self.g, x, self.w[f"{where}.w13"], self.w[f"{where}.w2"])

    def _attention(self, x: Value, where: str, ckv: Value, kpe: Value) -> tuple[Value, Value, Value]:
        """The layer's attention, and its latents and rotated keys, those of x included."""
        g, c, w = self.g, self.c, self.w
        q = x
        if c.q_lora_rank is not None:
            q = rms_norm(g, linear(g, x, w[f"{where}.q_a"]), w[f"{where}.q_a_norm"], LATENT_EPS)
        q = linear(g, q, w[f"{where}.q_b" if c.q_lora_rank is not None else f"{where}.q"])
        heads = g.reshape(q, -1, c.num_attention_heads, c.qk_head_dim)
        q_nope, q_pe = g.split(heads, 2, c.qk_nope_head_dim, c.qk_rope_head_dim)
        latent, key = g.split(linear(g, x, w[f"{where}.kv_a"]), 1, c.kv_lora_rank, c.qk_rope_head_dim)
        latent = rms_norm(g, latent, w[f"{where}.kv_a_norm"], LATENT_EPS)
        q_pe, key = (apply_rope(g, v, self.positions, self.cos_sin) for v in (q_pe, g.unsqueeze(key, 1)))
        ckv, kpe = g.concat([ckv, latent], 0), g.concat([kpe, g.squeeze(key, 1)], 0)
        attention = self._over_latents if self.absorbed else self._over_keys
        o = attention(q_nope, q_pe, ckv, kpe, w[f"{where}.kv_b"])
        flat = g.reshape(o, -1, c.num_attention_heads * c.v_head_dim)
        return linear(g, flat, w[f"{where}.o"]), ckv, kpe

    def _scores(self, q: Value, k: Value, q_pe: Value, kpe: Value) -> Value:
        """q [T, Nh, D] and k [D, Tk] or [Nh, D, Tk], and the rotated parts -> [Nh, T, Tk], scaled."""
        g, work = self.g, work_dtype(q.dtype)
        plain = g.matmul(g.transpose(q.to(work), 1, 0, 2), k)
        rotated = g.matmul(g.transpose(q_pe.to(work), 1, 0, 2), g.transpose(kpe.to(work), 1, 0))
        return (plain + rotated) * softmax_scale(self.c)

    def _over_keys(self, q: Value, q_pe: Value, ckv: Value, kpe: Value, kv_b: Value) -> Value:
        """Naive: keys and values expanded from the latents (DeepSeek-V2 report, equations 9 to 19)."""
        g, c, work = self.g, self.c, work_dtype(q.dtype)
        expanded = g.reshape(linear(g, ckv, kv_b), -1, c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim)
        k, v = g.split(expanded.to(work), 2, c.qk_nope_head_dim, c.v_head_dim)
        scores = self._scores(q, g.transpose(k, 1, 2, 0), q_pe, kpe)
        o, _ = attend(g, scores, self.visible, g.transpose(v, 1, 0, 2))
        return g.transpose(o, 1, 0, 2).to(q.dtype)

    def _over_latents(self, q: Value, q_pe: Value, ckv: Value, kpe: Value, kv_b: Value) -> Value:
        """Absorbed: the latent is key and value of all heads (DeepSeek-V2 report, appendix B)."""
        g, c, work = self.g, self.c, work_dtype(q.dtype)
        both = g.reshape(kv_b, c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank)
        w_uk, w_uv = g.split(both, 1, c.qk_nope_head_dim, c.v_head_dim)
        latents = ckv.to(work)
        scores = self._scores(bmm(g, q, w_uk), g.transpose(latents, 1, 0), q_pe, kpe)
        o, _ = attend(g, scores, self.visible, g.unsqueeze(latents, 0))
        return bmm(g, g.transpose(o, 1, 0, 2).to(q.dtype), g.transpose(w_uv, 0, 2, 1))
