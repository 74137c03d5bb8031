"""Meta-parameters of kernels: the tables that `Kernel.configs` names. configs/kernels/README.md describes their format."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from dsv3.dispatch.guard import CALL_LIMIT_S, guarded, root_cause
from dsv3.dispatch.registration import BadRegistration
from dsv3.dispatch.site import Example
from dsv3.errors import nearest
from dsv3.ops import spec
from dsv3.ops.spec import STEP_DIMS
from dsv3.plugin import Kernel
from dsv3.resources import resources

Config = Mapping[str, Any]
Range = tuple[int, int]
_KEYS = ("arch", "when", "config")


@dataclass(frozen=True)
class Entry:
    """One line of a table. arch: empty for any. when: dimension -> inclusive range in which the entry is the default."""

    config: Config
    arch: frozenset[str] = frozenset()
    when: Mapping[str, Range] = field(default_factory=dict)

    def for_arch(self, arch: str) -> bool:
        return not self.arch or arch in self.arch

    def covers(self, dims: Mapping[str, int]) -> bool:
        """Whether every dimension it names is known and in its range."""
        return all(name in dims and low <= dims[name] <= high for name, (low, high) in self.when.items())


@dataclass(frozen=True)
class ConfigTable:
    """A kernel's table: its entries in order, where it was read, and the hash of what was read."""

    entries: tuple[Entry, ...]
    where: str
    sha256: str

    def candidates(self, arch: str) -> list[Config]:
        """What tuning tries on this architecture, without repetition."""
        found: list[Config] = []
        for entry in self.entries:
            if entry.for_arch(arch) and entry.config not in found:
                found.append(entry.config)
        return found

    def first(self, arch: str, dims: Mapping[str, int]) -> Config | None:
        """The default for one call of these sizes."""
        return next((e.config for e in self.entries if e.for_arch(arch) and e.covers(dims)), None)

    def default(self, arch: str, calls: Iterable[Example], tokens: tuple[int, int]) -> Config | None:
        """The first entry that covers all the calls at both ends of the bucket, else the first that covers the one with the
        most rows; None where the table has nothing for the architecture and these dimensions."""
        entries = [e for e in self.entries if e.for_arch(arch)]
        sizes = [[call.dims(t) for t in dict.fromkeys(tokens)] for call in calls]
        for entry in entries:
            if all(entry.covers(dims) for ends in sizes for dims in ends):
                return entry.config
        if len(sizes) > 1:
            largest = max((ends for ends in sizes), key=lambda ends: sum(ends[-1].values()))
            return next((e.config for e in entries if all(map(e.covers, largest))), None)
        return None

    def edges(self, example: Example) -> set[int]:
        """Token counts after which another entry may become the default."""
        found: set[int] = set()
        for entry in self.entries:
            for name, (low, high) in entry.when.items():
                if slope := example.slope.get(name):
                    base = example.base[name]
                    found |= {(low - 1 - base) // slope, (high - base) // slope}
        return found


def config_table(kernel: Kernel, backend: str) -> ConfigTable | None:
    """The table that the kernel names, None where it names none. BadRegistration with file, key, expected, found."""
    return None if kernel.configs is None else _read(kernel.configs, kernel.op, f"{backend}.{kernel.name}")


def text_of(config: Config | None) -> str:
    """ "BLOCK_M=64, warps=4", for people; "" without one."""
    return ", ".join(f"{name}={value}" for name, value in (config or {}).items())


@functools.lru_cache(maxsize=256)
def _read(name: str, op: str, kernel: str) -> ConfigTable:
    where, raw = _content(name, kernel)

    def bad(key: str, expected: str, found: Any) -> BadRegistration:
        at = f"{where}: {key}" if key else where
        return BadRegistration(f"bad configuration table of kernel {kernel}: {at}: expected {expected}, found {found}")

    try:
        table = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise bad("", "JSON", f"{type(error).__name__}: {error}") from error
    if not isinstance(table, dict):
        raise bad("", 'an object with "op" and "configs"', type(table).__name__)
    for key in table:
        if key not in ("op", "configs"):
            raise bad(f"key {key!r}", f"op or configs{nearest(key, ('op', 'configs'))}", repr(key))
    if table.get("op") != op:
        raise bad("key 'op'", repr(op), repr(table.get("op")))
    listed = table.get("configs")
    if not isinstance(listed, list) or not listed:
        raise bad("key 'configs'", "a list with at least one entry", _short(listed))
    entries = []
    for i, entry in enumerate(listed):
        if mistake := _entry_mistake(entry, op):
            key, expected, found = mistake
            raise bad(f"configs[{i}]{key}", expected, found)
        when = {dim: (low, high) for dim, (low, high) in entry.get("when", {}).items()}
        entries.append(Entry(MappingProxyType(dict(entry["config"])), frozenset(entry.get("arch") or ()), when))
    return ConfigTable(tuple(entries), where, hashlib.sha256(raw).hexdigest())


def _content(name: str, kernel: str) -> tuple[str, bytes]:
    """The table's address and bytes."""
    package, colon, path = name.partition(":")
    if colon:
        outcome = guarded(lambda: importlib.resources.files(package).joinpath(path).read_bytes(), CALL_LIMIT_S * 5)
    elif re.fullmatch(r"[\w.-]+", name):
        path = f"configs/kernels/{name}.json"
        outcome = guarded(lambda: resources("configs", "kernels", f"{name}.json").read_bytes(), CALL_LIMIT_S)
    else:
        expected = "a table's name, or 'package:path/file.json'"
        raise BadRegistration(f"kernel {kernel} has configs {name!r}; expected {expected}")
    if outcome.error is not None or outcome.value is None:
        reason = root_cause(outcome.error) if outcome.error else "empty"
        raise BadRegistration(f"{reason} (configuration table {name!r} of kernel {kernel})") from outcome.error
    return (name if colon else path), outcome.value


def _entry_mistake(entry: Any, op: str) -> tuple[str, str, str] | None:
    """(key, expected, found) of the first mistake in an entry."""
    if not isinstance(entry, dict):
        return "", 'an object with "config"', _short(entry)
    for key in entry:
        if key not in _KEYS:
            return f".{key}", f"one of {', '.join(_KEYS)}{nearest(key, _KEYS)}", repr(key)
    config, arch, when = entry.get("config"), entry.get("arch"), entry.get("when", {})
    if not isinstance(config, dict):
        return ".config", "an object of numbers, strings and booleans", _short(config)
    for key, value in config.items():
        if not isinstance(value, int | float | str):  # a bool is an int
            return f".config.{key}", "a number, a string or a boolean", _short(value)
    if arch is not None and not (isinstance(arch, list) and arch and all(isinstance(a, str) for a in arch)):
        return ".arch", 'a list of architectures, such as ["sm_90"], or no such key', _short(arch)
    if not isinstance(when, dict):
        return ".when", "an object of dimension: [first, last]", _short(when)
    dims = [d for d in spec(op).dims if d not in STEP_DIMS]
    for dim, bounds in when.items():
        if dim not in dims:
            return f".when.{dim}", f"a dimension of {op} known at binding: {', '.join(dims)}{nearest(dim, dims)}", repr(dim)
        numbers = isinstance(bounds, list) and len(bounds) == 2 and all(type(b) is int for b in bounds)
        if not numbers or not 0 <= bounds[0] <= bounds[1]:
            return f".when.{dim}", "[first, last], two integers in order", _short(bounds)
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
