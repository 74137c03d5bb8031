"""Kernels for providers other than the CPU's: `rms_norm__cuda` is `rms_norm` of `kernels` in a session of that provider."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def __getattr__(name: str) -> Callable[..., Any]:
    from dsv3_onnxruntime import kernels
    from dsv3_onnxruntime.providers import PROVIDERS

    op, _, provider = name.partition("__")
    if op not in kernels.__all__ or provider not in PROVIDERS:
        raise AttributeError(f"{__name__} has no kernel {name!r}")
    return functools.partial(getattr(kernels, op), provider=provider)
