"""Captured decode steps: the tokens of eager generation, from buffers that every step is copied into.

A "graph" here runs the very step it was given again. It sees the buffers as a device's graph does, so that what is stale,
padded wrongly or not copied shows in the tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dsv3 import ops
from dsv3.conformance.target import source_of
from dsv3.engine import graphs as module
from dsv3.engine.cache import BatchCache, Run
from dsv3.engine.graphs import COPIED, Size, StaticStep, padded, size_of
from dsv3.loading import load_on
from dsv3.plugin import CacheSpec, Device, Kernel
from tests.support.faulty import Made

PROMPTS = [[0, 933, 643, 263, 506], [0, 5], [0, *range(40, 110)], [0, 77, 78, 79], [0, *range(300, 320)]]
LONG = {"max_new_tokens": 12, "ignore_eos": True}


class Replaying(Made):
    """Counts what it captures (the question whether it captures at all aside) and replays. `fails` may raise instead."""

    def __init__(self, *arguments: Any, fails: Callable[[], None] = lambda: None, encoding: Any = None, **claims: Any) -> None:
        super().__init__(*arguments, **claims)
        self.captured = self.replayed = 0
        self.fails = fails
        self.encoding = encoding

    def cache_spec(self, device: Device, kv_dtype: Any) -> CacheSpec:
        return CacheSpec(64, kv_dtype, self.encoding) if self.encoding else super().cache_spec(device, kv_dtype)

    def capture(self, step: Callable[[], Any], device: Device) -> Callable[[], Any] | None:
        if step.__qualname__.startswith("DecodeGraphs._ask"):
            return step
        self.fails()
        self.captured += 1
        step()

        def replay() -> None:
            self.replayed += 1
            step()

        return replay


def load(backend: Made, **options: Any) -> Any:
    return load_on(source_of(backend, False), "demo", dtype="float32", **options)


def ids(found: Any) -> list[list[int]]:
    return [g.ids for g in found]


@pytest.fixture(scope="module")
def replaying() -> tuple[Replaying, Any]:
    backend = Replaying()
    return backend, load(backend)


@pytest.fixture(scope="module")
def eager() -> Any:
    return load(Made(name="eager"))


# -- the same tokens


@pytest.mark.parametrize("draft", [None, "mtp"])
@pytest.mark.parametrize("batch", [1, 3, 5])
def test_replayed_steps_give_the_tokens_of_eager_ones(
    batch: int, draft: Any, replaying: tuple[Replaying, Any], eager: Any
) -> None:
    backend, model = replaying
    before = backend.replayed
    found = model.generate(PROMPTS[:batch], draft=draft, **LONG)
    wanted = eager.generate(PROMPTS[:batch], draft=draft, **LONG)
    assert ids(found) == ids(wanted)
    assert backend.replayed > before and all(g.stats["graph_steps"] == g.stats["steps"] - 1 > 0 for g in found)
    assert all(g.stats["graph_steps"] == 0 and g.stats["accepted"] == f.stats["accepted"]
               for f, g in zip(found, wanted, strict=True))  # fmt: skip


@pytest.mark.parametrize("encoding", [None, "float8_e4m3fnuz"])
def test_replayed_steps_read_an_fp8_cache(encoding: Any, eager: Any) -> None:
    backend = Replaying(encoding=encoding)
    model = load(backend, kv_dtype="fp8")
    found = model.generate(PROMPTS, draft="mtp", **LONG)
    plain = load(Replaying(encoding=encoding, name="plain"), kv_dtype="fp8", graphs=False)
    assert backend.replayed and ids(found) == ids(plain.generate(PROMPTS, draft="mtp", **LONG))
    assert model.new_cache([3]).layers[0].ckv.dtype == getattr(torch, encoding or "float8_e4m3fn")


def test_sequences_may_end_at_different_times(replaying: tuple[Replaying, Any], eager: Any) -> None:
    """A batch shrinks from five to one, through every size of graph between."""
    _, model = replaying
    options = {"stop": [".", "named", "small"], "max_new_tokens": 60}
    for draft in (None, "mtp"):
        found = model.generate(PROMPTS, draft=draft, **options)
        assert len({len(g.ids) for g in found}) > 2
        assert ids(found) == ids(eager.generate(PROMPTS, draft=draft, **options))


def test_two_streams_at_once_do_not_disturb_each_other(replaying: tuple[Replaying, Any], eager: Any) -> None:
    _, model = replaying
    wanted = ["".join(eager.stream(p, **LONG)) for p in PROMPTS[:2]]
    streams = [model.stream(p, **LONG) for p in PROMPTS[:2]]
    pieces = list(itertools.zip_longest(*streams, fillvalue=""))
    assert len(pieces) > 5 and ["".join(column) for column in zip(*pieces, strict=True)] == wanted


# -- teeth


@pytest.mark.parametrize("name", [n for n in COPIED if n != "cu_k"])
def test_a_buffer_that_is_not_copied_shows(name: str, eager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(Replaying())
    monkeypatch.setattr(module, "COPIED", tuple(n for n in COPIED if n != name))
    model.generate(PROMPTS[:3], max_new_tokens=2)  # captures, and fills the first pages
    try:
        found = ids(model.generate(PROMPTS[:3], draft="mtp", **LONG))
    except (RuntimeError, IndexError):
        return
    assert found != ids(eager.generate(PROMPTS[:3], draft="mtp", **LONG))


def test_writing_for_rows_that_are_left_over_shows(eager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(Replaying())

    def wrong(found: Any, rows: int) -> Any:
        full = padded(found, rows)
        full.slots[:] = [max(slot, 0) for slot in full.slots]
        return full

    prompts = [[700, 7, 8], *PROMPTS[1:3]]  # what is left over feeds token 0, which another prompt begins with
    right = ids(model.generate(prompts, **LONG))
    monkeypatch.setattr(module, "padded", wrong)
    assert right == ids(eager.generate(prompts, **LONG)) != ids(model.generate(prompts, **LONG))


def test_the_buffers_hold_the_step_and_padding_that_writes_nothing(eager: Any) -> None:
    cache = eager.new_cache([200, 80, 9])
    runs = [Run(1, [7, 8], 70), Run(0, [9], 190), Run(2, [4, 5], 0)]
    size = size_of(runs)
    assert size == Size(4, 2, 256)
    static = StaticStep(size, 64, lambda rows: rows, torch.device("cpu"))
    static.fill(cache.indices([Run(0, [1, 1], 100)]))
    static.fill(cache.indices(runs))
    step, wanted = static.step, cache.step(runs, lambda rows: rows, True)
    for name in COPIED:
        value = getattr(wanted, name)
        part = getattr(step, name)[tuple(slice(n) for n in value.shape)]
        assert part.tolist() == value.tolist(), name
    assert step.slots.tolist()[5:] == [-1] * 3 and step.positions.tolist()[5:] == [0] * 3
    assert step.cu_q.tolist() == [0, 2, 3, 5, 6, 7, 8, 8, 8] and step.seq_lens.tolist() == [72, 191, 2, 1, 1, 1, 0, 0]
    assert step.cu_k.tolist()[3:] == [265, 266, 267, 268, 268, 268] and step.block_table.shape == (8, 4)
    assert not step.block_table[3:].any() and step.bucket == 8 and (step.max_q, step.max_k) == (2, 256)


@pytest.mark.parametrize(
    ("sequences", "queries", "longest", "wanted"),
    [(1, 1, 1, (1, 1, 256)), (3, 1, 256, (4, 1, 256)), (5, 2, 257, (8, 2, 512)), (32, 1, 4096, (32, 1, 4096))],
)
def test_sizes_are_powers_of_two(sequences: int, queries: int, longest: int, wanted: Any) -> None:
    runs = [Run(i, [0], 0) for i in range(sequences - 1)]
    assert size_of([*runs, Run(sequences - 1, [0] * queries, longest - queries)]) == Size(*wanted)


# -- when it is captured


def test_a_graph_is_captured_once_per_size_and_used_by_later_generations() -> None:
    backend = Replaying()
    model = load(backend)
    model.generate(PROMPTS[0], **LONG)
    assert backend.captured == 1 and backend.replayed == 11
    model.generate(PROMPTS[1], **LONG)
    assert backend.captured == 1 and backend.replayed == 22
    model.generate(PROMPTS[:3], **LONG)  # a larger cache
    assert backend.captured == 2
    model.generate(PROMPTS[1], **LONG)
    model.generate(PROMPTS[1], **LONG)
    assert backend.captured == 3


def test_a_sequence_that_grows_past_a_graph_takes_the_next(eager: Any) -> None:
    backend = Replaying()
    prompt = [0, *range(10, 260)]
    assert load(backend).generate(prompt, **LONG).ids == eager.generate(prompt, **LONG).ids
    assert (backend.captured, backend.replayed) == (2, 11)


def test_capturing_changes_nothing_in_the_cache() -> None:
    model = load(Replaying())
    cache = model.new_cache([40])
    model.forward(cache, [Run(0, PROMPTS[0], 0)], False)
    before = [plane.clone() for layer in cache.layers for plane in (layer.ckv, layer.kpe)]
    assert model.capture(cache, Size(4, 2, 256))
    after = [plane for layer in cache.layers for plane in (layer.ckv, layer.kpe)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_warming_up_captures_what_generating_replays(capsys: pytest.CaptureFixture[str]) -> None:
    backend = Replaying()
    model = load(backend)
    model.warm_up(3, False, tokens=300, draft="mtp")
    captured = backend.captured
    assert captured == 3 * 2 * 2  # 1, 2, 4 sequences; 1 or 2 tokens; 256 or 512 cached
    model.generate(PROMPTS[:3], draft="mtp", **LONG)
    assert backend.captured == captured and backend.replayed
    assert not capsys.readouterr().err


def test_warming_up_calls_every_kernel_of_the_buckets_that_a_request_falls_into() -> None:
    """Kernels that stand aside for some sizes make buckets; after warming up none of them waits for its first call."""
    called: set[tuple[str, int]] = set()

    def norm(**arguments: Any) -> Any:
        called.add(("rms_norm", arguments["x"].shape[0]))
        return ops.spec("rms_norm").reference(**arguments)

    backend = Edged({**Made().functions, "rms_norm": norm})
    model = load(backend)
    model.warm_up(2, False, draft="mtp")
    assert {n for _, n in called} >= {1, 3, 17}
    assert [b[0] for b in model.placement().binding.buckets] == [1, 3, 17]


class Edged(Made):
    def kernels(self, device: Device) -> list[Kernel]:
        from dsv3.plugin import AtMost

        more = [Kernel("rms_norm", f"upto{n}", "dsv3_faulty_kernels:made_rms_norm", needs=(AtMost("T", n),)) for n in (2, 16)]
        return [*super().kernels(device), *more]


# -- when it is not


def test_a_capture_that_raises_is_a_note_and_generation_goes_on(eager: Any) -> None:
    def fails() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    model = load(Replaying(fails=fails))
    found = model.generate(PROMPTS[:3], draft="mtp", **LONG)
    assert ids(found) == ids(eager.generate(PROMPTS[:3], draft="mtp", **LONG))
    assert all(g.stats["graph_steps"] == 0 for g in found)
    notes = [n for n in model.placement().notes if "without graphs" in n]
    assert len(notes) == 1 and "operation not permitted" in notes[0]


def test_a_kernel_that_fails_while_it_is_captured_is_named_and_not_replaced(eager: Any) -> None:
    state = {"capturing": False}

    def norm(**arguments: Any) -> Any:
        if state["capturing"]:
            raise ValueError("asked the host")
        return ops.spec("rms_norm").reference(**arguments)

    backend = Replaying({**Made().functions, "rms_norm": norm}, fails=lambda: state.update(capturing=True))
    model = load(backend)
    capture = backend.capture

    def spy(step: Callable[[], Any], device: Device) -> Any:
        try:
            return capture(step, device)
        finally:
            state["capturing"] = False

    backend.capture = spy  # type: ignore[method-assign]
    assert ids(model.generate(PROMPTS[:3], **LONG)) == ids(eager.generate(PROMPTS[:3], **LONG))
    (note,) = [n for n in model.placement().notes if "without graphs" in n]
    assert "asked the host" in note and "rms_norm at" in note and not model.placement().to_json()["quarantined"]


def test_kernels_that_are_not_graph_safe_run_eagerly_and_are_named(eager: Any) -> None:
    class Unsafe(Replaying):
        def kernels(self, device: Device) -> list[Kernel]:
            return [Kernel(k.op, k.name, k.target, graph_safe=k.op not in ("mla_decode", "mla_prefill"))
                    for k in super().kernels(device)]  # fmt: skip

    backend = Unsafe()
    model = load(backend)
    assert ids(model.generate(PROMPTS[:3], **LONG)) == ids(eager.generate(PROMPTS[:3], **LONG))
    assert backend.captured == 0
    (note,) = [n for n in model.placement().notes if "without graphs" in n]
    assert note == "decode runs without graphs: not graph-safe: made.made of mla_decode"


def test_a_decomposition_that_reads_on_the_host_is_not_captured() -> None:
    functions = {op: f for op, f in Made().functions.items() if op not in ("moe", "fused_experts", "grouped_linear")}
    backend = Replaying(functions)
    model = load(backend)
    assert model.generate(PROMPTS[0], max_new_tokens=3, ignore_eos=True).stats["graph_steps"] == 0
    assert backend.captured == 0
    assert [n for n in model.placement().notes if "not graph-safe: composite.quant_linear of grouped_linear" in n]


def test_what_a_decode_step_does_not_call_need_not_be_graph_safe() -> None:
    class Prefill(Replaying):
        def kernels(self, device: Device) -> list[Kernel]:
            others = ("mla_prefill", "kv_cache_gather", "gumbel_argmax", "mtp_combine")
            return [Kernel(k.op, k.name, k.target, graph_safe=k.op not in others) for k in super().kernels(device)]

    backend = Prefill()
    assert load(backend).generate(PROMPTS[0], draft="mtp", **LONG).stats["graph_steps"] > 0


@pytest.mark.parametrize("options", [{"check": True}, {"graphs": False}, {"check": True, "graphs": True}])
def test_a_checked_model_and_one_without_graphs_capture_nothing(options: dict[str, Any]) -> None:
    backend = Replaying()
    model = load(backend, **options)
    assert model.generate(PROMPTS[0], max_new_tokens=3, ignore_eos=True).stats["graph_steps"] == 0
    assert backend.captured == 0
    notes = [n for n in model.placement().notes if "without graphs" in n]
    assert len(notes) == (1 if options.get("graphs") else 0)


def test_a_backend_without_graphs_is_noted_only_for_who_asked(eager: Any) -> None:
    model = load(Made(name="plain"), graphs=True)
    model.generate(PROMPTS[0], max_new_tokens=3)
    assert model.placement().notes == ["decode runs without graphs: backend 'plain' captures no graphs"]
    assert not [n for n in eager.placement().notes if "graph" in n]


def test_a_cache_that_grows_keeps_what_it_holds_and_forgets_its_graphs(eager: Any) -> None:
    for kv in ("float32", "fp8"):
        cache = BatchCache(eager.config, 1, CacheSpec(64, kv), torch.float32, torch.device("cpu"), [100, 10])
        assert cache.total == 3 and cache.pages == {0: [0, 1], 1: [2]}
        before = cache.layers[0]
        for plane in (before.ckv, before.kpe, before.scale):
            if plane is not None:
                plane.view(torch.uint8).copy_(torch.randint(0, 255, plane.view(torch.uint8).shape, dtype=torch.uint8))
        cache.captured[Size(1, 1, 256)] = object()
        cache.grow(7)
        assert cache.total == 7 and not cache.captured
        for name in ("ckv", "kpe", "scale"):
            old, new = getattr(before, name), getattr(cache.layers[0], name)
            assert old is None or (new.shape[0] == 7 and torch.equal(new[:3].view(torch.uint8), old.view(torch.uint8)))
