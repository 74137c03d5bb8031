"""The graph in shapes only: what every call site is called with, before anything is bound."""

from __future__ import annotations

from typing import Any

import torch

from dsv3.engine.cache import allocate_planes, meta_step
from dsv3.graph.config import ModelConfig
from dsv3.graph.transformer import Transformer
from dsv3.plugin import CacheSpec


def trace(graph: Transformer, c: ModelConfig, dtype: torch.dtype, spec: CacheSpec, tokens: int, sample: Any) -> None:
    """Run the graph on meta tensors once per path: expanded, absorbed, MTP, head and sampler."""
    caches = [
        allocate_planes(c, 1, spec.page_size, spec.kv_dtype, dtype, torch.device("meta"))
        for _ in range(c.num_hidden_layers + len(graph.mtp))
    ]
    for absorbed in (False, True):
        step = meta_step(tokens, absorbed)
        hidden, for_mtp = graph.forward(step, caches)
        for k in range(len(graph.mtp)):
            step = meta_step(tokens, absorbed, start=1)
            graph.mtp_forward(step, for_mtp, caches, k)
    logits = graph.logits(hidden, 0)
    index = torch.empty(tokens, dtype=torch.int64, device="meta")
    temperature = torch.empty(tokens, dtype=torch.float32, device="meta")
    sample[0](logits=logits, seeds=index, positions=index, temperature=temperature)
