"""Steps that are recorded and run again: on new data in the same places, whatever happened to memory in between."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import dsv3
from dsv3.engine.graphs import MOST_EXACT, Size, size_of
from dsv3_cpu import experts, linear, pointwise, team
from dsv3_cpu.record import recorded
from tests.cpu.weights import SCHEMES, weight

PROMPTS = ["Once upon a time", "The little fox", "One day a girl named Lily found a", "A"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quant", SCHEMES)
def test_kernels_and_operators_are_repeated_on_new_data(quant: str, dtype: torch.dtype) -> None:
    w, norm = weight(quant, 96, 256, dtype=torch.bfloat16), torch.rand(256)
    table, ids, x = torch.randn(10, 256).to(dtype), torch.tensor([1, 2], dtype=torch.int32), torch.randn(2, 256).to(dtype)
    out: list[torch.Tensor] = []

    def step() -> None:
        rows = table.index_select(0, ids.to(torch.int64)).add_(x)  # made, changed in place
        y = linear.quant_linear_few(pointwise.rms_norm(rows, norm, 1e-6), w)
        out[:] = [y.view(-1)[:150] * 2, y]

    again = recorded(step)
    kept = list(out)
    for n in range(3):
        ids.copy_(torch.tensor([n + 3, 9 - n]))
        x.copy_(torch.randn(2, 256))
        linear.quant_linear_few(torch.randn(30, 256 * (n + 1)).to(dtype), weight(quant, 96, 256 * (n + 1)))  # scratch grows
        again()
        found = [t.clone() for t in kept]
        step()
        assert torch.equal(found[0], out[0]) and torch.equal(found[1], out[1])


def test_experts_choose_anew() -> None:
    w13, w2 = weight("fp8-w8a16", 8, 256, 128, dtype=torch.bfloat16), weight("fp8-w8a16", 8, 128, 128, dtype=torch.bfloat16)
    gate, x, out = torch.randn(8, 128), torch.randn(3, 128).to(torch.bfloat16), []

    def step() -> None:
        given: Any = (None, w13, w2, None, None, 1, 1, 2, "sigmoid", "max", True, 1.0, None)
        out[:] = [experts.moe_few(x, gate, *given)]

    again = recorded(step)
    kept = out[0]
    for _ in range(3):
        x.copy_(torch.randn(3, 128))
        again()
        found = kept.clone()
        step()
        assert torch.equal(found, out[0])


def test_a_step_that_reads_a_number_cannot_be_recorded() -> None:
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="on the host"):
        recorded(lambda: x.mul_(float(x.sum())))
    assert team._recorder is None


def test_what_other_threads_run_is_not_recorded() -> None:
    w, x = weight("none", 64, 64), torch.randn(1, 64)
    mine, theirs = torch.zeros(1, 64), torch.zeros(1, 64)

    def step() -> None:
        worker = threading.Thread(target=lambda: theirs.copy_(linear.quant_linear_few(x, w)))
        worker.start()
        worker.join()
        mine.copy_(linear.quant_linear_few(x, w))

    again = recorded(step)
    theirs.zero_()
    mine.zero_()
    again()
    assert mine.any() and not theirs.any()


@pytest.mark.parametrize("options", [{}, {"draft": "mtp"}, {"temperature": 0.8, "seed": 5}])
def test_replayed_steps_say_what_steps_run_one_by_one_say(options: dict[str, Any]) -> None:
    plain, model = dsv3.load("demo", backend="cpu", graphs=False), dsv3.load("demo", backend="cpu")
    for prompts in (PROMPTS[:1], PROMPTS[:3], PROMPTS):
        wanted = plain.generate(prompts, max_new_tokens=24, **options)
        found = model.generate(prompts, max_new_tokens=24, **options)
        assert [g.ids for g in found] == [g.ids for g in wanted]
        assert all(g.stats["graph_steps"] > 0 for g in found) and all(g.stats["graph_steps"] == 0 for g in wanted)
    assert not [note for note in model.placement().notes if "graphs" in note]


def test_drafts_are_replayed_too() -> None:
    plain, model = dsv3.load("demo", backend="cpu", graphs=False), dsv3.load("demo", backend="cpu")
    for drafts in (1, 2, 3):
        options: dict[str, Any] = {"max_new_tokens": 24, "draft": "mtp", "draft_tokens": drafts}
        wanted, found = plain.generate(PROMPTS[:2], **options), model.generate(PROMPTS[:2], **options)
        assert [(g.ids, g.stats["accepted"]) for g in found] == [(g.ids, g.stats["accepted"]) for g in wanted]
    sizes = model.engine.cache.captured
    assert any(size.drafting for size in sizes) and not plain.engine.cache.captured


def test_exact_sizes_have_no_spare_rows() -> None:
    from dsv3.engine.cache import Run

    runs = [Run(n, [1], 300) for n in range(3)]
    assert size_of(runs, exactly=True) == Size(3, 1, 512)
    assert size_of([*runs, Run(3, [1, 2], 4)], exactly=True) is None
    assert size_of([Run(n, [1], 4) for n in range(MOST_EXACT + 1)], exactly=True) is None
