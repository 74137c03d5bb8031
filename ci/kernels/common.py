"""Writes backends/dsv3_cpu/common.json: which programs of the CPU backend's kernels the demo checkpoint uses, those first that
take longest to compile. They are compiled when a wheel is built, and ahead on a first start. Each is compiled here: a minute.

    python ci/kernels/common.py backends/dsv3_cpu/common.json
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from typing import Any

os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp()  # nothing is there yet
os.environ["NUMBA_OPT"] = "3"  # as it is anyway: but what came with the package is not of this word's making

import dsv3
from dsv3_cpu import ahead, facts, int8, programs

PROMPTS = ["Once upon a time", "The little fox"]
LONG = "Once upon a time there was a little fox who lived in the woods. " * 20
QUANTS = {"int8": "int8-w8a16", "int4": "int4-w4a16"}
_features = facts.features
_PRODUCTS = (frozenset[str](), frozenset({"bf16_mm", "int8_mm"}))
_times: dict[tuple[str, str], float] = {}


def timed(self: Any, signature: str, load: Any = programs.Kernel._load) -> int:
    started = time.perf_counter()
    address: int = load(self, signature)
    _times[self.name, signature] = time.perf_counter() - started
    return address


def used_by(short: bool, quant: str | None = None) -> list[tuple[str, str]]:
    """What no earlier call of this used."""
    before = set(_times)
    with dsv3.load("demo", backend="cpu", quant=quant) as model:
        if short:
            for draft in (None, "mtp"):
                model.generate(PROMPTS, max_new_tokens=4, draft=draft)
            model.generate(PROMPTS[:1], max_new_tokens=4, temperature=0.8, top_p=0.9, seed=1)
        else:
            model.generate(LONG, max_new_tokens=2)
    return sorted(set(_times) - before, key=lambda entry: -_times[entry])


def on_either(short: bool, quant: str | None = None) -> list[tuple[str, str]]:
    """What processors use that have no instructions for products, and that have all."""
    found = []
    for has in _PRODUCTS:
        _pretend(has)
        found += used_by(short, quant)
    return found


def _pretend(has: frozenset[str]) -> None:
    def features() -> frozenset[str]:
        return (_features() - _PRODUCTS[1]) | has

    facts.features = int8.features = features  # type: ignore[assignment]


def main(path: str) -> None:
    ahead.no_helpers()
    programs.Kernel._load = timed  # type: ignore[method-assign, assignment]
    lists = {"short": on_either(True), "long": on_either(False)}
    lists |= {name: on_either(True, quant) + on_either(False, quant) for name, quant in QUANTS.items()}
    with open(path, "w", encoding="utf-8") as file:
        json.dump(lists, file, indent=1)
        file.write("\n")
    for name, entries in lists.items():
        print(f"{name}: {len(entries)} programs, {sum(_times[e] for e in entries):.1f} s")


if __name__ == "__main__":
    main(sys.argv[1])
