"""Arguments on the device, inside guard bands: what is written outside an argument shows, and so does what is read there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv3.budget.tensors import map_tensors
from dsv3.plugin import LatentCache, Prepared

_GUARD = 1024  # bytes on either side


def _fill(buffer: Tensor) -> None:
    """NaN where the format has it; a small number in index tensors, so that reading it is wrong but not fatal."""
    if buffer.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        buffer.view(torch.uint8).fill_(0x7F)
    elif buffer.dtype in (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz):
        buffer.view(torch.uint8).fill_(0x80)
    elif buffer.is_floating_point():
        buffer.fill_(float("nan"))
    else:
        buffer.fill_(1)


def _bytes(buffer: Tensor) -> Tensor:
    return buffer.view(torch.uint8)


@dataclass
class _Guarded:
    path: str
    buffer: Tensor
    view: Tensor
    mutable: bool
    before: Tensor = field(init=False)

    def snapshot(self) -> None:
        self.before = _bytes(self.buffer).clone()

    def changed(self) -> bool:
        """Whether anything changed that must not: everything, or for what the operator writes, all around it."""
        now = _bytes(self.buffer)
        if not self.mutable:
            return not torch.equal(now, self.before)
        kept = self.before.clone()
        self._blank(kept)
        seen = now.clone()
        self._blank(seen)
        return not torch.equal(seen, kept)

    def _blank(self, raw: Tensor) -> None:
        size = self.buffer.element_size()
        inside = torch.zeros(self.buffer.shape[0], dtype=torch.bool, device=self.buffer.device)
        inside.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).fill_(True)
        raw.view(-1, size)[inside] = 0


class Placed:
    """The arguments of a call on a device. `given` is what the kernel gets."""

    def __init__(self, arguments: Mapping[str, Any], device: torch.device, mutates: tuple[str, ...]) -> None:
        self.device = device
        self.guards: list[_Guarded] = []
        self.given: dict[str, Any] = {}
        for name, value in arguments.items():
            self.given[name] = self._place(name, value, name in mutates)
        self.snapshot()

    def _place(self, path: str, value: Any, mutable: bool) -> Any:
        if isinstance(value, Mapping):
            return {k: self._place(f"{path}.{k}", v, mutable) for k, v in value.items()}
        if isinstance(value, Prepared):
            names = iter(value.tensors)
            return map_tensors(value, lambda t: self._guard(f"{path}.{next(names)}", t, mutable))
        if isinstance(value, LatentCache):
            planes = iter(("ckv", "kpe", "scale"))
            return map_tensors(value, lambda t: self._guard(f"{path}.{next(planes)}", t, mutable))
        return self._guard(path, value, mutable) if isinstance(value, Tensor) else value

    def _guard(self, path: str, tensor: Tensor, mutable: bool) -> Tensor:
        pad = _GUARD // tensor.element_size()
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
        buffer = torch.empty(span + 2 * pad, dtype=tensor.dtype, device=self.device)
        _fill(buffer)
        view = buffer.as_strided(tensor.shape, tensor.stride(), pad)
        if tensor.numel():
            view.copy_(tensor)
        self.guards.append(_Guarded(path, buffer, view, mutable))
        return view

    def snapshot(self) -> None:
        """Remember all bytes."""
        for guard in self.guards:
            guard.snapshot()

    def disturbed(self) -> str:
        """The first argument that changed though it must not, or around which something did; "" if none."""
        for guard in self.guards:
            if guard.changed():
                where = "memory around" if guard.mutable else "input"
                return f"{where} {guard.path} was changed by the call"
        return ""

    def overwrite(self, arguments: Mapping[str, Any], skip: tuple[str, ...]) -> None:
        """Other values in the same memory, but for the arguments named in `skip`."""
        values: dict[str, Tensor] = {}

        def note(path: str, value: Any) -> None:
            if isinstance(value, Mapping):
                for k, v in value.items():
                    note(f"{path}.{k}", v)
            elif isinstance(value, Prepared):
                for k, v in value.tensors.items():
                    values[f"{path}.{k}"] = v
            elif isinstance(value, LatentCache):
                for k in ("ckv", "kpe", "scale"):
                    if getattr(value, k) is not None:
                        values[f"{path}.{k}"] = getattr(value, k)
            elif isinstance(value, Tensor):
                values[path] = value

        for name, value in arguments.items():
            if name not in skip:
                note(name, value)
        for guard in self.guards:
            if guard.path in values and guard.view.numel():
                guard.view.copy_(values[guard.path])
        self.snapshot()

    def owns(self, tensor: Tensor) -> str:
        """The argument whose memory a tensor lies in, or ""."""
        if tensor.numel() == 0:
            return ""
        for guard in self.guards:
            start = guard.buffer.data_ptr()
            if start <= tensor.data_ptr() < start + guard.buffer.numel() * guard.buffer.element_size():
                return guard.path
        return ""
