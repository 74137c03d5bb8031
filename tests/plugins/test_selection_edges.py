"""Selection at its edges: needs that vary, pins against layouts, caches and emulation that are not what was asked for."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

import dsv3
from dsv3.dispatch.choose import Source
from dsv3.dispatch.select import UNBOUNDED, Catalogue
from dsv3.plugin import Call, Capability, Device, DType, Kernel
from tests.support.acme import Make
from tests.support.acme import load as _load
from tests.support.plugins import good, write_plugin


def test_a_multiple_of_tokens_is_no_need_that_a_range_can_meet(make: Make) -> None:
    """65 to 2^20 begins and ends with multiples of many numbers, and holds few."""
    kernels = make("Kernel('rms_norm', 'tile', T + 'rms_any', needs=(AtLeast('T', 32), Divides('T', 32)))")
    model = _load()
    model.logits([5] * 37)
    assert kernels.calls == []
    rejected = model.placement().to_json()["ops"]["rms_norm"]["rejected"]
    assert any("needs T a multiple of 32; it varies" in r["reason"] for r in rejected)


def test_needs_hold_at_every_call(make: Make) -> None:
    """Rows per expert, and rows per cached key, are other numbers than the tokens of a step."""
    kernels = make(
        "Kernel('quant_linear', 'few', T + 'plain', needs=(AtMost('T', 8),)),"
        "Kernel('silu_mul', 'many', T + 'silu', needs=(AtLeast('T', 32),))"
    )
    model = _load()
    model.logits([(7 * i) % 100 for i in range(37)], chunk=8)
    model.generate([(3 * i) % 90 for i in range(50)], max_new_tokens=3)
    assert {n <= 8 for name, n in kernels.calls if name == "plain"} == {True}
    assert all(n >= 32 for name, n in kernels.calls if name == "silu")


def test_the_number_of_sequences_is_at_most_the_tokens(make: Make) -> None:
    make(
        "Kernel('mla_decode', 'few', T + 'rms_any', needs=(AtMost('S', 8),)),"
        "Kernel('mla_decode', 'k', T + 'x', needs=(AtLeast('S', 2),))"
    )
    with pytest.raises(dsv3.BackendUnavailable, match="does not take the arguments of mla_decode"):
        _load()  # it was chosen, for steps of up to 8 tokens


def test_the_output_dtype_must_be_the_devices_too(make: Make) -> None:
    """An FP8 product that puts out float32, on a device with bfloat16 alone."""
    capability = Capability(frozenset({"bfloat16"}))
    source = Source(None, Device("x", "y"), capability, "")  # type: ignore[arg-type]
    catalogue = Catalogue.__new__(Catalogue)
    catalogue.source = source
    kernel = Kernel("block_scaled_mm", "k", "m:f")
    for out, refused in (("bfloat16", False), ("float32", True)):
        call = Call("block_scaled_mm", {}, {"a": "float8_e4m3fn", "out_dtype": out}, "none", source.device)
        assert bool(catalogue.refusals(kernel, call)) == refused
    both = Kernel("rms_norm", "k", "m:f", needs=(DType("x", "float32", "bfloat16"),))
    call = Call("rms_norm", {}, {"x": "float32"}, "none", source.device)
    assert catalogue.refusals(both, call) == ["x is float32, which x:0 (y) does not have"]


def test_an_absent_optional_argument_meets_any_dtype(make: Make) -> None:
    make("Kernel('linear', 'k', T + 'linear', needs=(DType('bias', 'float32'), DType('x', 'float32')))")
    assert _load().placement().to_json()["ops"]["linear"]["chosen"] == "acme.k"


def test_a_pin_on_a_part_keeps_the_whole_apart(make: Make) -> None:
    make(
        "Kernel('moe', 'whole', T + 'moe'), Kernel('grouped_linear', 'g', T + 'experts'),"
        "Kernel('grouped_linear', 'h', T + 'experts')"
    )
    ops = _load(pins={"grouped_linear": "acme.h"}).placement().to_json()["ops"]
    assert ops["grouped_linear"]["chosen"] == "acme.h"
    assert {"kernel": "acme.whole", "reason": "grouped_linear inside it is pinned"} in ops["moe"]["rejected"]


def test_a_pin_chooses_the_layout_before_anybody_else(make: Make) -> None:
    make(
        "Kernel('mla_prolog', 'whole', T + 'prolog', layouts={'weights.' + w: 'turned' for w in ('q_a', 'q_b', 'kv_a')}),"
        "Kernel('quant_linear', 'other', T + 'plain'),"
        "Kernel('quant_linear', 'turned', T + 'turned', priority=1, layouts={'w': 'turned'})"
    )
    meta = {"device": "meta", "backend": "acme", "dtype": "float32"}
    free = dsv3.load("tiny", **meta).placement()
    assert free.to_json()["ops"]["mla_prolog"]["chosen"] == "acme.whole"
    pinned = dsv3.load("tiny", pins={"quant_linear": "acme.other"}, **meta).placement()
    assert {d.why for _, _, d in pinned.decisions("quant_linear")} == {"pinned"}


def test_a_pin_for_some_steps_only_is_noted(make: Make) -> None:
    make("Kernel('rms_norm', 'small', T + 'rms_small', needs=(AtMost('T', 4),))")
    notes = _load(pins={"rms_norm": "acme.small"}).placement().notes
    assert any("rms_norm=acme.small does not hold in steps of 5 to" in n and "T at most 4" in n for n in notes)


def test_a_whole_kernel_for_large_steps_binds_the_parts_of_small_ones(make: Make) -> None:
    make(
        "Kernel('moe', 'whole', T + 'moe', needs=(AtLeast('T', 9),)),"
        "Kernel('grouped_linear', 'turned', T + 'grouped_turned', priority=1, layouts={'w': 'turned3'}),"
        "Kernel('grouped_linear', 'plain', T + 'experts')"
    )
    model, reference = _load(), _load(backend="reference")
    found = {tuple(c["tokens"]): c["chosen"] for c in model.placement().explain("moe")["choices"]}
    assert found[9, UNBOUNDED] == "acme.whole"
    assert {c["chosen"] for c in model.placement().explain("grouped_linear")["choices"]} == {"acme.plain"}
    assert model.generate("Once upon a time there was a boy", max_new_tokens=3).ids == (
        reference.generate("Once upon a time there was a boy", max_new_tokens=3).ids
    )


def test_experts_in_a_layout_of_their_own(make: Make) -> None:
    kernels = make("Kernel('grouped_linear', 'turned', T + 'grouped_turned', layouts={'w': 'turned3'})")
    model, reference = _load(), _load(backend="reference")
    assert torch.equal(model.logits([0, 5, 9]), reference.logits([0, 5, 9])) and kernels.calls


@pytest.mark.parametrize(("layout", "words"), [("nothing", "gave NoneType"), ("forgotten", "gave layout 'canonical'")])
def test_what_prepare_answers_is_checked(layout: str, words: str, make: Make) -> None:
    make(f"Kernel('quant_linear', 'k', T + 'turned', layouts={{'w': '{layout}'}})")
    with pytest.raises(dsv3.BackendUnavailable, match=words):
        _load()


def test_a_cache_dtype_that_was_asked_for_is_kept_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    write_plugin(
        tmp_path, "cachy", good("cachy", body="def cache_spec(self, device, kv):\n    return CacheSpec(16, 'float32')")
    )
    importlib.invalidate_caches()
    placement = dsv3.load("demo", backend="cachy").placement()
    assert placement.kv_dtype == "float32" and any("keeps its cache in float32" in n for n in placement.notes)
    with pytest.raises(dsv3.BackendUnavailable, match="keeps its cache in float32, not fp8"):
        dsv3.load("demo", backend="cachy", kv_dtype="fp8")
    assert dsv3.load("demo", backend="cachy", kv_dtype="float32").generate("Once", max_new_tokens=20).ids


EMULATING = """
def devices(self, emulate=None):
    known = {"default": "fam_b", "fam_b": "fam_b"}
    if emulate is None:
        return [Device("fam", "fam_a")]
    if emulate == "broken":
        return [Device("fam", "fam_a")]
    return [Device("fam", known[emulate], emulated=True)] if emulate in known else []
"""


def test_emulation_is_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    write_plugin(tmp_path, "emu", good("emu", body=EMULATING))
    importlib.invalidate_caches()
    for emulate in (True, "fam_b"):
        device = dsv3.load("demo", backend="emu", emulate=emulate).placement().device
        assert (device.arch, device.emulated) == ("fam_b", True)
    assert dsv3.load("demo", backend="emu").placement().device.arch == "fam_a"
    for emulate in ("sm_90", "broken"):
        with pytest.raises(dsv3.BackendUnavailable, match="emulate"):
            dsv3.load("demo", backend="emu", emulate=emulate)


def test_auto_sees_an_accelerator_behind_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    body = "def devices(self, emulate=None):\n    return [Device('cpu', 'x'), Device('newfamily', 'y')]"
    write_plugin(tmp_path, "both", good("both", body=body))
    importlib.invalidate_caches()
    assert dsv3.load("demo").placement().device.family == "newfamily"
