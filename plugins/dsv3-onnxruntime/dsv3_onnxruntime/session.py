"""Models are built and compiled once, kept, and run on torch's memory without copies.

A model is kept by operator, static attributes, dtypes of its tensors, provider, and number of threads; all dimensions are
dynamic. Threads: `torch.get_num_threads()` at the time of the call, so that `torch.set_num_threads` and dsv3's option hold here
too; another number makes another set of sessions.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import onnxruntime
import torch
from onnx import TensorProto
from torch import Tensor

from dsv3_onnxruntime.graph import Graph
from dsv3_onnxruntime.providers import PROVIDERS, Provider

ELEMENT = {
    torch.float32: TensorProto.FLOAT,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float8_e4m3fn: TensorProto.FLOAT8E4M3FN,
    torch.float8_e4m3fnuz: TensorProto.FLOAT8E4M3FNUZ,
    torch.float8_e5m2: TensorProto.FLOAT8E5M2,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
}
Build = Callable[..., None]
_sessions: dict[Hashable, onnxruntime.InferenceSession] = {}
_making = threading.Lock()
_HOST = ("cpu", 0)
# ONNX Runtime refuses null pointers, which is what tensors without elements have.
_SOMEWHERE = torch.zeros(1, dtype=torch.int64)


def run(
    op: str,
    build: Build,
    inputs: Mapping[str, Tensor | None],
    outputs: Mapping[str, Tensor],
    provider: str = "cpu",
    **static: Hashable,
) -> None:
    """Fill the output tensors, which must be contiguous, from the inputs (None: absent; strided ones are copied).

    build(graph, **static) writes the model the first time. Nothing happens if no output has elements.
    """
    if not any(t.numel() for t in outputs.values()):
        return
    where = PROVIDERS[provider]
    key = (
        op, provider, torch.get_num_threads(), *static.values(),
        *[t if t is None else t.dtype for t in inputs.values()], *[t.dtype for t in outputs.values()],
    )  # fmt: skip
    given = {name: _bindable(t, where) for name, t in inputs.items() if t is not None}
    taken = {name: _writable(t, where) for name, t in outputs.items()}
    session = _sessions.get(key) or _make(key, op, build, given, taken, where, static)
    binding = session.io_binding()
    for name, t in given.items():
        binding.bind_input(name, *_place(t, where), ELEMENT[t.dtype], t.shape, t.data_ptr() or _SOMEWHERE.data_ptr())
    for name, t in taken.items():
        binding.bind_output(name, *_place(t, where), ELEMENT[t.dtype], t.shape, t.data_ptr() or _SOMEWHERE.data_ptr())
    if all(t.is_cpu for t in taken.values()):
        session.run_with_iobinding(binding)
    else:  # torch's queue and the session's own do not wait for each other
        torch.accelerator.synchronize()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
    for name, t in outputs.items():
        if taken[name] is not t:
            t.copy_(taken[name])


def sessions() -> list[onnxruntime.InferenceSession]:
    """All sessions made so far in this process."""
    return list(_sessions.values())


def _bindable(t: Tensor, where: Provider) -> Tensor:
    if t.dtype not in ELEMENT:
        raise TypeError(f"backend 'onnxruntime' has no element type for {t.dtype}")
    return t.contiguous() if where.memory or t.is_cpu else t.cpu().contiguous()


def _writable(t: Tensor, where: Provider) -> Tensor:
    assert t.is_contiguous() and t.dtype in ELEMENT
    return t if where.memory or t.is_cpu else torch.empty(t.shape, dtype=t.dtype)


def _place(t: Tensor, where: Provider) -> tuple[str, int]:
    return _HOST if t.is_cpu else (where.memory or "cpu", t.device.index or 0)


def _make(
    key: Hashable,
    op: str,
    build: Build,
    inputs: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    where: Provider,
    static: Mapping[str, Hashable],
) -> onnxruntime.InferenceSession:
    with _making:
        if key not in _sessions:
            graph = Graph(
                {name: (ELEMENT[t.dtype], t.dim()) for name, t in inputs.items()},
                {name: ELEMENT[t.dtype] for name, t in outputs.items()},
            )
            build(graph, **static)
            _sessions[key] = _compile(graph.model(op), where, torch.get_num_threads())
    return _sessions[key]


@functools.cache
def _share_memory() -> None:
    """One arena for all sessions: else each would keep the most that it ever needed, such as a whole weight in float32.

    Registering it twice, here and in the program around, gives one arena all the same.
    """
    arena = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    info = onnxruntime.OrtMemoryInfo("Cpu", arena, 0, onnxruntime.OrtMemType.DEFAULT)
    onnxruntime.create_and_register_allocator(info, None)


def _compile(model: bytes, where: Provider, threads: int) -> onnxruntime.InferenceSession:
    _share_memory()
    options: Any = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # The rewrites beyond the basic ones put approximations of their own in the place of what is written.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    # torch computes on the same cores between two calls: a pool that spins would take them away from it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    chosen: list[Any] = [(where.provider, dict(where.options))]
    if where.provider != "CPUExecutionProvider":
        chosen.append("CPUExecutionProvider")
    return onnxruntime.InferenceSession(model, options, providers=chosen)
