"""Level 3: what serving relies on. The same bits every time, no trace of others, no growing memory, graphs that replay."""

from __future__ import annotations

import gc
import math
import resource
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsv3.budget.tensors import raw_bytes
from dsv3.conformance.case import nan_
from dsv3.conformance.data import Data
from dsv3.conformance.model import FACTOR, Answer, Check, Formats, Runs, _bound, compare, formats_of
from dsv3.conformance.result import Size
from dsv3.engine.cache import BatchCache, Run
from dsv3.plugin import Kernel

if TYPE_CHECKING:
    from dsv3.engine.model import Model

_REPEATS = 20
_MEMORY_STEPS = 40
_TENSOR_SLACK = 64  # tensors that may be left after them: less than one per step
_MEMORY_SLACK = 48 << 20  # bytes that the process may grow by after it has warmed up


def bound_kernels(model: Model) -> list[Kernel]:
    """The kernels that the model runs on."""
    return list({id(d.kernel.kernel): d.kernel.kernel for _, _, d in model.placement().decisions() if d.kernel}.values())


def _lacking(model: Model, claim: str) -> str:
    """ "" if all kernels claim it, else who does not."""
    others = sorted({k.op for k in bound_kernels(model) if not getattr(k, claim)})
    return f"not claimed by the kernels for {', '.join(others)}" if others else ""


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(raw_bytes(a), raw_bytes(b))


def _determinism(r: Runs) -> Answer:
    if why := _lacking(r.model, "deterministic"):
        return why
    first = {absorbed: r.model.logits(r.ids[:24], absorbed=absorbed, chunk=9) for absorbed in (False, True)}
    for i in range(_REPEATS):
        for absorbed, logits in first.items():
            if not _same(r.model.logits(r.ids[:24], absorbed=absorbed, chunk=9), logits):
                return math.inf, 0.0, f"run {i + 2} gave other bits ({'absorbed' if absorbed else 'naive'} path)"
    return 0.0, 0.0, ""


def _last_rows(model: Model, prompts: list[list[int]]) -> list[Tensor]:
    """Logits of the last token of each prompt: all but one token prefilled together, the last in one decode step."""
    cache = model.new_cache([len(p) + 1 for p in prompts])
    model.forward(cache, [Run(i, p[:-1], 0) for i, p in enumerate(prompts)], False)
    hidden, _ = model.forward(cache, [Run(i, p[-1:], len(p) - 1) for i, p in enumerate(prompts)], True)
    return list(model.head(hidden).to("cpu", torch.float64))


def _prompts(r: Runs) -> list[list[int]]:
    return [r.ids[:9], r.ids[5:60], r.ids[30:32], r.ids[40:73]]


def _invariance(r: Runs) -> Answer:
    if why := _lacking(r.model, "batch_invariant"):
        return why
    prompts = _prompts(r)
    together = _last_rows(r.model, prompts)
    for prompt, row in zip(prompts, together, strict=True):
        if not _same(_last_rows(r.model, [prompt])[0], row):
            return math.inf, 0.0, f"a prompt of {len(prompt)} tokens gave other bits in a batch than alone"
    return 0.0, 0.0, ""


def _neighbours(r: Runs) -> Answer:
    """Who else is in the batch changes nothing beyond rounding."""
    prompts = _prompts(r)
    truth = torch.stack([r.exact.logits(p)[-1] for p in prompts])
    found, plain = (torch.stack(_last_rows(m, prompts)) for m in (r.model, r.plain))
    return compare(found, plain, truth, r.floor)


@torch.inference_mode()
def poison(cache: BatchCache) -> None:
    """NaN in every plane."""
    for layer in cache.layers:
        for plane in (layer.ckv, layer.kpe, layer.scale):
            if plane is not None:
                nan_(plane)


def _nan_tail(r: Runs) -> Answer:
    """A cache full of NaN where nothing was written: no trace of it in any logit."""
    model, ids = r.model, r.ids[:50]
    cache = model.new_cache([len(ids) + 1, 200])
    poison(cache)
    first, _ = model.forward(cache, [Run(0, ids[:-3], 0), Run(1, ids[:5], 0)], False)
    last, _ = model.forward(cache, [Run(0, ids[-3:], len(ids) - 3), Run(1, ids[5:6], 5)], True)
    rows = torch.cat([model.head(first), model.head(last)]).to("cpu")
    if bool(torch.isnan(rows).any()):
        return (
            math.inf,
            0.0,
            f"{int(torch.isnan(rows).any(-1).sum())} rows of logits are NaN: cache that was never written was read",
        )
    return 0.0, 0.0, ""


def _long(r: Runs) -> Answer:
    """Many pages, and positions far past the original context."""
    ids = Data("long", 0).integers("ids", 2, 256, 700).tolist()
    found, plain, truth = (m.logits(ids, chunk=256)[-60:] for m in (r.model, r.plain, r.exact))
    margin, nmse, message = compare(found, plain, truth, r.floor)
    return margin, nmse, message


def _used(device: torch.device) -> int:
    """Bytes in use on the device; on the CPU the process's peak."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(torch.accelerator.memory_allocated(device))


def _alive() -> int:
    """Tensors that this process holds. The model is so small that bytes alone would not show what every step leaves behind."""
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def _memory(r: Runs) -> Answer:
    model = r.model
    options: dict[str, Any] = {"max_new_tokens": _MEMORY_STEPS, "ignore_eos": True}
    for _ in range(2):
        model.generate(r.ids[:20], **options)
    before, tensors = _used(model.device), _alive()
    for _ in range(4):
        model.generate(r.ids[:20], **options)
    more, grown = _alive() - tensors, _used(model.device) - before
    if more > _TENSOR_SLACK:
        return more / _TENSOR_SLACK, 0.0, f"{4 * _MEMORY_STEPS} decode steps left {more} tensors behind"
    if grown > _MEMORY_SLACK:
        return grown / _MEMORY_SLACK, 0.0, f"{4 * _MEMORY_STEPS} decode steps grew memory by {grown >> 20} MiB"
    return max(grown, 0) / _MEMORY_SLACK, 0.0, ""


def _graph(r: Runs) -> Answer:
    """A captured decode step replayed on new data in its buffers gives what the step itself gives."""
    model, target = r.model, r.target
    if others := model.graphs.obstacles(1):
        return f"not graph-safe: {', '.join(others)}"
    cache = model.new_cache([64])
    model.forward(cache, [Run(0, r.ids[:20], 0)], False)
    steps = [cache.step([Run(0, [r.ids[20 + i]], 20 + i)], model.placement().binding.bucket, True) for i in range(3)]
    static = cache.step([Run(0, [r.ids[20]], 20)], model.placement().binding.bucket, True)
    static.max_k = 64  # of any step that will be replayed
    out: list[Tensor] = []

    def run() -> None:
        hidden, _ = model.graph.forward(static, cache.layers)
        out[:] = [model.head(hidden)]

    with torch.inference_mode():
        run()
        replay = target.source.backend.capture(run, target.source.device)
        if replay is None:
            return "the backend captures no graphs"
        expected = [model.head(model.graph.forward(step, cache.layers)[0]).clone() for step in steps]
        for at, step in enumerate(steps):
            for name in ("ids", "positions", "slots", "block_table", "seq_lens", "cu_q", "cu_k"):
                getattr(static, name).copy_(getattr(step, name))
            replay()
            target.synchronize()
            error = float((out[0].double() - expected[at].double()).norm() / expected[at].double().norm())
            if not error <= FACTOR * 2e-3:
                return math.inf, 0.0, f"replay {at}: logits are off by {error:.3g} from the step run eagerly"
    return 0.0, 0.0, ""


def _host_sync(r: Runs) -> Answer:
    """A decode step does not wait for the device: only CUDA and ROCm builds of torch can watch for that."""
    if r.model.device.type != "cuda":
        return f"torch cannot watch for synchronisation on {r.model.device.type}"
    if why := _lacking(r.model, "graph_safe"):
        return why
    cache = r.model.new_cache([64])
    r.model.forward(cache, [Run(0, r.ids[:20], 0)], False)
    bucket = r.model.placement().binding.bucket
    steps = [cache.step([Run(0, [r.ids[20 + i]], 20 + i)], bucket, True) for i in range(2)]
    with torch.inference_mode():
        r.model.graph.forward(steps[0], cache.layers)  # whatever compiles at the first call may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            r.model.graph.forward(steps[1], cache.layers)
        except RuntimeError as error:
            return math.inf, 0.0, f"a decode step waits for the device: {error}"
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return 0.0, 0.0, ""


CHECKS: tuple[tuple[str, Callable[[Runs], Answer]], ...] = (
    ("determinism", _determinism),
    ("batch-invariance", _invariance),
    ("neighbours", _neighbours),
    ("nan-tail", _nan_tail),
    ("long-context", _long),
    ("memory", _memory),
    ("graph-replay", _graph),
    ("host-sync", _host_sync),
)


def _formats(size: Size) -> list[Formats]:
    """Fewer than at level 2: one per activation dtype, and the FP8 cache."""
    return [f for f in formats_of(size) if f.name in ("f32", "bf16-fp8", "f32-kv8")]


def serving_cases(size: Size) -> Iterable[tuple[str, Check]]:
    """(id, check) of level 3."""
    return [(f"l3/{f.name}/{name}", _bound(f, check)) for f in _formats(size) for name, check in CHECKS]


def serving_ids(size: Size) -> list[str]:
    """The ids of level 3."""
    return [case for case, _ in serving_cases(size)]
