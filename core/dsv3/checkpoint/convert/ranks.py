"""How the demo's layout spreads a model over ranks, and when it cannot."""

from __future__ import annotations

from collections.abc import Iterable

from dsv3.checkpoint.demo_layout import expert_index, shard_axis
from dsv3.checkpoint.stored import BLOCK
from dsv3.checkpoint.validate import Item
from dsv3.errors import UsageError
from dsv3.graph.config import ModelConfig


def part_of(name: str, shape: tuple[int, ...], rank: int, ranks: int) -> tuple[int, int, int] | None:
    """(axis, rank, ranks) of a tensor that is split; None for one that a rank has whole."""
    axis = shard_axis(name)
    return None if axis is None or ranks == 1 or axis >= len(shape) else (axis, rank, ranks)


def rank_of(name: str, experts: int, ranks: int) -> int | None:
    """The rank that has a routed expert, out of `experts`; None for what all have."""
    expert = expert_index(name)
    return None if expert is None else expert // (experts // ranks)


def check_split(c: ModelConfig, items: Iterable[Item], ranks: int) -> None:
    """UsageError with the reason, and the numbers of ranks that are possible, if the model does not split over `ranks`."""
    items = list(items)
    reason = _obstacle(c, items, ranks)
    if reason is not None:
        possible = [n for n in range(1, max(2, c.num_attention_heads) + 1) if _obstacle(c, items, n) is None]
        raise UsageError(f"--model-parallel {ranks}: {reason}; possible: {', '.join(map(str, possible))}")


def _obstacle(c: ModelConfig, items: Iterable[Item], ranks: int) -> str | None:
    if (c.n_routed_experts or 0) % ranks:
        return f"{c.n_routed_experts} routed experts do not divide by {ranks}"
    if c.num_attention_heads % ranks:
        return f"{c.num_attention_heads} attention heads do not divide by {ranks}"
    for item in items:
        name, shape = item.expected.name, item.expected.shape
        part = part_of(name, shape, 0, ranks)
        if part is None:
            continue
        size = shape[part[0]]
        if size % ranks:
            return f"{name} has {size} {'rows' if part[0] == 0 else 'columns'}, which do not divide by {ranks}"
        if item.stored == "fp8" and (size // ranks) % BLOCK:
            return (
                f"{name} would have {size // ranks} of {size} a rank, which cuts through a block of {BLOCK} with one FP8 scale"
            )
    return None
