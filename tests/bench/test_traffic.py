"""What a call moves and computes, against the table of calls that kernels are compiled and tuned for."""

from __future__ import annotations

import pytest

from dsv3.bench.calls.shapes import TINY, Call, Maker
from dsv3.bench.calls.table import all_calls
from dsv3.bench.traffic import traffic

# The table says what is expected of a router that it does not ask, and not what experts of padded blocks keep.
ASKED = ("moe",)
CALLS = [c for c in all_calls(TINY) if c.op not in ASKED]


@pytest.mark.parametrize("call", CALLS, ids=lambda c: c.name)
def test_bytes_and_flop_are_the_tables(call: Call) -> None:
    arguments = call.arguments(Maker(TINY, "cpu"))
    nbytes, flop = traffic(call.op, arguments)
    assert flop == call.flop
    wanted = 0 if call.op == "all_reduce" else call.nbytes(arguments)
    assert nbytes == wanted


def test_a_moe_layer_reads_the_experts_that_its_router_chooses() -> None:
    call = next(c for c in all_calls(TINY) if c.op == "moe" and c.tokens == 3)
    arguments = call.arguments(Maker(TINY, "cpu"))
    arguments["gate"].zero_()
    arguments["bias"].zero_()
    few, _ = traffic("moe", arguments)  # all scores equal: ties go to the lower id, so every token takes the same experts
    arguments["x"].zero_()
    arguments["x"][0] = 1.0
    arguments["gate"][-1] = 1.0  # now the first token's largest score is the last expert's
    more, _ = traffic("moe", arguments)
    each = sum(arguments[name].nbytes // arguments[name].shape[0] for name in ("w13", "w2"))
    assert (more - few) // each in (1, 2) and (more - few) % each == 0
