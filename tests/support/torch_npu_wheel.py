"""The vendor's published wheel: the schemas of its operators and its own shape rules, read without CANN."""

from __future__ import annotations

import re
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto
from pathlib import Path
from typing import Any

import torch

VERSION = "2.14.0"
_SCHEMAS = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"
_RULES = "torch_npu/op_plugin/meta/_meta_registrations.py"
_FROM_TORCH = "from torch.library import Library, impl\n"
# dtypes that torch does not have, as torch_npu numbers them
_DTYPES = {"int4": 285, "hifloat8": 290, "float8_e8m0fnu": 293, "float4_e2m1fn_x2": 296, "float4_e1m2fn_x2": 297}
_910B1, _CANN = 220, "8.5.0"


def download(folder: Path) -> Path:
    """The wheel in the folder; RuntimeError with pip's last line if it cannot be had."""
    words = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    where = ["--python-version", "3.11", "--platform", "manylinux_2_28_x86_64", "-d", str(folder), f"torch-npu=={VERSION}"]
    done = subprocess.run([*words, *where], capture_output=True, text=True, timeout=240)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["pip said nothing"])[-1])
    return next(folder.glob("torch_npu-*.whl"))


def version_of(wheel: Path) -> str:
    """As the wheel's metadata says, not its name."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        found = re.search(r"^Version: (.+)$", archive.read(name).decode(), re.M)
    assert found is not None
    return found[1].strip()


class Vendor:
    """torch.ops.npu as the wheel describes it: every schema, and the shape rules that it has. Lives as long as the process."""

    def __init__(self, wheel: Path) -> None:
        self.version = version_of(wheel)
        with zipfile.ZipFile(wheel) as archive:
            schemas, rules = (archive.read(name).decode() for name in (_SCHEMAS, _RULES))
        self.fragment = torch.library.Library("npu", "FRAGMENT")
        self.schemas = _custom(schemas)
        for schema in self.schemas.values():
            self.fragment.define(schema)
        self.with_rule: set[str] = set()
        assert _FROM_TORCH in rules, "the wheel's shape rules register themselves otherwise than they did"
        given = {"__name__": "vendor_rules", "Library": self._library, "impl": self._impl}
        with _stand_in():
            exec(compile(rules.replace(_FROM_TORCH, ""), _RULES, "exec"), given)

    def _library(self, namespace: str, kind: str, key: str) -> Any:
        return namespace

    def _impl(self, namespace: Any, name: str, key: str = "") -> Any:
        """Rules for torch's own operators are left out: they would change what other tests run."""

        def register(function: Any) -> Any:
            if namespace == "npu" and name in self.schemas:
                self.rule(name, function)
                self.with_rule.add(name)
            return function

        return register

    def rule(self, name: str, function: Any) -> None:
        """A shape rule for an operator that the wheel has none for."""
        self.fragment.impl(name, function, "Meta")


def _custom(text: str) -> dict[str, str]:
    """Name with overload -> schema, of all operators of namespace npu."""
    section = re.search(r"^custom:\n(.*?)(?=^\w+:)", text, re.M | re.S)
    assert section is not None, "the wheel's list of operators has no section custom"
    lines = re.findall(r"^(?:- | {2})func: (.+)$", section[1], re.M)
    return {line.partition("(")[0]: line for line in lines}


class _ErrCode(Enum):
    PARAM = TYPE = VALUE = NOT_SUPPORT = INTERNAL = NOT_FOUND = auto()


@contextmanager
def _stand_in() -> Iterator[None]:
    """Modules by the names that the rules import while they are read."""
    root = _module("torch_npu", **_DTYPES)
    npu_utils = _module("torch_npu.npu.utils", get_cann_version=lambda: _CANN, _is_gte_cann_version=lambda *a: True)
    npu = _module("torch_npu.npu", utils=npu_utils)
    root.npu = npu  # type: ignore[attr-defined]
    modules = {
        "torch_npu": root,
        "torch_npu.npu": npu,
        "torch_npu.npu.utils": npu_utils,
        "torch_npu.npu._backends": _module("torch_npu.npu._backends", get_soc_version=lambda: _910B1),
        "torch_npu.utils": _module("torch_npu.utils"),
        "torch_npu.utils._error_code": _module(
            "torch_npu.utils._error_code", ErrCode=_ErrCode, ops_error=lambda code: f" [{code.name}]"
        ),
    }
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _module(name: str, **members: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    for member, value in members.items():
        setattr(made, member, value)
    return made
