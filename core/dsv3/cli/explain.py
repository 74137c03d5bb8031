"""`dsv3 explain`: which kernel runs an operator for this model on this machine, and why not the others."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from dsv3.cli.common import place_model, settings_of, table
from dsv3.errors import UsageError

if TYPE_CHECKING:
    from dsv3.dispatch.placement import Placement


def main(arguments: argparse.Namespace) -> int:
    settings = settings_of(arguments)
    if arguments.tokens is not None and arguments.tokens < 1:
        raise UsageError(f"--tokens is {arguments.tokens}; expected at least 1")
    if arguments.op is not None:
        _known(arguments.op)
    placement = place_model(arguments, settings)
    if arguments.op is None:
        print(json.dumps(placement.to_json(), indent=2) if arguments.json else placement)
    elif arguments.json:
        print(json.dumps(placement.explain(arguments.op, arguments.tokens), indent=2))
    else:
        print(_text(placement, arguments.op, arguments.tokens))
    return 0


def _known(op: str) -> None:
    from dsv3.dispatch.registration import unknown_operator
    from dsv3.ops import names

    if op not in names():
        raise unknown_operator(op)


def _text(placement: Placement, op: str, tokens: int | None) -> str:
    found = placement.explain(op, tokens)
    lines = [found["signature"], placement.summary]
    if not found["choices"]:
        offered = ", ".join(found["offered"]) or "none"
        return "\n".join([*lines, f"this model does not call {op} on its own; kernels for it: {offered}"])
    for choice in found["choices"]:
        lines += ["", f"{choice['span']} tokens, {len(choice['sites'])} sites ({choice['sites'][0]}, ..):"]
        rows = [("  chosen", choice["chosen"], choice["why"])]
        rows += [("  rejected", r["kernel"], r["reason"]) for r in choice["rejected"]]
        rows += [("  part", f"{part} = {kernel}", "") for part, kernel in choice.get("parts", {}).items()]
        lines.append(table(rows))
    return "\n".join(lines)
