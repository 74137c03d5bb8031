"""The backends for NVIDIA and AMD: what stands in the way, what they emulate, and that looking costs nothing."""

import subprocess
import sys

import pytest
import torch

import dsv3
from dsv3.errors import BackendUnavailable
from dsv3.plugin import Device
from dsv3_cuda import driver as cuda_driver
from dsv3_rocm import driver as rocm_driver
from dsv3_triton import requirements
from dsv3_triton.facts import ARCHITECTURES, of_vendor


def _bus(tmp_path, vendor, kind="0x030200"):
    device = tmp_path / "0000:17:00.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(vendor + "\n")
    (device / "class").write_text(kind + "\n")
    return tmp_path


@pytest.fixture
def nothing(monkeypatch, tmp_path):
    """A machine without GPUs, whatever this one has."""
    for driver in (cuda_driver, rocm_driver):
        monkeypatch.setattr(driver, "_PCI", tmp_path / "empty")
    monkeypatch.setattr(cuda_driver, "_DRIVER_VERSION", tmp_path / "no")
    monkeypatch.setattr(rocm_driver, "_KFD", tmp_path / "no")


def _raising(*args):
    raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version\nmore")


CAUSES = {
    "cuda": (cuda_driver, "0x10de", "cuda", "without CUDA", "nvidia-smi", "CUDA_VISIBLE_DEVICES"),
    "rocm": (rocm_driver, "0x1002", "hip", "without ROCm", "rocminfo", "HIP_VISIBLE_DEVICES"),
}


@pytest.mark.parametrize("name", CAUSES)
def test_each_cause_has_its_own_message_and_remedy(name, nothing, monkeypatch, tmp_path):
    driver, vendor, version, without, tool, variable = CAUSES[name]
    answers = [driver.absence()]
    monkeypatch.setattr(driver, "_PCI", _bus(tmp_path / "pci", vendor))
    monkeypatch.setattr(torch.version, version, None)
    answers.append(driver.absence())
    monkeypatch.setattr(torch.version, version, "12.8")
    if name == "rocm":
        answers.append(driver.absence())
        assert "/dev/kfd is missing" in answers[-1].detail and answers[-1].state == "driver"
        (tmp_path / "kfd").touch()
        monkeypatch.setattr(driver, "_KFD", tmp_path / "kfd")
    monkeypatch.setattr(torch.cuda, "init", _raising)
    answers.append(driver.absence())
    assert answers[-1].state == "driver" and "insufficient" in answers[-1].detail and tool in answers[-1].remedy
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    answers.append(driver.absence())
    assert variable in answers[-1].remedy
    assert answers[0].state == "no-device" and "--emulate" in answers[0].remedy
    assert answers[1].state == "incompatible" and without in answers[1].detail
    assert len({a.detail for a in answers}) == len({a.remedy for a in answers}) == len(answers)


def test_a_card_of_another_maker_or_kind_is_not_ours(nothing, monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_driver, "_PCI", _bus(tmp_path / "a", "0x1002"))
    assert cuda_driver.absence().state == "no-device"
    monkeypatch.setattr(cuda_driver, "_PCI", _bus(tmp_path / "b", "0x10de", kind="0x040300"))  # its sound device
    assert cuda_driver.absence().state == "no-device"


@pytest.mark.parametrize(
    "name, arch, word",
    [
        ("cuda", "sm_75", "too old"),
        ("cuda", "sm_130", "not built for"),
        ("rocm", "gfx906", "too old"),
        ("rocm", "gfx1100", "not built for"),
    ],
)
def test_a_device_that_is_not_known_is_refused_by_architecture(name, arch, word):
    backend = _backend(name)
    answer = backend.probe(Device(name, arch, name="Some card"))
    assert answer.state == "incompatible" and arch in answer.detail and word in answer.detail and answer.remedy


def _backend(name):
    if name == "cuda":
        from dsv3_cuda import backend
    else:
        from dsv3_rocm import backend
    return backend


@pytest.mark.parametrize("name, arch", [("cuda", a) for a in of_vendor("nvidia")] + [("rocm", a) for a in of_vendor("amd")])
def test_every_architecture_says_what_it_has(name, arch):
    device = _backend(name).devices(emulate=arch)[0]
    answer = _backend(name).probe(device)
    assert device.emulated and answer.state == "usable"
    has = ARCHITECTURES[arch].fp8
    assert ("fp8_mma" in answer.capability.features) == bool(has)
    assert answer.capability.limits["shared_memory"] >= 64 * 1024
    assert {d for d in answer.capability.dtypes if d.startswith("float8")} == ({has} if has else set())


def test_triton_missing_or_too_old_is_said_with_the_remedy(monkeypatch):
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: None)
    answer = _backend("cuda").probe(Device("cuda", "sm_90", emulated=True))
    assert answer.state == "incompatible" and "triton is not installed" in answer.detail and "triton>=3.6" in answer.remedy
    monkeypatch.undo()
    monkeypatch.setattr(requirements, "_version", lambda: "3.5.1")
    assert "3.5.1 is too old" in _backend("rocm").probe(Device("rocm", "gfx942", emulated=True)).detail


@pytest.mark.parametrize("name", ["cuda", "rocm"])
def test_no_device_and_no_emulation_is_an_error_that_says_what_to_do(name, nothing):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(BackendUnavailable, match="--emulate") as caught:
        dsv3.load("demo", backend=name)
    assert caught.value.exit_code == 3


def test_unknown_architectures_are_answered_with_the_known():
    with pytest.raises(BackendUnavailable, match=r"does not emulate 'sm_75'.*sm_80"):
        dsv3.load("demo", backend="cuda", emulate="sm_75")


def test_listing_kernels_imports_neither_torch_nor_triton():
    code = (
        "import sys; from dsv3_cuda import backend as c; from dsv3_rocm import backend as r\n"
        "for b in (c, r):\n"
        "    for arch in ('sm_90', 'sm_80') if b is c else ('gfx942', 'gfx90a'):\n"
        "        d = b.devices(emulate=arch)[0]; b.probe(d); assert list(b.kernels(d))\n"
        "print(sorted({'torch', 'triton', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
