"""The graph in shapes only: what every call site is called with, before anything is bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dsv3.dispatch.choose import Source, cache_spec
from dsv3.dispatch.site import Site, Sites
from dsv3.engine.cache import allocate_planes, meta_step
from dsv3.graph.config import ModelConfig
from dsv3.graph.transformer import Transformer
from dsv3.graph.weights import ModelWeights, meta_weights
from dsv3.graph.yarn import cos_sin_table
from dsv3.plugin import CacheSpec, KvDType, Quant


@dataclass
class Traced:
    """The graph over meta weights, and in `sites` all calls it was seen to make; decode: (operator, site) of those of a decode
    step, from the tokens to the logits."""

    weights: ModelWeights
    sites: Sites
    graph: Transformer
    sample: Any
    spec: CacheSpec
    dtype: torch.dtype
    decode: frozenset[tuple[str, str]]


def traced(c: ModelConfig, source: Source, dtype: str, quant: Quant, kv_dtype: KvDType, mtp_quant: Quant, mtp: bool) -> Traced:
    """Build the graph for a source and number formats, and record its calls with 1 and with 2 tokens."""
    activations = getattr(torch, dtype)
    weights = meta_weights(c, activations, quant, cos_sin_table(c, "meta"), mtp, mtp_quant)
    sites = Sites()
    graph = Transformer(c, weights, sites)
    sample = sites("gumbel_argmax", "sampler")
    spec = cache_spec(source, kv_dtype)
    decode: set[Site] = set()
    for run in (0, 1):
        with sites.recording(run):
            decode = trace(graph, c, activations, spec, run + 1, sample, sites)
    return Traced(weights, sites, graph, sample, spec, activations, frozenset((site.op, site.where) for site in decode))


def trace(
    graph: Transformer, c: ModelConfig, dtype: torch.dtype, spec: CacheSpec, tokens: int, sample: Any, sites: Sites
) -> set[Site]:
    """Run the graph on meta tensors once per path: expanded, absorbed, MTP, head and sampler. Gives the sites of the absorbed
    path and the head."""
    layers = c.num_hidden_layers + len(graph.mtp)
    caches = [allocate_planes(c, 1, spec, dtype, torch.device("meta")) for _ in range(layers)]
    decode: set[Site] = set()
    for absorbed in (False, True):
        step = meta_step(tokens, absorbed)
        before = sites.calls()
        hidden, for_mtp = graph.forward(step, caches)
        decode = sites.called_since(before)
        for k in range(len(graph.mtp)):
            step = meta_step(tokens, absorbed, start=1)
            graph.mtp_forward(step, for_mtp, caches, k)
    before = sites.calls()
    logits = graph.logits(hidden, 0)
    decode |= sites.called_since(before)
    index = torch.empty(tokens, dtype=torch.int64, device="meta")
    temperature = torch.empty(tokens, dtype=torch.float32, device="meta")
    sample[0](logits=logits, seeds=index, positions=index, temperature=temperature)
    return decode
