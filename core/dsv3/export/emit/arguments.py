"""Weights and the latent cache as emitters receive them."""

from __future__ import annotations

from dataclasses import dataclass

from dsv3.export.builder import Value


@dataclass(frozen=True)
class Weight:
    """A canonical `Prepared`: its tensors as values. shape: logical, experts included."""

    quant: str
    shape: tuple[int, ...]
    weight: Value
    scale: Value | None = None
    scale_fmt: str = "float32"

    def scales(self) -> Value:
        """The scale of a quantised weight."""
        if self.scale is None:
            raise AssertionError(f"a weight of scheme {self.quant!r} has a scale")
        return self.scale


@dataclass
class Cache:
    """A `LatentCache`. A write replaces the planes by new values: what the model returns."""

    ckv: Value
    kpe: Value
    scale: Value | None
    page_size: int
    rank: int
    rope: int
