"""Checks of what a backend registers: a mistake rejects the backend, with the nearest right word, before anything runs."""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable
from typing import Any

from dsv3.dispatch.guard import CALL_LIMIT_S, guarded, root_cause
from dsv3.dispatch.wellformed import kernel_mistake
from dsv3.errors import BackendUnavailable, UsageError, nearest
from dsv3.ops import names, spec
from dsv3.plugin import Backend, Device, Kernel
from dsv3.plugin.needs import NEEDS, DType, _Bound, _Choice

MOST_KERNELS = 10_000
_NUMERICS = ("exact", "f32", "tc14", "bf16-operand", "bf16-p")


class BadRegistration(BackendUnavailable):
    """A kernel that cannot be what its registration says: the backend is rejected, not only the kernel."""


def registered_kernels(backend: Backend, device: Device) -> list[Kernel]:
    """The backend's kernels for the device, each checked; BackendUnavailable names the first mistake."""
    outcome = guarded(lambda: list(itertools.islice(backend.kernels(device), MOST_KERNELS + 1)), CALL_LIMIT_S * 5)
    if outcome.error is not None:
        raise BadRegistration(f"{root_cause(outcome.error)} (listing the kernels of backend {backend.name!r})") from (
            outcome.error
        )
    kernels = outcome.value or []
    if len(kernels) > MOST_KERNELS:
        raise BadRegistration(f"bad registration in backend {backend.name!r}: more than {MOST_KERNELS} kernels")
    seen: set[tuple[str, str]] = set()
    for kernel in kernels:
        mistake = _mistake(kernel)
        if mistake is None and (kernel.op, kernel.name) in seen:
            mistake = "is registered twice"
        if mistake:
            where = f"{backend.name}.{getattr(kernel, 'name', kernel)!s}"
            raise BadRegistration(f"bad registration in backend {backend.name!r}: kernel {where} {mistake}")
        seen.add((kernel.op, kernel.name))
    return kernels


def _mistake(kernel: Kernel) -> str | None:
    if mistake := kernel_mistake(kernel):
        return mistake
    if kernel.op not in names():
        return f"implements unknown operator {kernel.op!r}{nearest(kernel.op, names())}"
    known = spec(kernel.op)
    if kernel.since > known.since:
        return f"was written to version {kernel.since} of {kernel.op}; this dsv3 has version {known.since}"
    for what, target in (("target", kernel.target), ("accepts", kernel.accepts)):
        if target is not None and not all(target.partition(":")):
            return f"has {what} {target!r}; expected 'module:function'"
    if kernel.numerics not in _NUMERICS:
        return f"has numerics {kernel.numerics!r}{nearest(kernel.numerics, _NUMERICS)}"
    for weight in kernel.layouts:
        if weight not in known.weights:
            return f"names a layout for {weight!r}, which is no Prepared argument{nearest(weight, known.weights)}"
    return next(filter(None, (_need_mistake(need, kernel) for need in kernel.needs)), None)


def _need_mistake(need: Any, kernel: Kernel) -> str | None:
    known = spec(kernel.op)
    if not isinstance(need, NEEDS):
        return f"has the need {need!r}, which is none of {', '.join(n.__name__ for n in NEEDS)}"
    if isinstance(need, _Bound) and need.dim not in known.dims:
        return f"needs dimension {need.dim!r}; {kernel.op} has {', '.join(known.dims)}"
    if isinstance(need, _Bound) and (not isinstance(need.value, int) or isinstance(need.value, bool) or need.value < 1):
        return f"has the need {need!r}, whose value is no positive integer"
    if isinstance(need, _Choice) and not all(isinstance(word, str) for word in need.allowed):
        return f"has the need {need!r}, whose alternatives are not all strings"
    arguments = [*(t.path for t in known.terms), *(p for p in ("dtype", "out_dtype") if p in known.parameters)]
    if isinstance(need, DType) and need.argument not in arguments:
        return f"needs a dtype of {need.argument!r}{nearest(need.argument, arguments)}"
    return None


def resolve(kernel: Kernel, backend: str) -> Callable[..., Any]:
    """Import a kernel's function and check that it takes the operator's arguments by keyword, and `config` if it has a
    table of them."""
    function = load_target(kernel.target, f"kernel {backend}.{kernel.name}")
    known = spec(kernel.op)
    extra = ("config",) if kernel.configs is not None else ()
    try:
        inspect.signature(function).bind(**dict.fromkeys((*known.parameters, *extra)))
    except TypeError as error:
        also = " and, because the kernel has configs, the keyword config" if extra else ""
        raise BadRegistration(
            f"bad registration in backend {backend!r}: {kernel.target} does not take the arguments of {kernel.op}"
            f" ({error}); expected {known.signature}{also}"
        ) from error
    except ValueError:  # a builtin without a signature: the first call will tell
        pass
    return function


def load_target(target: str, what: str) -> Callable[..., Any]:
    """The function behind "module:function"; BackendUnavailable with the root cause if there is none."""
    module, _, attribute = target.partition(":")
    outcome = guarded(lambda: getattr(importlib.import_module(module), attribute), CALL_LIMIT_S * 30)
    if outcome.error is not None:
        raise BadRegistration(f"{root_cause(outcome.error)} (target {target!r} of {what})") from outcome.error
    if not callable(outcome.value):
        raise BadRegistration(f"target {target!r} of {what} is not callable")
    return outcome.value


def unknown_operator(name: str) -> UsageError:
    """The error for an operator name that a user typed."""
    return UsageError(f"no operator is called {name!r}{nearest(name, names())}; `dsv3 explain` lists them")
