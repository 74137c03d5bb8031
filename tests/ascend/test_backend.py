"""The backend for Ascend: what stands in the way of a device, which SoC it knows, weights, the emulated story."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import dsv3
from dsv3.budget.units import BF16_OPERAND
from dsv3.conformance.model import same_text
from dsv3.errors import BackendUnavailable
from dsv3.plugin import Device, Prepared
from dsv3.quant import quantize
from dsv3_ascend import backend, cpu, driver, int8, layouts, npu
from dsv3_ascend.soc import ARCHITECTURES, arch_of


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine without NPUs, whatever this one has; its parts can be added."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "pci").mkdir()
    monkeypatch.setattr(driver, "_NODES", tmp_path / "dev")
    monkeypatch.setattr(driver, "_PCI", tmp_path / "pci")
    monkeypatch.setattr(driver.importlib.util, "find_spec", lambda name: None)

    def plug(vendor="0x19e5", kind="0x120000"):
        card = tmp_path / "pci" / "0000:c1:00.0"
        card.mkdir(exist_ok=True)
        (card / "vendor").write_text(vendor + "\n")
        (card / "class").write_text(kind + "\n")

    def module(**npu_members):
        monkeypatch.setattr(driver.importlib.util, "find_spec", lambda name: object())
        monkeypatch.setattr(driver, "torch_npu", lambda: SimpleNamespace(npu=SimpleNamespace(**npu_members)))

    def broken(error):
        def fail(*arguments):
            raise error

        return fail

    return SimpleNamespace(
        plug=plug,
        load_driver=lambda: (tmp_path / "dev" / "davinci0").touch(),
        install=lambda: monkeypatch.setattr(driver.importlib.util, "find_spec", lambda name: object()),
        import_fails=lambda error: monkeypatch.setattr(driver, "torch_npu", broken(error)),
        module=module,
        broken=broken,
    )


def test_each_cause_has_its_own_message_and_remedy(machine):
    answers = [driver.absence()]
    machine.plug()
    answers.append(driver.absence())
    machine.load_driver()
    answers.append(driver.absence())
    machine.install()
    for error in (
        ImportError("libhccl.so: cannot open shared object file: No such file or directory"),
        ImportError("libtorch_npu.so: undefined symbol: _ZN2at"),
        RuntimeError("something else"),
    ):
        machine.import_fails(error)
        answers.append(driver.absence())
    machine.module(init=machine.broken(RuntimeError("drvGetPlatformInfo failed\nmore")), device_count=lambda: 0)
    answers.append(driver.absence())
    machine.module(init=lambda: None, device_count=lambda: 0)
    answers.append(driver.absence())
    states = ["no-device", "driver", "incompatible", "driver", "incompatible", "error", "driver", "no-device"]
    assert [a.state for a in answers] == states
    words = [
        "no Ascend NPU",
        "davinci0",
        "not installed",
        "CANN is missing",
        "another torch",
        "something else",
        "drvGet",
        "no NPU",
    ]
    for answer, word in zip(answers, words, strict=True):
        assert word in answer.detail and answer.remedy
    assert len({a.detail for a in answers}) == len({a.remedy for a in answers}) == len(answers)
    assert "--emulate" in answers[0].remedy and "set_env.sh" in answers[3].remedy and "npu-smi" in answers[6].remedy


def test_a_card_of_another_maker_or_kind_is_not_ours(machine):
    machine.plug(vendor="0x10de", kind="0x030200")
    assert driver.absence().state == "no-device"
    machine.plug(kind="0x020000")  # its network card
    assert driver.absence().state == "no-device"


def test_devices_are_what_torch_npu_sees(machine):
    assert driver.devices() == []
    assert backend.devices()[0].arch == "none"
    properties = SimpleNamespace(total_memory=64 << 30)
    machine.module(
        is_available=lambda: True, device_count=lambda: 2, get_device_name=lambda i: ("Ascend910B3", "Ascend999X")[i],
        get_device_properties=lambda i: properties, utils=SimpleNamespace(get_cann_version=lambda: "8.5.0"),
    )  # fmt: skip
    known, unknown = backend.devices()
    assert known == Device("npu", "910b", 0, "Ascend910B3", 64 << 30, "CANN 8.5.0")
    assert backend.probe(known).state == "usable" and list(backend.kernels(known))
    answer = backend.probe(unknown)
    assert answer.state == "error" and "Ascend999X" in answer.detail and answer.remedy and not list(backend.kernels(unknown))


@pytest.mark.parametrize(
    "soc, arch",
    [
        *((f"Ascend910B{n}", "910b") for n in ("1", "2", "2C", "3", "4", "4-1")),
        *((f"Ascend910_{n}", "910c") for n in ("9391", "9392", "9381", "9382", "9372", "9362")),
        ("Ascend950", "950"), ("Ascend950PR_9599", "950"), ("Ascend910_9599", "950"),
        ("Ascend910B", None), ("Ascend910", None), ("Ascend910B5", None), ("Ascend310P3", None), ("", None),
    ],
)  # fmt: skip
def test_soc_names_are_known_whole(soc, arch):
    assert arch_of(soc) == arch


@pytest.mark.parametrize("soc", ["Ascend910B", "Ascend910A", "Ascend310P3"])
def test_chips_without_bfloat16_are_refused_by_name(soc):
    answer = backend.probe(Device("npu", soc, name=soc))
    assert answer.state == "incompatible" and soc in answer.detail and "bfloat16" in answer.detail


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_architecture_has_fp8_blocks_or_float64(arch):
    device = backend.devices(emulate=arch)[0]
    capability = backend.probe(device).capability
    assert device.emulated and device.arch == arch
    assert "fp8_mma" not in capability.features and capability.dtypes == {"bfloat16", "float32", "int8"}


def test_unknown_architectures_are_answered_with_the_known():
    with pytest.raises(BackendUnavailable, match=r"does not emulate '910a'.*910b"):
        dsv3.load("demo", backend="ascend", emulate="910a")


def test_no_device_and_no_emulation_is_an_error_that_says_what_to_do(machine):
    with pytest.raises(BackendUnavailable, match="--emulate") as caught:
        dsv3.load("demo", backend="ascend")
    assert caught.value.exit_code == 3


def test_listing_kernels_imports_no_torch():
    code = (
        "import sys; from dsv3_ascend import backend as b\n"
        "d = b.devices(emulate='default')[0]; b.probe(d); assert list(b.kernels(d)) and d.arch == '910b'\n"
        "print(sorted({'torch', 'torch_npu', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_950_says_why_it_gets_no_kernel():
    placement = dsv3.load("demo", backend="ascend", emulate="950").placement()
    assert "needs architecture 910b or 910c; the device is 950" in str(placement.to_json())
    assert placement.fallbacks()


def test_the_910c_gets_what_the_910b_gets():
    devices = [backend.devices(emulate=arch)[0] for arch in ("910b", "910c")]
    one, other = (list(backend.kernels(device)) for device in devices)
    assert one == other and all(kernel.needs[0].allowed == ("910b", "910c") for kernel in one)


# -- weights


def _prepared(quant, *shape):
    torch.manual_seed(3)
    made = [quantize(torch.randn(shape[-2:]), quant) for _ in range(shape[0] if len(shape) == 3 else 1)]
    tensors = {n: torch.stack([m[n] for m in made]) if len(shape) == 3 else made[0][n] for n in made[0]}
    return Prepared("canonical", quant, shape, tensors)


@pytest.mark.parametrize(
    "layout, quant, shape",
    [
        ("nz", "int8-w8a8", (72, 130)),
        ("nz", "int8-w8a8", (3, 40, 64)),
        ("int4", "int4-w4a16", (72, 256)),
        ("int4", "int4-w4a16", (8, 128)),
    ],
)
def test_unprepare_is_exact(layout, quant, shape):
    weight = _prepared(quant, *shape)
    before = {n: t.clone() for n, t in weight.tensors.items()}
    prepared = backend.prepare(weight, layout, backend.devices("default")[0])
    assert prepared.layout == layout and prepared.shape == shape
    if layout == "nz":
        assert prepared.tensors["weight"].shape == (*shape[:-2], shape[-1], shape[-2])
        assert torch.equal(prepared.tensors["weight"], weight.tensors["weight"].transpose(-1, -2))
    back = backend.unprepare(prepared)
    assert back.layout == "canonical" and set(back.tensors) == set(before)
    for name, tensor in before.items():
        assert torch.equal(back.tensors[name], tensor) and torch.equal(weight.tensors[name], tensor)
        assert back.tensors[name].is_contiguous()


def test_int4_codes_come_back_from_any_order_of_eight(monkeypatch):
    """The vendor does not say which nibble is which; what is not eight neighbours is refused."""
    weight = _prepared("int4-w4a16", 16, 128)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def interleaved(codes):
        return natural(codes.view(*codes.shape[:-1], -1, 8)[..., order].flatten(-2))

    natural = cpu.int4_pack
    monkeypatch.setattr(cpu, "int4_pack", interleaved)
    prepared = layouts.to_int4(weight, True)
    assert torch.equal(layouts.from_int4(prepared).tensors["weight"], weight.tensors["weight"])
    monkeypatch.setattr(cpu, "int4_pack", lambda codes: natural(codes.roll(1, dims=-1)))
    with pytest.raises(ValueError, match="cannot be undone"):
        layouts.from_int4(layouts.to_int4(weight, True))


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="fnuz"):
        backend.prepare(_prepared("int8-w8a8", 8, 8), "fnuz", backend.devices("default")[0])


def test_a_real_npu_gets_fractal_nz(monkeypatch):
    """Which format is asked for, and that the way back asks for ND: the vendor's cast is recorded, not run."""
    asked = []
    cast = SimpleNamespace(npu_format_cast=lambda t, fmt: asked.append((tuple(t.shape), fmt)) or t)
    monkeypatch.setattr(npu.torch, "ops", SimpleNamespace(npu=cast))
    prepared = layouts.to_nz(_prepared("int8-w8a8", 72, 130), emulated=False)
    monkeypatch.setattr(layouts.vendor, "of", lambda t: npu)
    layouts.from_nz(prepared)
    assert asked == [((130, 72), 29), ((130, 72), 2)]


# -- exact sums


@pytest.mark.parametrize("t, k, n", [(1, 5, 3), (3, 1, 1), (7, 1023, 33), (2, 1025, 8), (1, 7168, 4), (5, 18432, 3), (0, 8, 8)])
@pytest.mark.parametrize("path", [int8.product, int8.product_in_slabs, torch._int_mm])
def test_int8_sums_are_exact(path, t, k, n):
    torch.manual_seed(k)
    a, b = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((t, k), (k, n)))
    for x, w in ((a, b), (a.abs().fill_(127), b.abs().fill_(127)), (a.fill_(-128), b.fill_(-128))):
        found = path(x, w.t().contiguous().t())
        assert found.dtype == torch.int32
        assert torch.equal(found.to(torch.int64), x.to(torch.int64) @ w.to(torch.int64))


def test_w8a8_is_the_references_bit_for_bit():
    from dsv3.ops import spec
    from dsv3_ascend.products import quant_linear_w8a8

    weight = _prepared("int8-w8a8", 72, 1100)
    x = torch.randn(9, 1100).mul_(torch.logspace(-14, 4, 9)[:, None]).to(torch.bfloat16)
    x[3], x[4, 7] = 0, 1e4
    device = backend.devices("default")[0]
    found = quant_linear_w8a8(x=x, w=backend.prepare(weight, "nz", device))
    assert torch.equal(found, spec("quant_linear").reference(x=x, w=weight))


# -- a whole model


def _story(backend_name, quant, **how):
    model = dsv3.load("demo", backend=backend_name, quant=quant, **how)
    return model.generate("Once upon a time", max_new_tokens=40, ignore_eos=True), model


@pytest.mark.parametrize("quant", ["int8-w8a8", "int8-w8a16"])
def test_the_emulated_story_is_the_references(quant):
    """Token for token with INT8 activations; else up to a place where two tokens are as good as equal."""
    ours, model = _story("ascend", quant, emulate=True, strict=True)
    theirs, plain = _story("reference", quant)
    assert "little girl" in ours.text and len(ours.ids) == 40
    if quant == "int8-w8a8":
        assert ours.ids == theirs.ids
    prompt = model.tokenizer.encode("Once upon a time")
    answer = same_text(plain, prompt, theirs.ids, ours.ids, BF16_OPERAND, "emulated")
    assert answer[2] == "", answer[2]
    chosen = model.placement().to_json()["ops"]
    assert chosen["quant_linear"]["chosen"] == f"ascend.{quant}" and model.placement().fallbacks() == []
    assert "emulated" in model.placement().summary


def test_an_fp8_checkpoint_runs_dequantised():
    model = dsv3.load("demo", backend="ascend", emulate=True)
    assert model.placement().quant == "fp8-w8a16"
    assert model.generate("Once upon a time", max_new_tokens=12, ignore_eos=True).text.startswith(" there was a little girl")


def test_drafts_tell_the_same_story():
    model = dsv3.load("demo", backend="ascend", emulate="910c", quant="int8-w8a8")
    plain, drafted = (model.generate("One day", max_new_tokens=24, ignore_eos=True, draft=d) for d in (None, "mtp"))
    assert drafted.ids == plain.ids and drafted.stats["accepted"] > 0
