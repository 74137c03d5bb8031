"""What a kernel's failure means, and the words for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from dsv3.dispatch.guard import root_cause
from dsv3.errors import KernelFailed
from dsv3.ops import spec
from dsv3.plugin import LatentCache, Prepared

if TYPE_CHECKING:
    from dsv3.dispatch.decision import Decision

# What drivers and torch write when a device has stopped, or has no memory left; lower case.
_DEVICE_WORDS = (
    "cuda error", "hip error", "npu error", "xpu error", "device-side assert", "illegal memory access", "out of memory",
    "cublas_status", "cudnn_status", "hipblas_status", "device lost",
)  # fmt: skip
_DEVICE_TYPES: tuple[type[BaseException], ...] = tuple(
    kind for name in ("OutOfMemoryError", "AcceleratorError") if isinstance(kind := getattr(torch, name, None), type)
)


def is_device_error(error: BaseException) -> bool:
    """Whether the error, or one that caused it, says that the device has failed or is full: its state is then unknown."""
    return any(
        isinstance(e, (MemoryError, *_DEVICE_TYPES)) or any(word in str(e).lower() for word in _DEVICE_WORDS)
        for e in _chain(error)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__


def same_error(a: BaseException, b: BaseException) -> bool:
    """Whether two implementations refuse in the same words: then the input is at fault, and neither of them."""
    return type(a) is type(b) and str(a) == str(b)


def shapes_of(op: str, arguments: Mapping[str, Any]) -> str:
    """The arguments of a call in words: `x [5, 256] float32, w [64, 256] fp8-w8a16`."""
    words = []
    for term in spec(op).terms:
        value = term.find(arguments)
        if isinstance(value, torch.Tensor):
            words.append(f"{term.path} {list(value.shape)} {str(value.dtype).removeprefix('torch.')}")
        elif isinstance(value, Prepared):
            layout = "" if value.layout == "canonical" else f" as {value.layout!r}"
            words.append(f"{term.path} {list(value.shape)} {value.quant}{layout}")
        elif isinstance(value, LatentCache):
            words.append(f"{term.path} {list(value.ckv.shape)} {str(value.ckv.dtype).removeprefix('torch.')}")
    return ", ".join(words)


def failed(error: BaseException, decision: Decision, site: str, shapes: str, remedy: str) -> KernelFailed:
    """The error for a kernel that raised: the root cause first, then what was selected, then what to do."""
    selection = {
        "kernel": decision.name,
        "op": decision.op,
        "site": site,
        "shapes": shapes,
        "why": decision.why,
        "rejected": [{"kernel": kernel, "reason": reason} for kernel, reason in decision.rejected],
    }
    what = f"kernel {decision.name} of {decision.op} at {site}" + (f", {shapes}" if shapes else "")
    return KernelFailed(f"{root_cause(error)} ({what}; selected: {decision.why}). {remedy}", selection)


def remedy_for(decision: Decision, error: BaseException, strict: bool) -> str | None:
    """Why no other kernel may take over, and what to do; None if one may."""
    another = f"--kernel {decision.op}=BACKEND.KERNEL"
    listed = f"`dsv3 explain {decision.op}` lists the kernels"
    if is_device_error(error):
        return f"A device error: nothing else is tried. Start again, with fewer tokens, another device, or {another}"
    if mutated := spec(decision.op).mutates:
        half = f"It changes {', '.join(mutated)}, which may be half written, so no other takes over"
        return f"{half}: choose one with {another}; {listed}"
    if decision.pinned:
        return f"It is pinned: take the pin away to let the next kernel take over, or pin another; {listed}"
    if strict:
        return f"With strict no other takes over: leave strict out, or choose one with {another}; {listed}"
    return None
