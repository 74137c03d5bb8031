"""The sum over the ranks that share a layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dsv3.ops.spec import primitive


@primitive("x[T,H] -> y[T,H]", portable=True)
def all_reduce(x: Tensor, group: Any) -> Tensor:
    """Sum of x over the ranks of a torch.distributed group; x itself where the group is None or has one rank.

    Invariants:
    - x itself is not changed where the group has several ranks
    """
    if group is None:
        return x
    import torch.distributed as dist

    if dist.get_world_size(group) == 1:
        return x
    y = x.clone()
    dist.all_reduce(y, group=group)
    return y
