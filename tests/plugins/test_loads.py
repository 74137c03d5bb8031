"""Level L0 finds what is wrong with a backend, says it in the right case, and survives whatever the backend does."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.cli import main
from dsv3.conformance.loads import run_loads
from dsv3.errors import BackendUnavailable
from dsv3.plugin import AtLeast, AtMost, Divides, Kernel
from dsv3.trial.calls import _bent
from dsv3.trial.findings import ALL_IDS
from tests.support.loads_faults import FAULTS, KERNEL, LINEAR, RMS
from tests.support.plugins import good, write_plugin

Found = dict[str, Any]
Try = Callable[..., Found]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Write plugin `name` with this source where the tests and their processes find it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, source: str) -> None:
        write_plugin(tmp_path, name, source)
        importlib.invalidate_caches()

    return write


@pytest.fixture
def tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Try:
    """Run L0 on an instance of a backend with `body` added to its class; `kernels` is the source of its target module."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def build(body: str, kernels: str = "", emulate: str | None = None) -> Found:
        (tmp_path / "made_kernels.py").write_text(textwrap.dedent(kernels))
        for module in ("made", "made_kernels"):
            sys.modules.pop(module, None)
        importlib.invalidate_caches()
        (tmp_path / "made.py").write_text(good("made", body=textwrap.dedent(body)))
        return {case.id: case for case in run_loads(importlib.import_module("made").backend, emulate)}

    return build


def _bad(found: Found) -> dict[str, str]:
    return {case.id: case.message for case in found.values() if case.status == "failed"}


def _warned(found: Found) -> dict[str, str]:
    return {c.id: c.message for c in found.values() if c.status == "passed" and c.message.startswith("warning: ")}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails_its_case(fault: str, tried: Try) -> None:
    body, kernels, case, words = FAULTS[fault]
    found = tried(body, kernels)
    assert set(found) == set(ALL_IDS)
    bad = _bad(found)
    assert case in bad and words in bad[case], bad
    assert found[case].repeat and (found[case].op, found[case].level) == ("plugin", "L0")


def test_a_right_instance_has_no_failure_and_no_warning(tried: Try) -> None:
    kernels = RMS + LINEAR + "def a(call):\n    return 'wide' if call.dims['K'] > 200 else None\n"
    listed = (
        "Kernel('rms_norm', 'k', 'made_kernels:rms_norm'),"
        "Kernel('quant_linear', 'k', 'made_kernels:f', accepts='made_kernels:a', layouts={'w': 'bytes'}),"
        "Kernel('fused_experts', 'k', 'made_kernels:g', layouts={'w13': 'bytes', 'w2': 'bytes'},"
        "needs=(Scheme('fp8-w8a8', 'int4-w4a16'), Divides('H', 64), AtLeast('T', 4)))"
    )
    body = f"""
def kernels(self, device):
    return [{listed}]
def prepare(self, w, layout, device):
    import dataclasses
    return dataclasses.replace(w, layout=layout, tensors={{n: t.flip(0) for n, t in w.tensors.items()}})
def unprepare(self, w):
    return self.prepare(w, 'canonical', None)
def capture(self, step, device):
    return step
"""
    found = tried(body, kernels + "def g(x, weights, ids, w13, w2):\n    return x\n")
    assert not _bad(found) and not _warned(found)
    asked = {c.id for c in found.values() if c.status == "absent"}
    assert asked == set(ALL_IDS[:8]), "only the cases about the package are absent"
    assert "exact" in found["l0/layouts"].message and int(found["l0/layouts"].message.split()[0]) > 20
    assert int(found["l0/accepts"].message.split()[1]) > 20


def test_without_a_device_the_emulated_one_is_checked(tried: Try) -> None:
    body = "def devices(self, emulate=None):\n    return [Device('new', 'n1', emulated=True)] if emulate == 'default' else []\n"
    found = tried(body + KERNEL.format("'rms_norm', 'k', 'made_kernels:rms'"), RMS)
    assert found["l0/devices"].message == "no device here; checked as emulated n1"
    assert list(_bad(found)) == ["l0/targets", "l0/signatures"]
    nothing = tried("def devices(self, emulate=None):\n    return []")
    assert not _bad(nothing) and nothing["l0/registration"].status == "absent"
    assert "does not emulate 'n2'" in _bad(tried(body, emulate="n2"))["l0/devices"]


def test_a_device_that_cannot_be_used_is_no_fault_of_the_backends(tried: Try) -> None:
    answer = "Probe('driver', detail='libacme.so is missing', remedy='install it')"
    found = tried(f"def probe(self, device):\n    return {answer}\n" + KERNEL.format("'rms_norm', 'k', 'made_kernels:gone'"))
    assert not _bad(found) and found["l0/registration"].status == "passed"
    for case in ("l0/capability", "l0/targets", "l0/layouts", "l0/capture"):
        assert found[case].status == "absent" and "libacme.so is missing" in found[case].message


@given(
    steps=st.lists(st.integers(1, 48), max_size=2),
    low=st.integers(1, 400),
    high=st.integers(1, 4000),
    size=st.integers(1, 500),
)
def test_made_up_sizes_meet_every_bound_that_can_be_met(steps: list[int], low: int, high: int, size: int) -> None:
    needs = (*(Divides("K", s) for s in steps), AtLeast("K", low), AtMost("K", high))
    found = _bent("K", size, Kernel("linear", "k", "a:b", needs=needs))
    step = math.lcm(1, *steps)
    first = -(-low // step) * step
    if first <= high:
        assert found % step == 0 and low <= found <= high


def test_slow_and_talkative_is_a_warning(tried: Try) -> None:
    answer = "return Probe('usable', Capability(frozenset({'float32'})))"
    body = f"def probe(self, device):\n    import time; time.sleep(0.06)\n    {answer}\n"
    found = tried(body + KERNEL.format("'rms_norm', 'k', 'made_kernels:rms_norm'"), RMS + "print('hello')\n")
    assert not _bad(found)
    warned = _warned(found)
    assert "the limit is 50 ms" in warned["l0/probe"] and "prints 'hello'" in warned["l0/targets"]


NEEDS_DEVICE = """
def probe(self, device):
    import os
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        raise RuntimeError("none is visible")
    return Probe("usable", Capability(dtypes=frozenset({"float32"})))
"""


@pytest.mark.parametrize(
    ("source", "case", "words"),
    [
        ("import a_module_that_is_not_there", "l0/entry-point", "ModuleNotFoundError: No module named 'a_module"),
        ("import os\nos._exit(7)", "l0/entry-point", "its process ended with exit code 7"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "l0/entry-point", "ended with signal 11"),
        ("import sys\nsys.exit('no licence')", "l0/entry-point", "SystemExit: no licence"),
        (good("broken").replace("backend = Made()", "backend = Made"), "l0/interface", "it is a class"),
        ("import os\nos.environ['OMP_NUM_THREADS'] = '999'\n" + good("broken"), "l0/import-side-effects", "OMP_NUM_THREADS"),
        ("import os\nos.chdir('/')\n" + good("broken"), "l0/import-side-effects", "working directory to /"),
        (good("broken", body="def probe(self, device):\n    import os; os._exit(3)"), "l0/probe", "ended with exit code 3"),
        (good("broken", body="def probe(self, device):\n    import time; time.sleep(20)"), "l0/probe", "no answer within 2 s"),
        (good("broken", body=NEEDS_DEVICE), "l0/probe-hidden", "hidden, probe(cpu (cpu_1)): RuntimeError: none"),
    ],
)  # fmt: skip
def test_a_fault_of_an_installed_plugin_fails_its_case(
    source: str, case: str, words: str, install: Callable[[str, str], None]
) -> None:
    install("broken", source)
    found = {c.id: c for c in run_loads("broken")}
    assert list(found) == list(ALL_IDS)
    assert words in _bad(found)[case]
    assert found[case].repeat == f"dsv3 conformance --backend broken --level L0 --cases '{case}'"


COSTLY = """
import sys, threading, time
print("welcome to my backend")
sys.stderr.write("loading\\n")
open("left.behind", "w").close()
threading.Thread(target=time.sleep, args=(60,), daemon=True, name="poller").start()
import numpy
time.sleep(1.1)
"""


def test_an_import_that_costs_but_works_is_a_warning(install: Callable[[str, str], None]) -> None:
    install("costly", COSTLY + good("costly"))
    found = {c.id: c for c in run_loads("costly")}
    assert not _bad(found)
    warned = _warned(found)
    assert "prints 'welcome to my backend' to standard output" in warned["l0/stdout"] and "loading" in warned["l0/stdout"]
    effects = warned["l0/import-side-effects"]
    assert "imports numpy" in effects and "left.behind" in effects and "poller" in effects
    assert "its import takes 1." in warned["l0/import-time"]


def test_a_wrong_abi_and_a_name_claimed_twice_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    write_plugin(tmp_path, "old", "raise AssertionError", group="dsv3.backends.v0")
    write_plugin(tmp_path, "twice", "raise AssertionError", dist="dsv3-one")
    write_plugin(tmp_path, "twice", "raise AssertionError", dist="dsv3-two")
    importlib.invalidate_caches()
    (old,) = [c for c in run_loads("old") if c.status != "absent"]
    assert (old.id, old.status) == ("l0/abi", "failed") and "needs dsv3 plugin ABI 0; this is 1" in old.message
    (twice,) = [c for c in run_loads("twice") if c.status != "absent"]
    assert twice.id == "l0/names" and "claimed by dsv3-one 1.0 and dsv3-two 1.0; uninstall one" in twice.message


def test_a_name_that_nothing_bears_is_an_error() -> None:
    with pytest.raises(BackendUnavailable, match="did you mean 'reference'"):
        run_loads("referense")


def test_the_reference_loads_without_a_warning_and_core_stays_light() -> None:
    code = (
        "import sys\nfrom dsv3.trial.run import try_plugin\nfound = try_plugin('reference')\n"
        "assert all(c.status == 'passed' and not c.message.startswith('warning') for c in found), found\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_check_prints_json_and_exits_by_what_it_found(
    install: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    install("fine", "print('hello')\n" + good("fine"))
    install("broken", "raise OSError('no driver library')")
    assert main(["plugin", "check", "fine", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["plugin"], entry["package"], entry["failed"]) == ("fine", "dsv3-fine 1.0", 0)
    assert {c["id"]: c["state"] for c in entry["cases"]}["l0/stdout"] == "warning"
    assert main(["plugin", "check"]) == 3
    out = capsys.readouterr().out
    assert "fine (dsv3-fine 1.0)" in out and "FAILED" in out and "OSError: no driver library" in out
    assert "again: dsv3 conformance --backend broken --level L0 --cases 'l0/entry-point'" in out
