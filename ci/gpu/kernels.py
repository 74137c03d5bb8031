"""Rows: every kernel of a backend at every call of the model, timed, with what torch offers beside it."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from ceilings import value
from peers import peers
from timing import Clock

from dsv3.bench.calls.shapes import Call, Maker, Model
from dsv3.bench.calls.table import all_calls
from dsv3.conformance.target import Target
from dsv3.dispatch.configs import text_of
from dsv3.dispatch.guard import root_cause
from dsv3.dispatch.registration import resolve
from dsv3.ops import names, spec
from dsv3.plugin import Kernel

Left = dict[str, str]


class Rows:
    """Measures rows until a deadline. rows, left_out: what is known so far, complete after every row."""

    def __init__(
        self, target: Target, clock: Clock, m: Model, encoding: str, found: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        page = target.source.backend.cache_spec(target.source.device, "bfloat16").page_size
        self.target, self.clock, self.m, self.found, self._say = target, clock, m, found, say
        self._maker = functools.partial(Maker, m, encoding=encoding, page=page)
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[Left] = []
        self._refused: Counter[tuple[str, str]] = Counter()

    def run(self, deadline: float, ops: list[str] | None = None) -> None:
        """All calls of all operators, or of `ops`; those that no time is left for are listed."""
        wanted = names() if ops is None else ops
        for op in wanted:
            if not self.target.kernels(op):
                self.left_out.append({"what": op, "why": f"backend {self.target.name} has no kernel for it"})
        lost = ""
        for call in all_calls(self.m):
            if call.op not in wanted or not self.target.kernels(call.op):
                continue
            why = lost or ("time" if time.monotonic() > deadline else "")
            if why:
                self.left_out.append({"what": call.name, "why": why})
                continue
            self._say(f"{call.name} ({deadline - time.monotonic():.0f} s left)")
            lost = self._call(call)
        for (kernel, why), count in self._refused.items():
            self.left_out.append({"what": f"{kernel}: {count} calls", "why": f"refused: {why}"})

    def _call(self, call: Call) -> str:
        """The rows of one call; why nothing further can run on the device, "" if it can."""
        shapes = call.arguments(self._maker("meta"))
        size = call.nbytes(shapes)
        takes = []
        for kernel in self.target.kernels(call.op):
            if why := self.target.refusal(kernel, shapes, ()):
                self._refused[f"{call.op} {kernel.name}", why] += 1
            else:
                takes.append(kernel)
        if not takes:
            return ""
        try:
            given = [call.arguments(self._maker(self.target.device, seed=i)) for i in range(self.clock.copies(size))]
        except Exception as error:  # noqa: BLE001  most likely memory
            self.left_out.append({"what": call.name, "why": f"its data: {root_cause(error)}"})
            return self._after()
        beside = [] if (lost := self._kernels(call, takes, given, size)) else self._peers(call, given)
        for row in self.rows[-len(takes) :]:
            row["peers"] = [{**p, "ratio": _over(p["us"], row["us"])} for p in beside]
        del given
        return lost or self._after()

    def _kernels(self, call: Call, takes: list[Kernel], given: list[dict[str, Any]], size: int) -> str:
        lost = ""
        for kernel in takes:
            table = self.target.catalogue.table(kernel)
            config = None if table is None else table.first(self.target.source.device.arch, spec(call.op).bind(given[0]))
            row = {
                "op": call.op, "variant": call.variant, "tokens": call.tokens, "kernel": kernel.name, "config": text_of(config),
                "dims": spec(call.op).bind(given[0]), "bytes": size, "flop": call.flop, "unit": call.unit,
                "cold": self.clock.cold(size), "us": None, "error": lost, "peers": [],
            }  # fmt: skip
            self.rows.append(row)
            if lost:
                continue
            try:
                function = resolve(kernel, self.target.name)
                more = {} if config is None else {"config": config}
                calls = [functools.partial(function, **self.target.prepare(kernel, a), **more) for a in given]
                row |= self.clock.time(calls).record()
                row |= self._shares(call, size, row["us"])
            except Exception as error:  # noqa: BLE001  a kernel that fails is a row, and the job goes on
                row["error"] = root_cause(error) or type(error).__name__
                self._say(f"FAILED {call.name} {kernel.name}: {row['error'][:200]}")
                lost = self._after()
        return lost

    def _shares(self, call: Call, size: int, us: float | None) -> dict[str, float | None]:
        """Of the ceilings. What no ceiling was measured for has none."""
        work = {"share_of_copy": (size, "copy"), "share_of_matmul": (call.flop, call.unit)}
        most = {name: value(self.found, ceiling) for name, (_, ceiling) in work.items()}
        return {name: _share(amount, us, most[name]) for name, (amount, _) in work.items()}

    def _peers(self, call: Call, given: list[dict[str, Any]]) -> list[dict[str, Any]]:
        made = []
        for peer in peers(call.op, given[0]):
            found: dict[str, Any] = {"what": peer.what, "us": None, "spread": None, "error": ""}
            try:
                timing = self.clock.time([peer.make(a) for a in given])
                found |= {"us": timing.us, "spread": timing.spread, "how": timing.how}
            except Exception as error:  # noqa: BLE001  this build of torch does not offer it
                found["error"] = (root_cause(error) or type(error).__name__)[:300]
            made.append(found)
        return made

    def _after(self) -> str:
        """Frees memory; says so if the device does not answer any more."""
        if self.clock.emulated:
            return ""
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as error:  # noqa: BLE001
            return f"the device is lost: {root_cause(error)}"
        return ""


def _share(amount: int, us: float | None, most: float | None) -> float | None:
    return amount / (us * 1e-6) / most if amount and us and most else None


def _over(us: float | None, ours: float | None) -> float | None:
    return us / ours if us and ours else None


def failed(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows whose kernel raised."""
    return (row for row in rows if row["error"])
