"""`DSV3_CHECK=1`: every call of every bound kernel compared with its reference, in float64 on the CPU.

Chosen when kernels are bound: a kernel is then bound inside a wrapper, and without the check there is nothing of it. The first
divergence is printed; all are counted. A kernel that takes a composite whole is compared with the composite.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsv3.dispatch.canonical import PerWeight, unprepared
from dsv3.dispatch.failure import shapes_of
from dsv3.dispatch.guard import root_cause
from dsv3.ops import OpSpec, spec
from dsv3.plugin import LatentCache, Prepared

if TYPE_CHECKING:
    from dsv3.dispatch.select import Candidate


@dataclass(frozen=True)
class Divergence:
    """A call whose outcome is not what the operator's specification says. details: as in `Verdict.details`, where the numbers
    are wrong; empty where the outcome is not of the right form."""

    op: str
    kernel: str
    site: str
    shapes: str
    problem: str
    margin: float = float("inf")
    details: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"dsv3: check: first divergence: {self.op} at {self.site}, kernel {self.kernel}",
            f"  call      {self.shapes}",
            f"  problem   {self.problem}",
        ]
        if self.details:
            d = self.details
            lines.append(f"  where     output {d.get('output')}, index {d.get('index')}")
            lines.append(f"  values    expected {d.get('expected')}, found {d.get('found')}")
            lines.append(f"  error     max err {d.get('error')}, budget {d.get('budget')} (margin {self.margin:.3g})")
        backend = self.kernel.partition(".")[0]
        other = "--backend reference" if spec(self.op).decompose else f"--kernel {self.op}=reference.torch"
        lines.append(f"  to do     prove the kernel with: dsv3 conformance --backend {backend} --ops {self.op}")
        lines.append(f"            run without it with: {other} (`dsv3 explain {self.op}` lists the kernels)")
        return "\n".join(lines)


@dataclass
class CheckReport:
    """What a checked model has counted so far: calls and divergent calls by (operator, kernel), and the first divergence."""

    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    divergences: Counter[tuple[str, str]] = field(default_factory=Counter)
    first: Divergence | None = None
    worst_margin: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not self.divergences

    def __str__(self) -> str:
        total, wrong = self.calls.total(), self.divergences.total()
        lines = [f"{total} calls compared with the reference, {wrong} diverged"]
        lines += [
            f"  {kernel} of {op}: {count} of {self.calls[op, kernel]} calls diverged"
            for (op, kernel), count in sorted(self.divergences.items())
        ]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """{"calls", "divergences", "kernels": [{"op", "kernel", "calls", "divergences", "worst_margin"}], "first"}."""
        kernels = [
            {"op": op, "kernel": kernel, "calls": n, "divergences": self.divergences[op, kernel],
             "worst_margin": self.worst_margin.get((op, kernel))}
            for (op, kernel), n in sorted(self.calls.items())
        ]  # fmt: skip
        first = vars(self.first) if self.first else None
        return {
            "calls": self.calls.total(), "divergences": self.divergences.total(), "kernels": kernels, "first": first,
        }  # fmt: skip


class Checker:
    """Wraps kernels as they are bound."""

    def __init__(self) -> None:
        self.report = CheckReport()
        self._canonical = PerWeight(_cpu_canonical)
        self._kept = PerWeight(lambda weight: {name: _copy(t) for name, t in weight.tensors.items()})

    def wrap(self, kernel: Candidate, site: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with every call compared. Keyword arguments are those of the operator, all of them."""

        def checked(**arguments: Any) -> Any:
            return self._call(kernel, site, function, arguments)

        return checked

    def _call(self, kernel: Candidate, site: str, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        known = spec(kernel.kernel.op)
        before = {name: self._before(value, kernel) for name, value in arguments.items()}
        originals = dict(_tensors(arguments))
        kept = self._snapshot(arguments)
        outputs = function(**arguments)
        key = (known.name, kernel.name)
        self.report.calls[key] += 1
        problems = _form(known, arguments, outputs, originals)
        problems += [
            f"input {path} was changed" for path, t in originals.items()
            if path.partition(".")[0] not in known.mutates and not _same_bytes(t, kept[path])
        ]  # fmt: skip
        margin: float = float("inf")
        details: dict[str, Any] = {}
        if not problems:
            problems, margin, details = self._judge(kernel, before, outputs, arguments)
            self.report.worst_margin[key] = max(margin, self.report.worst_margin.get(key, 0.0))
        if problems:
            self.report.divergences[key] += 1
            if self.report.first is None:
                text = "; ".join(problems)
                found = Divergence(known.name, kernel.name, site, shapes_of(known.name, arguments), text, margin, details)
                self.report.first = found
                print(found, file=sys.stderr, flush=True)
        return outputs

    def _judge(
        self, kernel: Candidate, before: Mapping[str, Any], outputs: Any, arguments: Mapping[str, Any]
    ) -> tuple[list[str], float, dict[str, Any]]:
        from dsv3.budget import judge

        op = kernel.kernel.op
        after = next((_cpu(arguments[name]) for name in spec(op).mutates), None)
        try:
            verdict = judge(op, before, _cpu(outputs), numerics=kernel.kernel.numerics, after=after)
        except Exception as error:
            return [f"the reference refuses these arguments: {root_cause(error)}"], float("inf"), {}
        return ([] if verdict.passed else [verdict.message]), verdict.margin, dict(verdict.details)

    def _before(self, value: Any, kernel: Candidate) -> Any:
        """An argument as it is before the call, on the CPU, weights canonical."""
        if isinstance(value, Prepared):
            return self._canonical.of(value, kernel.source.backend)
        if isinstance(value, Mapping):
            return {name: self._before(member, kernel) for name, member in value.items()}
        return _cpu(value)

    def _snapshot(self, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        """Copies of all input tensors; those of a weight are made once."""
        found: dict[str, Tensor] = {}
        for path, value in _members(arguments):
            if isinstance(value, Prepared):
                found |= {f"{path}.{name}": t for name, t in self._kept.of(value).items()}
            else:
                found |= {where: _copy(t) for where, t in _tensors({path: value})}
        return found


def _cpu_canonical(weight: Prepared, backend: Any) -> Prepared:
    plain = unprepared(weight, backend)
    tensors = {name: _copy(t) for name, t in plain.tensors.items()}
    return Prepared(plain.layout, plain.quant, plain.shape, tensors, plain.scale_fmt)


def _cpu(value: Any) -> Any:
    """A copy on the CPU that shares nothing with the original."""
    if isinstance(value, Tensor):
        return _copy(value)
    if isinstance(value, LatentCache):
        return LatentCache(_copy(value.ckv), _copy(value.kpe), None if value.scale is None else _copy(value.scale))
    if isinstance(value, tuple | list):
        return type(value)(_cpu(v) for v in value)
    return value


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _members(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(path, argument), those inside mappings one by one."""
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{member}", v) for member, v in value.items())
        else:
            yield name, value


def _tensors(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of all tensors among the arguments, inside weights and caches too."""
    for path, value in _members(arguments):
        if isinstance(value, Tensor):
            yield path, value
        elif isinstance(value, Prepared):
            yield from ((f"{path}.{name}", t) for name, t in value.tensors.items())
        elif isinstance(value, LatentCache):
            planes = {"ckv": value.ckv, "kpe": value.kpe, "scale": value.scale}
            yield from ((f"{path}.{name}", t) for name, t in planes.items() if t is not None)


def _same_bytes(now: Tensor, kept: Tensor) -> bool:
    found = now.detach().to("cpu").contiguous().view(-1)
    return torch.equal(found.view(torch.uint8), kept.contiguous().view(-1).view(torch.uint8))


def _form(known: OpSpec, arguments: Mapping[str, Any], outputs: Any, inputs: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with the form of the outputs: number, type, shape, dtype, device, storage, NaN from nowhere."""
    meta = known.meta(arguments)
    wanted = [] if meta is None else list(meta) if isinstance(meta, tuple) else [meta]
    found = [] if outputs is None else list(outputs) if isinstance(outputs, tuple | list) else [outputs]
    if len(found) != len(wanted):
        return [f"it returned {len(found)} outputs; expected {len(wanted)}"]
    problems = []
    device = next((t.device for t in inputs.values()), None)
    clean = not any(_has_nan(t) for path, t in inputs.items() if not path.startswith("cache."))
    owners = {t.untyped_storage().data_ptr(): path for path, t in inputs.items() if t.numel()}
    for n, (one, want) in enumerate(zip(found, wanted, strict=True)):
        name = known.line.outputs[n].path
        if not isinstance(one, Tensor):
            problems.append(f"output {name} is {type(one).__name__}; expected a tensor")
            continue
        for what, is_, should in (
            ("shape", list(one.shape), list(want.shape)), ("dtype", one.dtype, want.dtype), ("device", one.device, device),
        ):  # fmt: skip
            if is_ != should:
                problems.append(f"output {name} has {what} {is_}; expected {should}")
        if one.numel() and known.name != "all_reduce" and (owner := owners.get(one.untyped_storage().data_ptr())):
            problems.append(f"output {name} shares its storage with input {owner}")
        if clean and _has_nan(one):
            problems.append(f"output {name} has NaN; no input has any")
    return problems


def _has_nan(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return False
    wide = tensor if tensor.dtype.itemsize > 1 else tensor.to(torch.float32)
    return bool(torch.isnan(wide).any())
