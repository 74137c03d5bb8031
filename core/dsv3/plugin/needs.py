"""Predicates a kernel states about the calls it takes. Each answers with a reason, never a bare no."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from dsv3.plugin.device import Capability
from dsv3.plugin.kernel import Call


class Need(Protocol):
    def refuse(self, call: Call, capability: Capability) -> str | None:
        """None if the need is met, else the reason."""


def _words(values: Iterable[str]) -> str:
    return " or ".join(values) or "nothing"


class _Choice:
    """A need that is met by one of several words."""

    allowed: tuple[str, ...]

    def __init__(self, *allowed: str) -> None:
        self.allowed = allowed

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.allowed))})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.allowed == other.allowed

    def __hash__(self) -> int:
        return hash((type(self).__name__, self.allowed))


class Feature(_Choice):
    """The device has all the named features."""

    def refuse(self, call: Call, capability: Capability) -> str | None:
        missing = [f for f in self.allowed if f not in capability.features]
        return f"needs feature {', '.join(missing)}; {call.device} does not have it" if missing else None


class Arch(_Choice):
    """The device's architecture is exactly one of these."""

    def refuse(self, call: Call, capability: Capability) -> str | None:
        if call.device.arch in self.allowed:
            return None
        return f"needs architecture {_words(self.allowed)}; the device is {call.device.arch}"


class Scheme(_Choice):
    """The weights are quantised in one of these schemes."""

    def refuse(self, call: Call, capability: Capability) -> str | None:
        if call.quant in self.allowed:
            return None
        return f"needs weights in {_words(self.allowed)}; they are {call.quant}"


class DType(_Choice):
    """The named argument has one of these dtypes. Several `DType` on one argument are alternatives."""

    def __init__(self, argument: str, *allowed: str) -> None:
        super().__init__(*allowed)
        self.argument = argument

    def __repr__(self) -> str:
        return f"DType({self.argument!r}, {', '.join(map(repr, self.allowed))})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DType) and (self.argument, self.allowed) == (other.argument, other.allowed)

    def __hash__(self) -> int:
        return hash((self.argument, self.allowed))

    def refuse(self, call: Call, capability: Capability) -> str | None:
        found = call.dtypes.get(self.argument)
        if found is None or found in self.allowed:  # an optional argument that is absent has any dtype
            return None
        return f"needs {self.argument} in {_words(self.allowed)}; it is {found}"


@dataclass(frozen=True)
class _Bound:
    dim: str
    value: int

    def refuse(self, call: Call, capability: Capability) -> str | None:
        size = call.dims.get(self.dim)
        if size is None:
            return f"needs {self._text()}; {self.dim} is not known when kernels are bound"
        return None if self._holds(size) else f"needs {self._text()}; {self.dim} is {size}"

    def _holds(self, size: int) -> bool:
        raise TypeError("use Divides, AtMost or AtLeast")

    def _text(self) -> str:
        raise TypeError("use Divides, AtMost or AtLeast")


class Divides(_Bound):
    """The dimension is a multiple of the value: Divides("K", 128) means K % 128 == 0."""

    def _holds(self, size: int) -> bool:
        return size % self.value == 0

    def _text(self) -> str:
        return f"{self.dim} a multiple of {self.value}"


class AtMost(_Bound):
    """The dimension is at most the value."""

    def _holds(self, size: int) -> bool:
        return size <= self.value

    def _text(self) -> str:
        return f"{self.dim} at most {self.value}"


class AtLeast(_Bound):
    """The dimension is at least the value."""

    def _holds(self, size: int) -> bool:
        return size >= self.value

    def _text(self) -> str:
        return f"{self.dim} at least {self.value}"


NEEDS = (Feature, Arch, Scheme, DType, Divides, AtMost, AtLeast)


def merge_alternatives(needs: Iterable[Need]) -> list[Need]:
    """The needs with several `DType` on one argument, several `Arch` and several `Scheme` each folded into one choice.

    A call has one dtype per argument, one architecture and one scheme, so two of them could never both hold.
    """
    choices: dict[tuple[type, str], list[str]] = {}
    others: list[Need] = []
    for need in needs:
        if isinstance(need, DType | Arch | Scheme):
            choices.setdefault((type(need), getattr(need, "argument", "")), []).extend(need.allowed)
        else:
            others.append(need)
    folded: list[Need] = [
        DType(argument, *allowed) if kind is DType else kind(*allowed) for (kind, argument), allowed in choices.items()
    ]
    return folded + others
