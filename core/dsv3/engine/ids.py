"""Token ids as they come from outside."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dsv3.engine.options import is_integer
from dsv3.errors import UsageError


def as_ids(prompt: Any) -> list[int]:
    """Token ids as plain integers, from a sequence of integers or a one-dimensional integer tensor; UsageError otherwise."""
    if isinstance(prompt, Tensor):
        if prompt.is_floating_point() or prompt.dtype == torch.bool or prompt.numel() != (prompt.shape or (0,))[-1]:
            raise UsageError(f"a tensor of {prompt.dtype} {list(prompt.shape)} is no list of token ids")
        return [int(i) for i in prompt.flatten().tolist()]
    if isinstance(prompt, str | bytes) or not isinstance(prompt, Iterable):
        raise UsageError(f"{prompt!r} is no list of token ids")
    found = list(prompt)
    wrong = next((i for i in found if not is_integer(i)), None)
    if wrong is not None:
        raise UsageError(f"{wrong!r} is no token id; expected integers")
    return [int(i) for i in found]
