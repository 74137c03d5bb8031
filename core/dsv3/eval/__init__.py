"""Quality of a checkpoint or of a quantisation scheme on texts: loss, bits per byte, MTP acceptance, divergence from another.

    from dsv3.eval import evaluate, read_texts
    found = evaluate(dsv3.load("demo"), read_texts(["heldout"]), against=dsv3.load("demo", quant="none"))

Importing this package imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv3.eval.measure import evaluate
    from dsv3.eval.plot import svg
    from dsv3.eval.results import Evaluation
    from dsv3.eval.texts import Text, read_texts

_LAZY = {
    "Evaluation": "dsv3.eval.results",
    "Text": "dsv3.eval.texts",
    "evaluate": "dsv3.eval.measure",
    "read_texts": "dsv3.eval.texts",
    "svg": "dsv3.eval.plot",
}

__all__ = ["Evaluation", "Text", "evaluate", "read_texts", "svg"]


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _LAZY:
        raise AttributeError(f"module 'dsv3.eval' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
