"""The fixture that installs backend "acme"."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.acme import BODY, KERNELS, Make
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
