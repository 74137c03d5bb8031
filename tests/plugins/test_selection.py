"""Selection and binding, seen from a plugin: order, needs, buckets, layouts, composites, pins, strict, and every
reason kept."""

from __future__ import annotations

import time

import pytest
import torch

import dsv3
from dsv3.dispatch.select import UNBOUNDED, buckets
from dsv3.plugin import AtLeast, AtMost, Call, Capability, Device, Divides, DType, Feature, Kernel, Scheme
from dsv3.plugin.needs import Arch, merge_alternatives
from tests.support.acme import Make
from tests.support.acme import load as _load


def test_buckets_cover_every_number_of_tokens() -> None:
    assert buckets([]) == [(1, UNBOUNDED)]
    assert buckets([4, 64]) == [(1, 4), (5, 64), (65, UNBOUNDED)]


def test_priority_then_needs_then_name_decide_and_the_loser_keeps_its_reason(make: Make) -> None:
    kernels = make(
        "Kernel('rms_norm', 'b_any', T + 'rms_any'),"
        "Kernel('rms_norm', 'a_any', T + 'rms_any'),"
        "Kernel('rms_norm', 'small', T + 'rms_small', needs=(AtMost('T', 4),))"
    )
    model = _load()
    entry = model.placement().to_json()["ops"]["rms_norm"]
    assert entry["chosen"] == "acme.small"
    assert {"kernel": "acme.a_any", "reason": "acme.small comes first (priority, needs, name)"} in entry["rejected"]
    spans = {tuple(c["tokens"]): c["chosen"] for c in entry["choices"]}
    assert spans == {(1, 4): "acme.small", (5, UNBOUNDED): "acme.a_any"}
    large = next(c for c in entry["choices"] if c["tokens"] == [5, UNBOUNDED])
    assert any("needs T at most 4" in r["reason"] for r in large["rejected"])
    model.logits(list(range(1, 5)))
    assert {name for name, _ in kernels.calls} == {"rms_small"}
    kernels.calls.clear()
    model.logits(list(range(1, 6)))
    assert {name for name, _ in kernels.calls} == {"rms_any"}


def test_priority_beats_narrowness(make: Make) -> None:
    make(
        "Kernel('rms_norm', 'any', T + 'rms_any', priority=5),"
        "Kernel('rms_norm', 'small', T + 'rms_small', needs=(AtMost('T', 4),))"
    )
    assert _load().placement().to_json()["ops"]["rms_norm"]["chosen"] == "acme.any"


def test_all_reasons_are_collected(make: Make) -> None:
    make(
        "Kernel('rms_norm', 'k', T + 'rms_any', needs=(Feature('fp8_mma', 'tma'), Arch('sm_90'), DType('x', 'bfloat16'),"
        " Divides('D', 7)))"
    )
    rejected = _load().placement().to_json()["ops"]["rms_norm"]["rejected"]
    (reason,) = [r["reason"] for r in rejected if r["kernel"] == "acme.k"]
    for part in ("needs feature fp8_mma, tma", "needs architecture sm_90; the device is cpu_1", "x in bfloat16; it is float32",
                 "D a multiple of 7"):  # fmt: skip
        assert part in reason


def test_a_dtype_that_the_device_lacks_is_a_reason(make: Make) -> None:
    make("Kernel('rms_norm', 'k', T + 'rms_any')")
    model = dsv3.load("demo", backend="acme", dtype="float64", quant="none")
    assert model.placement().to_json()["ops"]["rms_norm"]["chosen"] == "acme.k"  # the plugin claims float64
    call = Call("rms_norm", {"T": 1, "D": 8}, {"x": "float16"}, "none", Device("x", "y"))
    assert DType("x", "float32").refuse(call, Capability(frozenset())) == "needs x in float32; it is float16"


def test_needs_answer_with_reasons() -> None:
    device = Device("cuda", "sm_120")
    call = Call("quant_linear", {"T": 65, "K": 130, "N": 5}, {"x": "bfloat16"}, "fp8-w8a16", device)
    capability = Capability(frozenset({"bfloat16"}), frozenset({"tma"}))
    met = [
        AtMost("T", 65),
        AtLeast("T", 65),
        Divides("K", 13),
        DType("x", "float32", "bfloat16"),
        Scheme("fp8-w8a16"),
        Feature("tma"),
    ]
    assert [need.refuse(call, capability) for need in met] == [None] * len(met)
    unmet = [AtMost("T", 64), AtLeast("T", 66), Divides("K", 128), AtMost("S", 1), Scheme("none"), Arch("sm_100")]
    assert all(need.refuse(call, capability) for need in unmet)
    folded = merge_alternatives([DType("x", "float32"), DType("x", "bfloat16"), Arch("sm_90"), Arch("sm_120")])
    assert [need.refuse(call, capability) for need in folded] == [None, None]


def test_a_kernel_gets_its_own_layout_prepared_once(make: Make) -> None:
    kernels = make("Kernel('quant_linear', 'turned', T + 'turned', layouts={'w': 'turned'})")
    model, reference = _load(), _load(backend="reference")
    ids = [0, 933, 643, 263, 506]
    torch.testing.assert_close(model.logits(ids), reference.logits(ids), rtol=1e-4, atol=1e-4)
    assert model.generate("Once", max_new_tokens=5).ids == reference.generate("Once", max_new_tokens=5).ids
    assert kernels.calls
    # Experts are taken apart by the decomposition of grouped_linear, which reads canonical weights only.
    experts = [d for _, _, d in model.placement().decisions("grouped_linear")]
    assert all(d.parts["quant_linear"].kernel.name == "reference.torch" for d in experts if d.parts["quant_linear"].kernel)


def test_a_layout_that_not_every_bucket_can_read_is_not_used(make: Make) -> None:
    """One layout per weight across all buckets: with nothing native for large steps, the weight stays canonical."""
    kernels = make("Kernel('quant_linear', 'turned', T + 'turned', needs=(AtMost('T', 4),), layouts={'w': 'turned'})")
    model = _load()
    model.generate("Once upon a time", max_new_tokens=3)
    assert kernels.calls == []
    reasons = [r["reason"] for c in model.placement().explain("quant_linear")["choices"] for r in c["rejected"]]
    assert any("cannot be read by every kernel that needs the weight" in r for r in reasons)


def test_a_kernel_for_the_whole_block_chooses_the_layouts_of_its_parts(make: Make) -> None:
    """mla_prolog and quant_linear read the same weights; the one that covers more goes first."""
    make(
        "Kernel('mla_prolog', 'whole', T + 'prolog', layouts={'weights.' + w: 'turned' for w in ('q_a', 'q_b', 'kv_a')}),"
        "Kernel('quant_linear', 'own', T + 'turned', priority=1, layouts={'w': 'other'}),"
        "Kernel('quant_linear', 'shared', T + 'turned', layouts={'w': 'turned'})"
    )
    placement = dsv3.load("tiny", device="meta", backend="acme", dtype="float32").placement()
    assert placement.to_json()["ops"]["mla_prolog"]["chosen"] == "acme.whole"
    chosen = {where: d.kernel.name for where, _, d in placement.decisions("quant_linear") if d.kernel}
    assert chosen["layers.0.self_attn.q_a_proj"] == "acme.shared"
    assert chosen["layers.0.self_attn.o_proj"] == "acme.own"


def test_conflicts_of_many_layers_are_settled_together(make: Make) -> None:
    """The 671B model with a layout that half of its buckets cannot read: not one restart per weight."""
    make("Kernel('quant_linear', 'few', T + 'turned', needs=(AtMost('T', 4),), layouts={'w': 'turned'})")
    start = time.perf_counter()
    placement = dsv3.load("671B", device="meta", backend="acme", quant="none").placement()
    assert "acme.few" not in {c["chosen"] for c in placement.explain("quant_linear")["choices"]}
    assert time.perf_counter() - start < 60  # about 4 s; hours if every conflict began anew


def test_two_kernels_of_one_layout_share_a_weight(make: Make) -> None:
    kernels = make(
        "Kernel('quant_linear', 'few', T + 'turned', needs=(AtMost('T', 4),), layouts={'w': 'turned'}),"
        "Kernel('quant_linear', 'many', T + 'turned', needs=(AtLeast('T', 5),), layouts={'w': 'turned'})"
    )
    model = _load()
    assert {c["chosen"] for c in model.placement().explain("quant_linear", 2)["choices"]} >= {"acme.few"}
    model.generate("Once upon a time", max_new_tokens=2)
    assert {tokens > 4 for _, tokens in kernels.calls} == {True, False}


def test_an_accepts_function_decides_per_shape(make: Make) -> None:
    make("Kernel('quant_linear', 'plain', T + 'plain', accepts=T + 'refuse_wide')")
    found = _load().placement().explain("quant_linear", 1)["choices"]
    wide = [c for c in found if any("too wide" in r["reason"] for r in c["rejected"])]
    assert wide and any(c["chosen"] == "acme.plain" for c in found)


def test_a_whole_composite_is_taken_before_its_parts(make: Make) -> None:
    kernels = make("Kernel('moe', 'whole', T + 'moe'), Kernel('grouped_linear', 'g', T + 'experts')")
    model, reference = _load(), _load(backend="reference")
    placement = model.placement().to_json()["ops"]
    assert placement["moe"]["chosen"] == "acme.whole"
    assert "grouped_linear" not in placement
    assert model.generate("Once", max_new_tokens=4).ids == reference.generate("Once", max_new_tokens=4).ids
    assert ("moe", 1) in kernels.calls


def test_a_part_is_used_inside_a_decomposition(make: Make) -> None:
    kernels = make("Kernel('grouped_linear', 'g', T + 'experts', needs=(AtMost('M', 40),))")
    model = _load()
    entry = model.placement().to_json()["ops"]["grouped_linear"]
    assert {tuple(c["tokens"]): c["chosen"] for c in entry["choices"]} == {
        (1, 10): "acme.g", (11, UNBOUNDED): "composite.quant_linear",
    }  # fmt: skip
    model.logits(list(range(10)))
    assert {m for _, m in kernels.calls} == {40}
    kernels.calls.clear()
    model.logits(list(range(11)))
    assert kernels.calls == []


def test_calls_of_different_shapes_in_one_decomposition_may_go_different_ways(make: Make) -> None:
    """Of the two products of an expert, [256 -> 256] and [128 -> 256], only one has K at most 128."""
    kernels = make("Kernel('grouped_linear', 'g', T + 'experts', needs=(AtMost('K', 128),))")
    model, reference = _load(), _load(backend="reference")
    assert torch.equal(model.logits([0, 5, 9]), reference.logits([0, 5, 9]))
    assert len(kernels.calls) == 4  # once in each of the four MoE layers, not twice


def test_pins_are_kept_or_refused_with_the_reason(make: Make) -> None:
    make("Kernel('rms_norm', 'any', T + 'rms_any'), Kernel('rms_norm', 'never', T + 'rms_any', needs=(Feature('x'),))")
    pinned = _load(pins={"rms_norm": "reference.torch"})
    entry = pinned.placement().to_json()["ops"]["rms_norm"]
    assert (entry["chosen"], entry["why"]) == ("reference.torch", "pinned")
    with pytest.raises(dsv3.BackendUnavailable, match="needs feature x"):
        _load(pins={"rms_norm": "acme.never"})
    with pytest.raises(dsv3.BackendUnavailable, match="no kernel 'anny' for rms_norm; it has never, any"):
        _load(pins={"rms_norm": "acme.anny"})
    with pytest.raises(dsv3.UsageError, match="did you mean 'rms_norm'"):
        _load(pins={"rms_nrom": "acme.any"})
    with pytest.raises(dsv3.UsageError, match=r"BACKEND\.KERNEL"):
        _load(pins={"rms_norm": "any"})
    with pytest.raises(dsv3.BackendUnavailable, match="'nobody' is not installed"):
        _load(pins={"rms_norm": "nobody.any"})
    with pytest.raises(dsv3.BackendUnavailable, match="no effect"):
        _load(pins={"act_quant": "reference.torch"})
    from_another = dsv3.load("demo", backend="reference", pins={"rms_norm": "acme.any"})
    assert from_another.placement().to_json()["ops"]["rms_norm"]["chosen"] == "acme.any"


def test_strict_refuses_any_fallback_and_names_it(make: Make) -> None:
    make("Kernel('rms_norm', 'any', T + 'rms_any')")
    assert "linear" in _load().placement().fallbacks()
    with pytest.raises(dsv3.BackendUnavailable, match=r"strict: backend 'acme' leaves .* linear \(acme: offers no kernel"):
        _load(strict=True)
    assert _load(backend="reference", strict=True).placement().fallbacks() == []


def test_the_summary_counts_and_names_fallbacks(make: Make) -> None:
    make("Kernel('rms_norm', 'any', T + 'rms_any')")
    placement = _load().placement()
    assert placement.summary.startswith("demo on acme, cpu (cpu_1): float32, weights none, cache float32; ")
    assert "1 of 24 operators native, 9 composite, 14 on the reference (" in placement.summary
    assert placement.summary.endswith(", ..)")
    assert str(placement).startswith(placement.summary)
    assert "acme.any" in str(placement)


def test_kernel_metadata_is_hashable_and_default() -> None:
    kernel = Kernel("rms_norm", "k", "m:f")
    assert (kernel.since, kernel.needs, kernel.priority, kernel.numerics, kernel.deterministic) == (1, (), 0, "f32", True)
    assert hash(Arch("a")) == hash(Arch("a")) and Arch("a") == Arch("a") != Arch("b") and Arch("a") != Feature("a")


def test_an_accepts_function_that_fails_is_a_reason(make: Make) -> None:
    make("Kernel('rms_norm', 'k', T + 'rms_any', accepts=T + 'refuse_wide')")  # rms_norm has no K
    rejected = _load().placement().to_json()["ops"]["rms_norm"]["rejected"]
    assert {"kernel": "acme.k", "reason": "its accepts function failed: KeyError: 'K'"} in rejected


def test_a_failing_prepare_is_named(make: Make) -> None:
    make("Kernel('quant_linear', 'turned', T + 'turned', layouts={'w': 'unheard_of'})")
    with pytest.raises(dsv3.BackendUnavailable, match=r"cannot prepare layout 'unheard_of'.*preparing layers\.0\."):
        _load()
