"""Faults of backends that keep weights in a layout of their own: transposed, one tensor per part."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv3 import conformance, ops
from dsv3.plugin import Device, Kernel, Prepared
from tests.support.faulty import Made

LAYOUTS = {"quant_linear": ("w",), "grouped_linear": ("w",), "fused_experts": ("w13", "w2")}


class Transposed(Made):
    """Weights with their last two axes exchanged; kernels turn them back and call the references."""

    def __init__(self, op: str = "quant_linear") -> None:
        def kernel(**a: Any) -> Tensor:
            weights = {name: self.read(a[name]) for name in LAYOUTS[op]}
            return ops.spec(op).reference(**{**a, **weights})  # type: ignore[no-any-return]

        super().__init__({op: kernel}, f"transposed{id(self)}")
        self.op = op

    def kernels(self, device: Device) -> Iterable[Kernel]:
        return [replace(k, layouts=dict.fromkeys(LAYOUTS[self.op], "kn")) for k in super().kernels(device)]

    def prepare(self, weight: Prepared, layout: str, device: Device) -> Prepared:
        return self.made(weight, self.turned(weight.tensors))

    def unprepare(self, weight: Prepared) -> Prepared:
        return replace(weight, layout="canonical", tensors=self.turned(weight.tensors))

    def read(self, weight: Prepared) -> Prepared:
        return Transposed.unprepare(self, weight)

    @staticmethod
    def made(weight: Prepared, tensors: dict[str, Tensor]) -> Prepared:
        return replace(weight, layout="kn", tensors=tensors)

    @staticmethod
    def turned(tensors: Any) -> dict[str, Tensor]:
        def turn(t: Tensor) -> Tensor:
            raw = t.view(torch.uint8) if t.element_size() == 1 else t
            return raw.transpose(-1, -2).contiguous().view(t.dtype)

        return {name: turn(t) for name, t in tensors.items()}


class KeptByShape(Transposed):
    """prepare() answers what it made for another weight of the same shape."""

    def prepare(self, weight: Prepared, layout: str, device: Device) -> Prepared:
        kept = self.__dict__.setdefault("kept", {})
        return kept.setdefault(
            (weight.shape, weight.quant, weight.scale_fmt, weight.tensors["weight"].dtype),
            super().prepare(weight, layout, device),
        )  # type: ignore[no-any-return]


class KeepsTheOriginal(Transposed):
    """unprepare() answers the weight that was given, so that what is lost on the way does not show there."""

    def prepare(self, weight: Prepared, layout: str, device: Device) -> Prepared:
        made = super().prepare(weight, layout, device)
        scale = {"scale": made.tensors["scale"].bfloat16().float()} if "scale" in made.tensors else {}
        lossy = replace(made, tensors={**made.tensors, **scale})
        self.__dict__.setdefault("kept", []).append((lossy, weight))
        return lossy

    def unprepare(self, weight: Prepared) -> Prepared:
        return next(w for made, w in self.kept if made is weight)  # type: ignore[attr-defined,no-any-return]


class LosesTheFormat(Transposed):
    """The format of the activations' scales is forgotten."""

    def prepare(self, weight: Prepared, layout: str, device: Device) -> Prepared:
        return replace(super().prepare(weight, layout, device), scale_fmt="float32")


class FirstExperts(Transposed):
    """Experts past the eighth are those of eight before."""

    def prepare(self, weight: Prepared, layout: str, device: Device) -> Prepared:
        made = super().prepare(weight, layout, device)
        if len(weight.shape) == 3 and weight.shape[0] > 8:
            rows = torch.arange(weight.shape[0]) % 8
            raw = {n: t.view(torch.uint8)[rows].view(t.dtype) for n, t in made.tensors.items()}
            return replace(made, tensors=raw)
        return made


class RaggedRows(Transposed):
    """The last rows are lost where N is no multiple of 16."""

    def prepare(self, weight: Prepared, layout: str, device: Device) -> Prepared:
        made = super().prepare(weight, layout, device)
        n = weight.shape[-2]
        if n % 16:
            made.tensors["weight"].view(torch.uint8)[..., n // 16 * 16 * (made.tensors["weight"].element_size()) :] = 0
        return made


class Mutates(Transposed):
    """prepare() clears the sign of zero in the weight it was given."""

    def prepare(self, weight: Prepared, layout: str, device: Device) -> Prepared:
        made = super().prepare(weight, layout, device)
        weight.tensors["weight"].view(torch.uint8)[..., -1] ^= 1
        return made


class Empties(Transposed):
    """The prepared weight is one buffer that the next preparation fills again."""

    def prepare(self, weight: Prepared, layout: str, device: Device) -> Prepared:
        made = super().prepare(weight, layout, device)
        raw = made.tensors["weight"].view(torch.uint8)
        space = self.__dict__.setdefault("space", torch.empty(1 << 24, dtype=torch.uint8))
        held = space[: raw.numel()].view(raw.shape)
        held.copy_(raw)
        return replace(made, tensors={**made.tensors, "weight": held.view(made.tensors["weight"].dtype)})


FAULTS: tuple[tuple[Callable[[str], Transposed], str], ...] = (
    (KeptByShape, "quant_linear"), (KeptByShape, "fused_experts"), (KeepsTheOriginal, "quant_linear"),
    (KeepsTheOriginal, "grouped_linear"), (LosesTheFormat, "quant_linear"), (LosesTheFormat, "fused_experts"),
    (FirstExperts, "fused_experts"), (FirstExperts, "grouped_linear"),
    (RaggedRows, "quant_linear"), (RaggedRows, "grouped_linear"), (Mutates, "fused_experts"), (Empties, "fused_experts"),
    (Empties, "quant_linear"),
)  # fmt: skip


@pytest.mark.parametrize("op", LAYOUTS)
def test_a_right_layout_passes(op: str) -> None:
    report = conformance.run(Transposed(op), ops=[op], size="quick")
    assert not report.failed, report.failed[0]


@pytest.mark.parametrize(("made", "op"), FAULTS, ids=lambda v: getattr(v, "__name__", v))
def test_a_wrong_layout_is_caught(made: Callable[[str], Transposed], op: str) -> None:
    report = conformance.run(made(op), ops=[op], size="small", fail_fast=True)
    assert report.failed, f"{op}: {made.__doc__}"
