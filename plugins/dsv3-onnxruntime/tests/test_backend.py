"""The backend itself: what it lists, what its probe answers, how sessions are kept and memory is used."""

import importlib.util
import inspect
import subprocess
import sys
import threading
from types import SimpleNamespace

import onnxruntime
import pytest
import torch
from budgets import draw, prepared
from dsv3_onnxruntime import backend, elsewhere, kernels, providers, session

from dsv3 import ops
from dsv3.plugin import Device

CPU = next(d for d in backend.devices() if (d.family, d.index) == ("cpu", 0))


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, dsv3_onnxruntime as p; print([m for m in ('torch', 'onnx', 'onnxruntime', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_cpu_is_usable_and_nothing_is_emulated() -> None:
    answer = backend.probe(CPU)
    assert answer.state == "usable" and answer.capability and answer.capability.dtypes == {"float32", "bfloat16"}
    assert backend.devices(emulate="default") == []
    assert backend.torch_device(CPU) == torch.device("cpu")


def test_every_kernel_has_a_target_with_the_operators_arguments() -> None:
    listed = list(backend.kernels(CPU))
    assert sorted(k.op for k in listed) == sorted(kernels.__all__)
    for kernel in listed:
        module, _, name = kernel.target.partition(":")
        function = getattr(sys.modules[module], name)
        inspect.signature(function).bind(**dict.fromkeys(ops.spec(kernel.op).parameters))
        assert function is getattr(kernels, kernel.op)


def test_each_provider_is_a_device_with_kernels_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {p.provider for p in providers.PROVIDERS.values()}
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [*rows, "AzureExecutionProvider"])
    monkeypatch.setattr(providers, "_openvino_devices", lambda: ["CPU", "GPU", "NPU"])
    found = backend.devices()
    assert len({(d.family, d.index) for d in found}) == len(found) == len(providers.PROVIDERS)
    assert [providers.provider_of(d).key for d in found] == list(providers.PROVIDERS)
    for device in found:
        key = providers.provider_of(device).key
        targets = [k.target for k in backend.kernels(device)]
        claimed = providers.PROVIDERS[key].ops or set(kernels.__all__)
        assert len(targets) == len(claimed) and claimed <= set(kernels.__all__)
        assert key == "cpu" or all(t.startswith("dsv3_onnxruntime.elsewhere:") and t.endswith(f"__{key}") for t in targets)
        answer = backend.probe(device)
        assert answer.state in ("usable", "no-device", "driver", "incompatible")
        assert (answer.capability is not None) == (answer.state == "usable") and (answer.remedy or answer.capability)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a torch without an accelerator")
def test_probe_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Device("cuda", "ort-cuda")
    answer = backend.probe(cuda)
    assert answer.state == "incompatible" and "has no CUDAExecutionProvider" in answer.detail and answer.remedy
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert "not built for cuda" in backend.probe(cuda).detail or backend.probe(cuda).state == "no-device"
    monkeypatch.setattr(torch, "version", SimpleNamespace(cuda="13.0", hip=None))
    assert backend.probe(cuda).state == "no-device"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert backend.probe(cuda).state == "driver"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (missing,) = backend.devices()
    answer = backend.probe(missing)
    assert answer.state == "driver" and "pip install onnxruntime" in answer.remedy


def test_a_session_serves_all_shapes_of_its_dtypes() -> None:
    weight = torch.ones(8)
    kernels.rms_norm(x=draw("normal", 3, 8), weight=weight, eps=0.125)
    count = len(session.sessions())
    for t, d in ((1, 8), (70, 8), (2, 576)):
        kernels.rms_norm(x=draw("normal", t, d), weight=torch.ones(d), eps=0.125)
    assert len(session.sessions()) == count
    kernels.rms_norm(x=draw("normal", 3, 8).bfloat16(), weight=weight, eps=0.125)
    kernels.rms_norm(x=draw("normal", 3, 8), weight=weight, eps=0.25)
    assert len(session.sessions()) == count + 2


def test_sessions_follow_torchs_threads() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            kernels.silu_mul(x=draw("normal", 3, 8))
            assert session.sessions()[-1].get_session_options().intra_op_num_threads == threads
    finally:
        torch.set_num_threads(before)


def test_threads_share_a_session_and_make_it_once() -> None:
    x, w = draw("normal", 5, 200), prepared("fp8-w8a16", (100, 200))
    wanted = kernels.quant_linear(x=x, w=w)
    found: list[torch.Tensor] = []
    count = len(session.sessions())
    workers = [
        threading.Thread(target=lambda: found.extend(kernels.quant_linear(x=x, w=w) for _ in range(20))) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 80 and all(torch.equal(f, wanted) for f in found) and len(session.sessions()) == count


def test_an_earlier_output_survives_and_runs_repeat_bit_for_bit() -> None:
    w13, w2 = prepared("fp8-w8a8", (4, 256, 128)), prepared("fp8-w8a8", (4, 128, 128), seed=1)
    ids, weights = torch.tensor([[0, 3], [1, 0]]), torch.ones(2, 2)
    first = kernels.fused_experts(x=draw("normal", 2, 128), weights=weights, ids=ids, w13=w13, w2=w2)
    kept = first.clone()
    kernels.fused_experts(x=draw("normal", 2, 128, seed=5), weights=weights, ids=ids, w13=w13, w2=w2)
    assert torch.equal(first, kept)
    for _ in range(20):
        again = kernels.fused_experts(x=draw("normal", 2, 128), weights=weights, ids=ids, w13=w13, w2=w2)
        assert torch.equal(again, kept)


def test_outputs_are_written_where_torch_allocated_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy: what is bound is the memory of the inputs and of the output that is returned."""
    bound: dict[str, int] = {}
    for kind in ("input", "output"):
        original = getattr(onnxruntime.IOBinding, f"bind_{kind}")

        def watch(self, name, *rest, original=original):  # type: ignore[no-untyped-def]
            bound[name] = rest[-1]
            return original(self, name, *rest)

        monkeypatch.setattr(onnxruntime.IOBinding, f"bind_{kind}", watch)
    x, w = draw("normal", 3, 128).bfloat16(), prepared("fp8-w8a16", (64, 128))
    y = kernels.quant_linear(x=x, w=w)
    places = {"x": x, "w": w.tensors["weight"], "w_scale": w.tensors["scale"], "y": y}
    assert bound == {name: t.data_ptr() for name, t in places.items()}


def test_other_layouts_and_types_are_refused() -> None:
    w = prepared("none", (4, 8))
    with pytest.raises(ValueError, match="cannot prepare layout 'tiled'"):
        backend.prepare(w, "tiled", CPU)
    assert backend.unprepare(backend.prepare(w, "canonical", CPU)) is w
    with pytest.raises(TypeError, match="no element type"):
        kernels.silu_mul(x=torch.zeros(1, 2, dtype=torch.complex64))


def test_targets_for_other_providers_are_checked() -> None:
    assert elsewhere.rms_norm__cuda.keywords == {"provider": "cuda"}
    for name in ("rms_norm__tpu", "nothing__cuda", "rms_norm"):
        with pytest.raises(AttributeError):
            getattr(elsewhere, name)
