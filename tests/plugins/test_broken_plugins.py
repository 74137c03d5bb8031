"""A broken plugin never breaks another backend, is explained by probe, and is an error with the root cause first when
asked for."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import dsv3
from dsv3.dispatch.plugins import discover, load_plugin
from tests.support.plugins import good, write_plugin

# name -> (plugin source, what probe and the error must say)
BROKEN: dict[str, tuple[str, str]] = {
    "import_error": ("import a_module_that_is_not_there", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
    "wrapped": (
        "try:\n    import libnone\nexcept ImportError as e:\n    raise RuntimeError('plugin failed to start') from e",
        "ModuleNotFoundError: No module named 'libnone'",
    ),
    "exits": ("import sys\nsys.exit('no licence')", "SystemExit: no licence"),
    "interrupts": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "no_attribute": ("x = 1", "AttributeError"),
    "not_a_backend": ("backend = object()", "without name, version"),
    "misnamed": (good("someone_else"), "calls itself 'someone_else'"),
    "probe_raises": (
        good("probe_raises", body="def probe(self, device):\n    raise OSError('no driver')"),
        "OSError: no driver",
    ),
    "probe_exits": (good("probe_exits", body="def probe(self, device):\n    raise SystemExit(3)"), "SystemExit: 3"),
    "property_raises": (
        good("property_raises", body="@property\ndef capture(self):\n    raise RuntimeError('lazy')"),
        "RuntimeError: lazy",
    ),
    "device_text": (good("device_text", body="def devices(self, emulate=None):\n    return ['cpu']"), "'cpu', which is no"),
    "device_bytes": (
        good("device_bytes", body="def devices(self, emulate=None):\n    return [Device('x', 'y', name=b'z')]"),
        "name is b'z'",
    ),
    "device_many": (
        good("device_many", body="def devices(self, emulate=None):\n    while True:\n        yield Device('x', 'y')"),
        "more than 256 devices",
    ),
    "state_typo": (good("state_typo", body="def probe(self, d):\n    return Probe('usabel')"), "did you mean 'usable'"),
    "capability_dict": (
        good("capability_dict", body="def probe(self, d):\n    return Probe('usable', {'dtypes': []})"),
        "capability {",
    ),
    "dtypes_none": (
        good("dtypes_none", body="def probe(self, d):\n    return Probe('usable', Capability(dtypes=None))"),
        "dtypes is None",
    ),
    "detail_none": (
        good("detail_none", body="def probe(self, d):\n    return Probe('error', None, None, None)"),
        "detail is None",
    ),
    "probe_lies": (good("probe_lies", body="def probe(self, device):\n    return True"), "answered True"),
    "probe_hangs": (
        good("probe_hangs", body="def probe(self, device):\n    import time\n    time.sleep(20)"),
        "gave no answer within 2 s",
    ),
    "devices_raise": (good("devices_raise", body="def devices(self, emulate=None):\n    1 / 0"), "ZeroDivisionError"),
    "no_device": (good("no_device", body="def devices(self, emulate=None):\n    return []"), "found no device"),
}


def _kernel(name: str, arguments: str) -> str:
    # An accelerator, so that auto would choose it.
    return good(name, family="newfamily", body=f"def kernels(self, device):\n    return [Kernel({arguments})]")


# Mistakes in what is registered show when the kernels are asked for: when the backend is chosen.
MISREGISTERED: dict[str, tuple[str, str]] = {
    "unknown_op": (
        _kernel("unknown_op", "'rms_nrom', 'k', 'math:sqrt'"),
        "unknown operator 'rms_nrom'; did you mean 'rms_norm'?",
    ),
    "arity": (_kernel("arity", "'rms_norm', 'k', 'json:dumps_nothing'"), "AttributeError"),
    "signature": (_kernel("signature", "'silu_mul', 'k', 'shutil:move'"), "does not take the arguments of silu_mul"),
    "no_module": (_kernel("no_module", "'silu_mul', 'k', 'no_such_module_x:f'"), "No module named 'no_such_module_x'"),
    "bad_need": (_kernel("bad_need", "'silu_mul', 'k', 'shutil:move', needs=(Divides('Q', 8),)"), "needs dimension 'Q'"),
    "bad_layout": (_kernel("bad_layout", "'quant_linear', 'k', 'shutil:move', layouts={'x': 'y'}"), "no Prepared argument"),
    "op_none": (_kernel("op_none", "None, 'k', 'a:b'"), "op is None"),
    "target_none": (_kernel("target_none", "'silu_mul', 'k', None"), "target is None"),
    "needs_none": (_kernel("needs_none", "'silu_mul', 'k', 'a:b', needs=None"), "needs is None"),
    "priority_text": (_kernel("priority_text", "'silu_mul', 'k', 'a:b', priority='high'"), "priority is 'high'"),
    "divides_zero": (_kernel("divides_zero", "'silu_mul', 'k', 'a:b', needs=(Divides('I', 0),)"), "no positive integer"),
    "at_most_text": (_kernel("at_most_text", "'silu_mul', 'k', 'a:b', needs=(AtMost('I', '64'),)"), "no positive integer"),
    "accepts_number": (_kernel("accepts_number", "'silu_mul', 'k', 'a:b', accepts=5"), "accepts is 5"),
    "kernels_many": (
        good(
            "kernels_many",
            family="newfamily",
            body="def kernels(self, d):\n    while True:\n        yield Kernel('silu_mul', 'k', 'a:b')",
        ),
        "more than 10000 kernels",
    ),
    "torch_device_raises": (
        good(
            "torch_device_raises", family="newfamily", body="def torch_device(self, d):\n    raise OSError('no driver library')"
        ),
        "OSError: no driver library",
    ),
    "torch_device_lies": (
        good(
            "torch_device_lies",
            family="newfamily",
            body="def torch_device(self, d):\n    import torch\n    return torch.device('cuda', 0)",
        ),
        "torch_device() of backend",
    ),
    "cache_spec_none": (
        good("cache_spec_none", family="newfamily", body="def cache_spec(self, d, kv):\n    return None"),
        "no dsv3.plugin.CacheSpec",
    ),
    "page_size_zero": (
        good("page_size_zero", family="newfamily", body="def cache_spec(self, d, kv):\n    return CacheSpec(0, kv)"),
        "page_size 0",
    ),
    "encoding_unknown": (
        good("encoding_unknown", family="newfamily", body="def cache_spec(self, d, kv):\n    return CacheSpec(64, kv, 'e5m2')"),
        "encoding 'e5m2', which is none of float8_e4m3fn, float8_e4m3fnuz",
    ),
    "future": (_kernel("future", "'silu_mul', 'k', 'shutil:move', since=9"), "version 9 of silu_mul"),
    "kernels_raise": (good("kernels_raise", body="def kernels(self, device):\n    raise KeyError('x')"), "KeyError: 'x'"),
}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.syspath_prepend(str(tmp_path))

    def add(name: str, source: str, **metadata: str) -> None:
        write_plugin(tmp_path, name, source, **metadata)
        importlib.invalidate_caches()
        sys.modules.pop(metadata.get("dist", f"dsv3-{name}").replace("-", "_"), None)

    return add


@pytest.mark.parametrize("name", BROKEN)
def test_broken_plugin_is_explained_and_harms_nobody(name: str, install: Callable[..., None]) -> None:
    source, reason = BROKEN[name]
    install(name, source)
    states = {backend: (device, answer) for backend, device, answer in dsv3.probe()}
    assert states["reference"][1].state == "usable"
    assert states[name][1].state in ("error", "no-device")
    assert reason in states[name][1].detail
    with pytest.raises(dsv3.BackendUnavailable) as caught:
        dsv3.load("demo", backend=name)
    assert reason in str(caught.value)
    assert dsv3.load("demo", backend="reference").generate("Once", max_new_tokens=1).ids


@pytest.mark.parametrize("name", MISREGISTERED)
def test_bad_registration_rejects_the_plugin_with_the_reason(name: str, install: Callable[..., None]) -> None:
    source, reason = MISREGISTERED[name]
    install(name, source)
    with pytest.raises(dsv3.BackendUnavailable) as caught:
        dsv3.load("demo", backend=name)
    assert reason in str(caught.value)
    placement = dsv3.load("demo").placement()
    assert placement.backend == "cpu"
    if "newfamily" in source:
        assert any(reason in note for note in placement.notes)


def test_an_unknown_operator_is_explained_by_probe(install: Callable[..., None]) -> None:
    install("unknown_op", MISREGISTERED["unknown_op"][0])
    (answer,) = [a for n, _, a in dsv3.probe() if n == "unknown_op"]
    assert answer.state == "error"
    assert "did you mean 'rms_norm'" in answer.detail


def test_the_root_cause_comes_first(install: Callable[..., None]) -> None:
    install("wrapped", BROKEN["wrapped"][0])
    with pytest.raises(dsv3.BackendUnavailable) as caught:
        dsv3.load("demo", backend="wrapped")
    assert str(caught.value).startswith("ModuleNotFoundError: No module named 'libnone'")
    assert caught.value.__cause__ is not None


def test_wrong_abi_is_shown_without_being_imported(install: Callable[..., None]) -> None:
    install("old", "raise AssertionError('imported')", group="dsv3.backends.v0")
    (answer,) = [a for n, _, a in dsv3.probe() if n == "old"]
    assert answer.state == "incompatible"
    assert "needs dsv3 plugin ABI 0; this is 1" in answer.detail
    with pytest.raises(dsv3.BackendUnavailable, match="needs dsv3 plugin ABI 0"):
        dsv3.load("demo", backend="old")
    assert dsv3.load("demo").placement().backend == "cpu"


def test_two_plugins_of_one_name_are_both_named(install: Callable[..., None]) -> None:
    install("twin", good("twin"), dist="first-twin")
    install("other", good("other"))
    install("twin", good("twin"), dist="second-twin")
    for name, _, answer in dsv3.probe():
        if name == "twin":
            assert answer.state == "error"
            assert "first-twin 1.0 and second-twin 1.0" in answer.detail
    with pytest.raises(dsv3.BackendUnavailable, match="claimed by first-twin"):
        dsv3.load("demo", backend="twin")
    assert dsv3.load("demo", backend="other").placement().backend == "other"


def test_a_plugin_cannot_take_a_built_in_name(install: Callable[..., None]) -> None:
    install("reference", "raise AssertionError('imported')", dist="impostor")
    answers = {(p.dist): load_plugin(p).problem for p in discover() if p.name == "reference"}
    assert answers["dsv3"] is None
    assert "impostor" in answers["impostor"].detail
    assert dsv3.load("demo", backend="reference").generate("Once", max_new_tokens=1).ids


def test_a_plugin_that_prints_does_not_reach_stdout(install: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    install(
        "loud",
        "print('hello from a plugin')\n"
        + good("loud", body="def probe(self, d):\n    print('probing')\n    return BackendBase"),
    )
    dsv3.probe()
    assert "hello" not in capsys.readouterr().out


def test_an_unknown_backend_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(dsv3.BackendUnavailable, match="did you mean 'reference'"):
        dsv3.load("demo", backend="referense")


def test_auto_passes_over_a_broken_accelerator_and_says_so(install: Callable[..., None]) -> None:
    install("npux", good("npux", family="npux", body="def probe(self, device):\n    raise OSError('driver mismatch')"))
    placement = dsv3.load("demo").placement()
    assert placement.backend == "cpu"
    assert any("npux" in note and "driver mismatch" in note for note in placement.notes)


def test_auto_takes_the_only_accelerator_and_asks_between_two(install: Callable[..., None]) -> None:
    install("one", good("one", family="newfamily"))
    assert dsv3.load("demo").placement().backend == "one"
    install("two", good("two", family="newfamily"))
    with pytest.raises(dsv3.BackendUnavailable, match="choose one with --backend"):
        dsv3.load("demo")


@pytest.mark.parametrize("damage", ["no metadata", "nonsense", "not utf-8", "somebody else's"])
def test_damaged_metadata_of_one_package_hides_no_other(damage: str, install: Callable[..., None], tmp_path: Path) -> None:
    install("damaged", good("damaged"))
    install("sound", good("sound"))
    (info,) = tmp_path.glob("dsv3_damaged*.dist-info")
    if damage == "no metadata":
        (info / "METADATA").unlink()
    elif damage == "nonsense":
        (info / "entry_points.txt").write_text("[dsv3.backends.v1]\nnonsense\n")
    elif damage == "not utf-8":
        (info / "entry_points.txt").write_bytes(b"[dsv3.backends.v1]\nx = \xff:y\n")
    else:
        (info / "entry_points.txt").write_bytes(b"[console_scripts]\nx = \xff:y\n")
    found = {name: answer for name, _, answer in dsv3.probe()}
    assert found["reference"].state == found["sound"].state == "usable"
    assert any("damaged" in a.detail and a.state == "error" for a in found.values())
    assert dsv3.load("demo", backend="sound").placement().backend == "sound"
    assert dsv3.load("demo").generate("Once", max_new_tokens=1).ids


def test_what_a_plugin_prints_late_or_below_python_is_not_generated_text(tmp_path: Path) -> None:
    """A probe that goes on printing after it was given up on, and a C library that writes to descriptor 1."""
    body = (
        "def probe(self, device):\n    import os, time\n    os.write(1, b'NATIVE')\n"
        "    for _ in range(400):\n        print('LATE', flush=True)\n        time.sleep(0.01)\n    raise OSError"
    )
    write_plugin(tmp_path, "chatty", good("chatty", family="newfamily", body=body))
    command = [sys.executable, "-m", "dsv3", "run", "Once", "--max-new-tokens", "20"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout == dsv3.load("demo").generate("Once", max_new_tokens=20).text + "\n"
    assert "NATIVE" in done.stderr and "LATE" in done.stderr
