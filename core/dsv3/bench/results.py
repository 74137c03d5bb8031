"""What a benchmark finds. All of it goes to JSON as it stands here; that is the schema."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from dsv3 import __version__
from dsv3.bench.ceiling import Ceilings
from dsv3.engine.model import Model
from dsv3.graph.config import ModelConfig

KIND, SCHEMA = "dsv3 bench", 1
Better = Literal["more", "less", ""]
Bound = Literal["read", "matmul", ""]
_UNREST = 1.2  # a ratio of ceilings above which a run is worth little
_FORMATS = ("quant_method", "scale_fmt", "quant_activations", "torch_dtype")


@dataclass(frozen=True)
class Figure:
    """One number. low, high: quartiles of what was measured repeatedly. better: which way is good; "" for a fact. bound: the
    ceiling that it moves with, by which a comparison of two runs divides it."""

    name: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    better: Better = ""
    bound: Bound = ""


@dataclass(frozen=True)
class Point:
    """A dot of the roofline: FLOP per byte, GFLOP per second. kind: "workload" or "operator"."""

    label: str
    intensity: float
    gflop_s: float
    kind: str


@dataclass(frozen=True)
class Subject:
    """What was measured. shape: a digest of the model's sizes, the same for all number formats of it."""

    model: str
    shape: str
    placement: str
    backend: str
    device: str
    dtype: str
    quant: str
    kv_dtype: str
    threads: int
    batch: int
    context: int
    tokens: int
    repeats: int


@dataclass
class Result:
    """what: "decode", "prefill", "load" or "ops". best: the larger of each ceiling, by which fractions are taken. rows: a table
    of its own, of operators for instance."""

    what: str
    subject: Subject
    before: Ceilings
    after: Ceilings
    figures: list[Figure]
    points: list[Point] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def best(self) -> Ceilings:
        return self.before.best(self.after)

    def to_json(self) -> dict[str, Any]:
        ceilings = {"before": self.before, "after": self.after, "best": self.best}
        return {
            "kind": KIND, "schema": SCHEMA, "what": self.what, "subject": asdict(self.subject),
            "ceilings": {name: c.to_json() for name, c in ceilings.items()},
            "figures": [asdict(f) for f in self.figures], "points": [asdict(p) for p in self.points], "rows": self.rows,
            "notes": self.notes, "version": __version__, "torch": torch.__version__, "python": platform.python_version(),
            "machine": platform.machine(), "cores": os.cpu_count(),
        }  # fmt: skip


def unrest(before: Ceilings, after: Ceilings) -> list[str]:
    """A note where the machine itself was not the same before and after."""
    pairs = [("reading", before.read_gb_s, after.read_gb_s), ("products", before.gflop_s, after.gflop_s)]
    changed = [f"{what} {a:.1f} before, {b:.1f} after" for what, a, b in pairs if max(a, b) > _UNREST * min(a, b)]
    return [f"the machine was not quiet ({'; '.join(changed)}): measure again"] if changed else []


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; of a single value all three are it."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def measured(name: str, values: Sequence[float], unit: str, better: Better = "more", bound: Bound = "") -> Figure:
    """A figure from repeats."""
    low, middle, high = quartiles(values)
    return Figure(name, middle, unit, low, high, better, bound)


def shape_of(c: ModelConfig) -> str:
    """A digest of a configuration without what number formats add."""
    plain = {k: v for k, v in asdict(c).items() if k not in _FORMATS}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def subject_of(model: Model, batch: int, context: int, tokens: int, repeats: int) -> Subject:
    """From a loaded model."""
    p = model.placement()
    return Subject(
        model=p.model, shape=shape_of(model.config), placement=p.summary, backend=p.backend, device=str(p.device),
        dtype=p.dtype, quant=p.quant, kv_dtype=p.kv_dtype, threads=torch.get_num_threads(), batch=batch, context=context,
        tokens=tokens, repeats=repeats,
    )  # fmt: skip


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)
