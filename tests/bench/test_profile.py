"""The profile of a step: it counts what runs, says where from, and leaves the model as it was."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

import dsv3
from dsv3.bench.memory import Watch, peak
from dsv3.bench.ops import operator_rows, profile_figures
from dsv3.bench.profile import profile, timer_cost
from dsv3.bench.session import Session


@pytest.fixture(scope="module")
def session(model: dsv3.Model) -> Session:
    made = Session(model, 2, 5, 3, eager=True)
    made.prefill()
    made.decode(3)
    return made


def test_every_kernel_of_a_step_is_counted_once(session: Session) -> None:
    found = profile(session.model, lambda: session.step(session.first, 0), 2)
    calls: Counter[str] = Counter()
    for (op, kernel, _), group in found.groups.items():
        assert kernel.startswith("reference.") and len(group.seconds) == 2 * group.calls and group.nbytes >= 0
        calls[op] += group.calls
    layers = 5
    assert calls["mla_decode"] == layers and calls["embedding"] == calls["gumbel_argmax"] == 1
    assert calls["rms_norm"] == 4 * layers + 1  # two of a block, two latents, the last: `add_rms_norm` is in parts here
    assert calls["grouped_topk"] == calls["moe_combine"] == 4
    assert sum(calls.values()) == found.calls
    assert len(found.step) == len(found.kernels) == 2


def test_flop_of_the_kernels_are_those_of_the_step(session: Session) -> None:
    """Two countings that share no code but the shapes: operator by operator, and from the weight tree."""
    found = profile(session.model, lambda: session.step(session.first, 0), 1)
    assert sum(g.flop for g in found.groups.values()) == session.cost(0).flop


def test_kernels_and_tokens_are_the_same_afterwards(session: Session) -> None:
    slots = session.model.placement().binding.slots
    before = [slot.holder[slot.key] for slot in slots]
    tokens = session.step(session.first, 0)
    profile(session.model, lambda: session.step(session.first, 0), 1)
    assert all(slot.holder[slot.key] is kernel for slot, kernel in zip(slots, before, strict=True))
    assert session.step(session.first, 0) == tokens

    def broken() -> Any:
        raise RuntimeError("in the middle of a step")

    with pytest.raises(RuntimeError, match="in the middle"):
        profile(session.model, broken, 1)
    assert all(slot.holder[slot.key] is kernel for slot, kernel in zip(slots, before, strict=True))


def test_rows_say_what_is_left_outside(session: Session) -> None:
    found = profile(session.model, lambda: session.step(session.first, 0), 3)
    rows = operator_rows(found)
    assert rows[-1]["operator"] == "outside kernels" and rows[-1]["ms"] == pytest.approx(1e3 * found.outside)
    assert [row["ms"] for row in rows[:-1]] == sorted((row["ms"] for row in rows[:-1]), reverse=True)
    named = {f.name: f.value for f in profile_figures(found, "decode")}
    assert named["outside kernels"] == pytest.approx(named["decode step"] - named["in kernels"])
    assert timer_cost(200) >= 0


def test_peak_memory_leaves_out_what_is_set_aside() -> None:
    if peak() is None:
        pytest.skip("this system does not tell a process its peak memory")
    watch = Watch()
    if watch.notes:
        pytest.skip("this system does not let a process begin its peak anew")
    start = watch.peak() or 0
    with watch.aside():
        bytearray(b"x" * (256 << 20))
    aside = watch.peak() or 0
    kept = bytearray(b"x" * (128 << 20))
    assert aside - start < 64 << 20 and (watch.peak() or 0) - start > 100 << 20 and kept
