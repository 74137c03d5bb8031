"""dsv3 runs the DeepSeek-V3 family of language models on any accelerator.

    import dsv3
    model = dsv3.load("demo")
    print(model.generate("Once upon a time").text)

Importing this package imports neither torch nor any backend. Imported before torch, it has OpenMP's threads wait less long (see
`settings.shorten_waits`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsv3.errors import BackendUnavailable, CheckpointError, Dsv3Error, UnsupportedModel, UsageError
from dsv3.settings import shorten_waits

if TYPE_CHECKING:
    from dsv3.dispatch.choose import probe
    from dsv3.dispatch.placement import Placement
    from dsv3.engine.model import Model
    from dsv3.engine.request import Generation
    from dsv3.loading import load

__version__ = "0.1.0"
shorten_waits()
_LAZY = {
    "load": "dsv3.loading",
    "probe": "dsv3.dispatch.choose",
    "Model": "dsv3.engine.model",
    "Generation": "dsv3.engine.request",
    "Placement": "dsv3.dispatch.placement",
}

_SUBMODULES = ("budget", "conformance", "errors", "eval", "ops", "plugin")

__all__ = [
    "BackendUnavailable",
    "CheckpointError",
    "Dsv3Error",
    "Generation",
    "Model",
    "Placement",
    "UnsupportedModel",
    "UsageError",
    "__version__",
    "load",
    "probe",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _SUBMODULES:
        return importlib.import_module(f"dsv3.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'dsv3' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
