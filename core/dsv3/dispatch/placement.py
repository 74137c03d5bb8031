"""Placement: every decision with every rejected candidate and its reason. The line at start, `dsv3 explain`, errors
and JSON all come from it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from dsv3.dispatch.decision import Binding, Decision
from dsv3.dispatch.select import Bucket, span_text
from dsv3.dispatch.selection import selection
from dsv3.ops import spec
from dsv3.plugin import Device

_NAMED = 4  # fallbacks named in the summary line; the table has all


@dataclass
class Placement:
    """Where a model runs and with which kernels. `str()` gives the summary line, then the table."""

    backend: str
    device: Device
    binding: Binding
    model: str = ""
    dtype: str = ""
    quant: str = ""
    kv_dtype: str = ""
    notes: list[str] = field(default_factory=list)

    def decisions(self, op: str | None = None, tokens: int | None = None) -> list[tuple[str, Bucket, Decision]]:
        """(call site, token bucket, decision), top level and inside decompositions; for one operator, for one step size."""
        index = None if tokens is None else self.binding.bucket(tokens)
        found = []
        for _, where, plan in self.binding.decisions:
            for i, top in enumerate(plan):
                if index is None or i == index:
                    found += [(where, self.binding.buckets[i], d) for d in top.walk() if op is None or d.op == op]
        return [entry for entry in found if not entry[2].cases]

    def operators(self) -> list[str]:
        """The operators that the model calls, in order of first use."""
        return list(dict.fromkeys(d.op for _, _, d in self.decisions()))

    def fallbacks(self) -> list[str]:
        """Operators that fell back to the reference although another backend was chosen."""
        return list(dict.fromkeys(d.op for _, _, d in self.decisions() if d.fallback))

    @property
    def summary(self) -> str:
        """One line: backend, device, number formats, and how many operators are native, composite, fallback."""
        kinds = Counter(self._kind(op) for op in self.operators())
        parts = [f"{kinds['native']} of {sum(kinds.values())} operators native"]
        if kinds["partly"]:
            parts.append(f"{kinds['partly']} partly")
        parts.append(f"{kinds['composite']} composite")
        if kinds["fallback"]:
            names = [op for op in self.operators() if self._kind(op) == "fallback"]
            more = ", .." if len(names) > _NAMED else ""
            parts.append(f"{kinds['fallback']} on the reference ({', '.join(names[:_NAMED])}{more})")
        if kinds["other"]:
            parts.append(f"{kinds['other']} torch's own")
        text = ", ".join(parts)
        formats = f"{self.dtype}, weights {self.quant or 'none'}, cache {self.kv_dtype}"
        return f"{self.model} on {self.backend}, {self.device}: {formats}; {text}"

    def _kind(self, op: str) -> str:
        found = [d for _, _, d in self.decisions(op)]
        native = any(d.kernel and d.kernel.source.name == self.backend for d in found)
        if any(d.fallback for d in found):
            return "partly" if native else "fallback"
        if native:
            return "native"
        return "composite" if any(d.parts for d in found) else "other"

    def __str__(self) -> str:
        rows = [("operator", "kernel", "tokens", "sites", "why")]
        for op in self.operators():
            rows += [(op, name, span_text(span), str(n), why) for (name, span, why), n in self._counted(op)]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows]
        return "\n".join([self.summary, *(f"note: {n}" for n in self.notes), "", *lines])

    def _counted(self, op: str) -> list[tuple[tuple[str, Bucket, str], int]]:
        """(kernel, tokens, why) and the number of call sites, in order of tokens; neighbouring buckets that are alike join."""
        counted = Counter((_chosen(d), span, _because(d)) for _, span, d in self.decisions(op))
        joined: list[tuple[tuple[str, Bucket, str], int]] = []
        for (name, span, why), n in sorted(counted.items(), key=lambda item: (item[0][0], item[0][2], item[1], item[0][1])):
            if joined:
                (before, (first, last), reason), count = joined[-1]
                if (before, reason, count) == (name, why, n) and last + 1 == span[0]:
                    joined[-1] = (name, (first, span[1]), why), n
                    continue
            joined.append(((name, span, why), n))
        return sorted(joined, key=lambda item: item[0][1])

    def to_json(self) -> dict[str, Any]:
        """{"backend", "device", "ops": {op: {"chosen", "why", "rejected": [{"kernel", "reason"}], "choices"}}}. chosen is
        "backend.kernel", or "composite.part+part". "quarantined": kernels that failed at their first call."""
        return {
            "backend": self.backend,
            "device": asdict(self.device),
            "model": self.model,
            "dtype": self.dtype,
            "quant": self.quant,
            "kv_dtype": self.kv_dtype,
            "summary": self.summary,
            "notes": self.notes,
            "quarantined": [asdict(q) for q in self.binding.quarantined],
            "buckets": [list(b) for b in self.binding.buckets],
            "ops": {op: self._op_json(op) for op in self.operators()},
        }

    def selection(self) -> dict[str, Any]:
        """What `load(selection=...)` in another process binds without selecting again; "sha256" tells whether two agree."""
        return selection(self)

    def explain(self, op: str, tokens: int | None = None) -> dict[str, Any]:
        """One operator: signature, every kernel offered for it, and the choices with chosen, rejected, sites and parts."""
        offered = [f"{name}.{k.name}" for name, kernels in self.binding.offered.items() for k in kernels.get(op, ())]
        return {"op": op, "signature": spec(op).signature, "offered": offered, "choices": self._choices(op, tokens)}

    def _choices(self, op: str, tokens: int | None = None) -> list[dict[str, Any]]:
        choices: dict[tuple[Any, ...], dict[str, Any]] = {}
        for where, span, d in self.decisions(op, tokens):
            key = (_chosen(d), span, d.why, d.rejected)
            fresh = {**_decision_json(d), "tokens": list(span), "span": span_text(span), "sites": []}
            choices.setdefault(key, fresh)["sites"].append(where)
        return list(choices.values())

    def _op_json(self, op: str) -> dict[str, Any]:
        return {**_decision_json(self.decisions(op)[0][2]), "choices": self._choices(op)}


def _decision_json(d: Decision) -> dict[str, Any]:
    rejected = [{"kernel": kernel, "reason": reason} for kernel, reason in d.rejected]
    found: dict[str, Any] = {"chosen": d.name, "why": d.why, "rejected": rejected}
    if d.kernel and d.kernel.config is not None:
        found["config"] = dict(d.kernel.config)
    if d.kernel and d.kernel.cost is not None:
        found["measured_us"] = d.kernel.cost.us
    if d.parts:
        found["parts"] = {op: inner.name for op, inner in d.parts.items()}
    return found


def _chosen(d: Decision) -> str:
    if d.kernel:
        return d.kernel.name
    return "by shape" if d.cases else f"parts({', '.join(d.parts)})"


def _because(d: Decision) -> str:
    """Why, and for what is not the backend's own kernel the first reason against those that are."""
    if (d.kernel is not None and not d.fallback) or not d.rejected:
        return d.why
    kernel, reason = d.rejected[0]
    return f"{d.why} ({kernel}{' ' if reason.startswith('offers') else ': '}{reason})"
