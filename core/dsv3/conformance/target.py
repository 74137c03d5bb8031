"""What the suite is aimed at: a backend on a device, its kernels, and the calls they take."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import torch

from dsv3.conformance.case import NAMES, Case, Setting
from dsv3.dispatch.choose import Source, cache_spec, named, probe_backend, torch_device
from dsv3.dispatch.configs import Config
from dsv3.dispatch.registration import resolve
from dsv3.dispatch.select import Catalogue
from dsv3.dispatch.site import described
from dsv3.errors import BackendUnavailable
from dsv3.ops.spec import STEP_DIMS, spec
from dsv3.plugin import Backend, CacheSpec, Call, Kernel, KvDType, Prepared
from dsv3.plugin.needs import DType

_GIVEN = "an instance given in this process"


def source_of(backend: str | Backend, emulate: bool | str) -> Source:
    """The backend by name, or an instance, on its first usable device; BackendUnavailable says why there is none."""
    arch = "default" if emulate is True else emulate or None
    if isinstance(backend, str):
        return named(backend, None, arch)
    answers = probe_backend(backend, _GIVEN, arch)
    for device, answer in answers:
        if device is not None and answer.state == "usable" and answer.capability is not None:
            return Source(backend, device, answer.capability, _GIVEN)
    reasons = "; ".join(answer.detail or answer.state for _, answer in answers)
    raise BackendUnavailable(f"{reasons} [backend {backend.name!r}, {_GIVEN}]")


class Target:
    """Kernels by operator, and what binds and places their calls."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.catalogue = Catalogue(source)
        self.device = torch_device(source)

    @property
    def name(self) -> str:
        return self.source.name

    def kernels(self, op: str) -> list[Kernel]:
        """What is claimed for an operator, best first."""
        return list(self.catalogue.kernels.get(op, ()))

    def claims(self) -> dict[str, list[str]]:
        """Operator -> names of its kernels."""
        return {op: [f"{self.name}.{k.name}" for k in found] for op, found in self.catalogue.kernels.items()}

    def keeps(self, kv_dtype: KvDType) -> bool:
        """Whether the backend keeps a cache in this format when asked to; it is not asked for what the device does not have."""
        if kv_dtype != "fp8" and kv_dtype not in self.source.capability.dtypes:
            return False
        return self._cache(kv_dtype).kv_dtype == kv_dtype

    def setting(self, case: Case) -> Setting:
        """What the backend chooses for a case: it is asked as the engine would ask it, for a dtype that the device has."""
        if case.kv:
            found = self._cache(case.kv)
            return Setting(found.page_size, encoding=getattr(torch, found.encoding))
        listed = [d for d in (NAMES[case.tag], "bfloat16", "float32", "float64") if d in self.source.capability.dtypes]
        asked = [d for d in listed if d in get_args(KvDType)]
        if not asked:
            return Setting()
        found = self._cache(asked[0])
        same = found.kv_dtype in (asked[0], "fp8") or asked[0] != NAMES[case.tag]
        return Setting(found.page_size, None if same else getattr(torch, found.kv_dtype))

    @functools.cache  # noqa: B019  as below
    def _cache(self, kv_dtype: str) -> CacheSpec:
        return cache_spec(self.source, kv_dtype)  # type: ignore[arg-type]

    @functools.cache  # noqa: B019  a target lives as long as its run
    def function(self, op: str, name: str) -> Any:
        """The kernel's function, defaults filled in by the caller; one with configurations gets that of each call's sizes."""
        kernel = next(k for k in self.kernels(op) if k.name == name)
        function = resolve(kernel, self.name)
        if kernel.configs is None:
            return function
        return lambda **arguments: function(**arguments, config=self._config(kernel, arguments))

    def _config(self, kernel: Kernel, arguments: Mapping[str, Any]) -> Config | None:
        table = self.catalogue.table(kernel)
        return None if table is None else table.first(self.source.device.arch, spec(kernel.op).bind(arguments))

    def refusal(self, kernel: Kernel, arguments: Mapping[str, Any], needs_dtypes: tuple[str, ...]) -> str:
        """Why the kernel does not take the call, all reasons; "" if it does."""
        known = spec(kernel.op)
        dims = {n: size for n, size in known.bind(arguments).items() if n not in STEP_DIMS or n == "S"}
        dtypes, quant = described(known, arguments)
        reasons = self.catalogue.refusals(kernel, Call(kernel.op, dims, dtypes, quant, self.source.device))
        claimed = {word for need in kernel.needs if isinstance(need, DType) for word in need.allowed}
        missing = [n for n in needs_dtypes if n not in self.source.capability.dtypes and n not in claimed]
        if kernel.configs is not None and self._config(kernel, arguments) is None:
            reasons.append(f"table {kernel.configs} has no configuration for {self.source.device.arch} and this call")
        return "; ".join([*reasons, *(f"the device does not list {n}" for n in missing)])

    def refuses_weight(self, kernel: Kernel, path: str, weight: Prepared, dtype: torch.dtype) -> str:
        """Why a kernel takes no call with this weight, as far as the weight alone tells; "" if it may."""
        known = spec(kernel.op)
        dims: dict[str, int] = {}
        term = next(t for t in known.terms if t.path == path)
        for dim, size in zip(term.dims, weight.shape, strict=True):
            dim.solve(size, dims)
        dtypes = {path: str(weight.tensors["weight"].dtype).removeprefix("torch.")}
        if known.activation:
            dtypes[known.activation] = str(dtype).removeprefix("torch.")
        needs = tuple(n for n in kernel.needs if getattr(n, "dim", None) is None or n.dim in dims)
        filled = {**dict.fromkeys(known.dims, 128), **dims}  # for `accepts`, which may ask for any
        call = Call(kernel.op, filled, dtypes, weight.quant, self.source.device)
        return "; ".join(self.catalogue.refusals(replace(kernel, needs=needs), call))

    def prepare(self, kernel: Kernel, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments with weights in the layouts that the kernel reads."""
        changed = dict(given)
        for path, layout in kernel.layouts.items():
            if layout == "canonical":
                continue
            head, _, member = path.partition(".")
            weight = changed[head].get(member) if member and changed.get(head) is not None else changed.get(head)
            if weight is None:
                continue
            prepared = self.source.backend.prepare(weight, layout, self.source.device)
            changed[head] = {**changed[head], member: prepared} if member else prepared
        return changed

    def synchronize(self) -> None:
        if self.device.type != "cpu":
            self.source.backend.synchronize(self.source.device)
