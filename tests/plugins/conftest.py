"""Fixtures that install backends made on the fly."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.acme import BODY, KERNELS, Make
from tests.support.failing import KERNELS as FAILING
from tests.support.failing import Install
from tests.support.plugins import good, write_plugin


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Install backend "acme" with these kernels; returns its kernel module, whose `calls` records what ran."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def build(kernels: str, name: str = "acme") -> Any:
        module = f"dsv3_{name}"
        write_plugin(tmp_path, name, good(name, body=BODY.format(module=module, kernels=kernels)))
        (tmp_path / f"{module}_kernels.py").write_text(KERNELS)
        for loaded in (module, f"{module}_kernels"):
            sys.modules.pop(loaded, None)
        importlib.invalidate_caches()
        return importlib.import_module(f"{module}_kernels")

    return build


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Install a plugin from its source; returns the kernel module of `tests.support.failing`, which says how kernels fail."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def add(name: str, text: str, **metadata: str) -> Any:
        write_plugin(tmp_path, name, text, **metadata)
        (tmp_path / "dsv3_acme_kernels.py").write_text(FAILING)
        importlib.invalidate_caches()
        for loaded in (metadata.get("dist", f"dsv3-{name}").replace("-", "_"), "dsv3_acme_kernels"):
            sys.modules.pop(loaded, None)
        return importlib.import_module("dsv3_acme_kernels")

    return add
