"""The failure policy, row by row: what happens when a plugin, its registration, its probe or one of its kernels fails."""

from __future__ import annotations

import json
import sys
import warnings

import pytest
import torch

import dsv3
from dsv3.dispatch.firstcall import FirstCall
from dsv3.errors import KernelFailed, KernelWarning, OperatorError
from tests.support.failing import TURNED, Install, chosen, load, source
from tests.support.plugins import good

IDS = [0, 933, 643, 263, 506]
RMS = "Kernel('rms_norm', 'fast', T + 'rms_norm')"


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return load(backend="reference").logits(IDS)


# -- listing


def test_another_abi_is_listed_as_incompatible_and_not_imported(install: Install) -> None:
    install("old", "raise AssertionError('imported')", group="dsv3.backends.v0")
    (answer,) = [a for name, _, a in dsv3.probe() if name == "old"]
    assert (answer.state, "needs dsv3 plugin ABI 0; this is 1" in answer.detail) == ("incompatible", True)
    assert "dsv3_old" not in sys.modules


# -- import error


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("import a_module_that_is_not_there", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
        ("import sys\nsys.exit('no licence')", "SystemExit: no licence"),
    ],
)
def test_an_import_error_is_passed_over_by_auto_and_raised_if_requested(text: str, cause: str, install: Install) -> None:
    install("broken", text)
    model = dsv3.load("demo")
    assert model.placement().backend == "cpu"
    assert any("broken" in note and cause in note for note in model.placement().notes)
    with pytest.raises(dsv3.BackendUnavailable) as caught:
        dsv3.load("demo", backend="broken")
    assert str(caught.value).startswith(cause)


# -- duplicate names


def test_two_distributions_of_one_name_are_an_error_that_names_both(install: Install) -> None:
    install("twin", good("twin"), dist="first-twin")
    install("twin", good("twin"), dist="second-twin")
    with pytest.raises(dsv3.BackendUnavailable, match=r"first-twin 1\.0 and second-twin 1\.0"):
        dsv3.load("demo", backend="twin")


# -- bad registration


def test_a_bad_registration_rejects_the_plugin_with_the_nearest_operator(install: Install) -> None:
    install("acme", source("Kernel('silu_mul', 'right', T + 'silu_mul'), Kernel('rms_nrom', 'k', T + 'rms_norm')"))
    with pytest.raises(dsv3.BackendUnavailable, match="unknown operator 'rms_nrom'; did you mean 'rms_norm'"):
        load()
    assert dsv3.load("demo").placement().backend == "cpu"


# -- probe() raises, or takes longer than 2 s


def test_a_probe_that_raises_is_the_state_error(install: Install) -> None:
    install("sick", good("sick", body="def probe(self, device):\n    raise OSError('no driver')"))
    (answer,) = [a for name, _, a in dsv3.probe() if name == "sick"]
    assert (answer.state, "OSError: no driver" in answer.detail) == ("error", True)


def test_a_probe_that_hangs_is_the_state_error_and_shows_the_limit(install: Install) -> None:
    install("slow", good("slow", body="def probe(self, device):\n    import time\n    time.sleep(20)"))
    (answer,) = [a for name, _, a in dsv3.probe() if name == "slow"]
    assert (answer.state, "no answer within 2 s" in answer.detail) == ("error", True)


# -- a kernel raises on its first call


def test_a_kernel_that_fails_first_is_quarantined_for_its_shapes_and_the_next_candidate_runs(
    install: Install, expected: torch.Tensor
) -> None:
    kernels = install("acme", source(RMS))
    kernels.raises["rms_norm"] = ValueError("no such tile")
    model = load()
    with pytest.warns(KernelWarning) as seen:
        assert torch.equal(model.logits(IDS), expected)
    assert len(seen) == 1  # once, for all its shapes
    text = str(seen[0].message)
    for word in (
        "acme.fast",
        "rms_norm",
        "ValueError: no such tile",
        "layers.0.input_layernorm",
        "[5, 256]",
        "reference.torch runs",
    ):
        assert word in text
    assert len(kernels.calls) == len(set(kernels.calls)) > 1  # asked once for every width, at one site of several
    kernels.calls.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model.logits(IDS), expected)
    assert kernels.calls == []


def test_the_next_candidate_of_the_backend_comes_before_the_reference(install: Install, expected: torch.Tensor) -> None:
    kernels = install("acme", source(f"{RMS}, Kernel('rms_norm', 'second', T + 'second_rms_norm')"))
    kernels.raises["rms_norm"] = ValueError("not here")
    model = load()
    with pytest.warns(KernelWarning, match=r"acme\.fast is quarantined.*acme\.second runs instead"):
        assert torch.equal(model.logits(IDS), expected)
    assert chosen(model, "rms_norm") == {"acme.second"}
    assert len([name for name, _ in kernels.calls if name == "second_rms_norm"]) > 10


def test_a_quarantine_appears_in_the_placement_and_its_json(install: Install) -> None:
    kernels = install("acme", source(RMS))
    kernels.raises["rms_norm"] = ValueError("no such tile")
    model = load()
    assert model.placement().to_json()["quarantined"] == []
    with pytest.warns(KernelWarning):
        model.logits(IDS)
    placement = model.placement()
    entry = placement.to_json()["ops"]["rms_norm"]
    assert entry["chosen"] == "reference.torch"
    assert {"kernel": "acme.fast", "reason": "quarantined: ValueError: no such tile"} in entry["rejected"]
    found = placement.to_json()["quarantined"]
    assert {q["kernel"] for q in found} == {"acme.fast"} and found[0]["cause"] == "ValueError: no such tile"
    assert {q["instead"] for q in found} == {"reference.torch"}
    assert "rms_norm" in placement.fallbacks()
    assert sum("acme.fast is quarantined" in note for note in placement.notes) == len(found)
    assert "quarantined: ValueError: no such tile" in str(placement)
    json.dumps(placement.to_json())


def test_a_whole_composite_that_fails_is_replaced_by_its_parts(install: Install, expected: torch.Tensor) -> None:
    kernels = install("acme", source("Kernel('moe', 'whole', T + 'moe'), Kernel('silu_mul', 's', T + 'silu_mul')"))
    kernels.raises["moe"] = RuntimeError("shared memory is too small")
    model = load()
    with pytest.warns(KernelWarning, match=r"instead wherever moe has these shapes"):
        assert torch.equal(model.logits(IDS), expected)
    assert [op for op, _ in kernels.calls].count("moe") == 1  # one layer asked, three did not
    assert model.placement().to_json()["ops"]["moe"]["chosen"] == "composite.route+fused_experts+quant_linear+silu_mul"
    assert "acme.s" in chosen(model, "silu_mul")  # inside it the backend's own kernels run


def test_a_part_that_fails_is_replaced_inside_its_composite(install: Install, expected: torch.Tensor) -> None:
    kernels = install("acme", source("Kernel('grouped_linear', 'g', T + 'grouped_linear')"))
    kernels.raises["grouped_linear"] = RuntimeError("no grouped product")
    model = load()
    with pytest.warns(KernelWarning, match="inside moe"):
        assert torch.equal(model.logits(IDS), expected)
    assert len(kernels.calls) == 2  # once per shape: the up and the down projection


def test_one_shape_that_fails_does_not_cost_the_others_their_kernel(install: Install, expected: torch.Tensor) -> None:
    kernels = install("acme", source("Kernel('grouped_linear', 'g', T + 'grouped_linear')"))
    kernels.raises["grouped_linear"], kernels.widest["grouped_linear"] = ValueError("K is more than 128"), 128
    model = load()
    with pytest.warns(KernelWarning):
        assert torch.equal(model.logits(IDS), expected)
    assert [shape[1] for _, shape in kernels.calls] == [256] + 4 * [128]  # in each of four layers
    kernels.calls.clear()
    assert torch.equal(model.logits(IDS), expected)
    assert [shape[1] for _, shape in kernels.calls] == 4 * [128]


def test_weights_in_the_layout_of_the_quarantined_kernel_are_undone_once(install: Install, expected: torch.Tensor) -> None:
    kernels = install("acme", source(TURNED))
    kernels.raises["turned_quant_linear"] = RuntimeError("cannot launch")
    model = load()
    with pytest.warns(KernelWarning):
        assert torch.equal(model.logits(IDS), expected)
    undone = list(kernels.undone)
    assert undone
    assert torch.equal(model.logits(IDS), expected)
    assert kernels.undone == undone


def test_experts_in_the_layout_of_the_quarantined_kernel_are_undone_whole(install: Install, expected: torch.Tensor) -> None:
    """The decomposition that takes its place takes the weight apart by expert, which only the canonical layout allows."""
    kernels = install("acme", source("Kernel('grouped_linear', 'g', T + 'turned_grouped_linear', layouts={'w': 'turned'})"))
    kernels.raises["turned_grouped_linear"] = RuntimeError("cannot launch")
    with pytest.warns(KernelWarning):
        assert torch.equal(load().logits(IDS), expected)
    assert len(kernels.undone) == 8 and {len(shape) for shape in kernels.undone} == {3}  # two weights in each of four layers


def test_parts_that_read_the_layout_of_a_quarantined_whole_get_its_weights_as_they_are(
    install: Install, expected: torch.Tensor
) -> None:
    turned = "layouts={'w13': 'turned', 'w2': 'turned'}"
    part = "Kernel('grouped_linear', 'g', T + 'turned_grouped_linear', layouts={'w': 'turned'})"
    kernels = install("acme", source(f"Kernel('fused_experts', 'whole', T + 'turned_fused_experts', {turned}), {part}"))
    kernels.raises["turned_fused_experts"] = RuntimeError("cannot launch")
    model = load()
    with pytest.warns(KernelWarning, match=r"composite\.moe_permute\+grouped_linear"):
        torch.testing.assert_close(model.logits(IDS), expected, rtol=1e-4, atol=1e-4)
    assert kernels.undone == [] and "acme.g" in chosen(model, "grouped_linear")


def test_if_the_layout_cannot_be_undone_both_causes_are_told(install: Install) -> None:
    text = source(
        "Kernel('quant_linear', 'turned', T + 'turned_quant_linear', layouts={'w': 'turned'})", "raise OSError('lost')"
    )
    install("acme", text).raises["turned_quant_linear"] = RuntimeError("cannot launch")
    model = load()
    with pytest.raises(KernelFailed, match=r"^RuntimeError: cannot launch .*OSError: lost \(undoing layout 'turned'"):
        model.logits(IDS)
    assert model.placement().to_json()["quarantined"] == []


def test_a_pinned_kernel_that_fails_first_raises(install: Install) -> None:
    install("acme", source(RMS)).raises["rms_norm"] = ValueError("no such tile")
    model = load(pins={"rms_norm": "acme.fast"})
    with pytest.raises(
        dsv3.BackendUnavailable, match=r"^ValueError: no such tile \(kernel acme\.fast of rms_norm at "
    ) as caught:
        model.logits(IDS)
    error = caught.value
    assert isinstance(error, KernelFailed) and isinstance(error.__cause__, ValueError)
    assert "layers.0.input_layernorm" in str(error) and "x [5, 256] float32" in str(error) and "take the pin away" in str(error)
    assert error.selection["kernel"] == "acme.fast" and error.selection["why"] == "pinned"


def test_with_strict_a_kernel_that_fails_first_raises(install: Install) -> None:
    kernels = install("acme", source("Kernel('rms_norm', 'fast', T + 'rms_norm', priority=1), *reference"))
    kernels.raises["rms_norm"] = ValueError("no such tile")
    with pytest.raises(dsv3.BackendUnavailable, match=r"^ValueError: no such tile .*leave strict out"):
        load(strict=True).logits(IDS)
    with pytest.warns(KernelWarning, match=r"acme\.torch runs instead"):
        load().logits(IDS)


@pytest.mark.parametrize("op", ["kv_cache_write", "rope_cache_write", "mla_prolog"])
def test_an_operator_that_changes_the_cache_raises_and_is_not_repeated(op: str, install: Install) -> None:
    kernels = install("acme", source(f"Kernel('{op}', 'fast', T + '{op}')"))
    kernels.raises[op] = RuntimeError("half way")
    model = load()
    with pytest.raises(KernelFailed, match=rf"^RuntimeError: half way \(kernel acme\.fast of {op} at .*half written"):
        model.generate(IDS, max_new_tokens=2)
    assert len(kernels.calls) == 1 and model.placement().to_json()["quarantined"] == []


def test_what_the_replacement_refuses_in_the_same_words_is_the_inputs_fault(install: Install) -> None:
    install("acme", source(RMS))
    model = load()
    site = model._graph.blocks[0].first_norm
    with pytest.raises(OperatorError, match=r"weight has shape \[3\]"):
        site[0](x=torch.ones(2, 256), weight=torch.ones(3), eps=1e-6)
    assert model.placement().to_json()["quarantined"] == []
    assert "acme.fast" in chosen(model, "rms_norm")
    assert torch.equal(site[0](x=torch.zeros(2, 256), weight=torch.ones(256), eps=1e-6), torch.zeros(2, 256))


def test_an_interrupt_is_no_failure(install: Install) -> None:
    install("acme", source(RMS)).raises["rms_norm"] = KeyboardInterrupt()
    model = load()
    with pytest.raises(KeyboardInterrupt):
        model.logits(IDS)
    assert model.placement().to_json()["quarantined"] == []


def test_after_the_first_calls_the_sites_hold_the_kernels_themselves(install: Install) -> None:
    kernels = install("acme", source(RMS))
    model = load()
    model.generate("Once upon a time", max_new_tokens=3)
    norm = model._graph.blocks[0].first_norm
    assert not any(isinstance(entry, FirstCall) for entry in norm)
    assert norm[0].func is kernels._run  # the very object that the kernel module gave


# -- wrong shape or dtype back (tests/plugins/test_check.py has the rest of DSV3_CHECK)


def test_a_wrong_shape_is_named_under_the_check(
    install: Install, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DSV3_CHECK", "1")
    kernels = install("acme", source("Kernel('silu_mul', 'k', T + 'silu_mul')"))
    kernels.changes["silu_mul"] = lambda out, arguments: out[:, 1:].to(torch.bfloat16)
    model = load()
    with pytest.raises(dsv3.Dsv3Error):
        model.logits(IDS)
    err = capsys.readouterr().err
    assert "first divergence: silu_mul at layers.0.mlp, kernel acme.k" in err
    assert "has shape [5, " in err and "has dtype torch.bfloat16; expected torch.float32" in err


# -- worker processes (tests/plugins/test_worker_selection.py has them as processes)


def test_a_worker_that_would_bind_other_kernels_is_refused(install: Install) -> None:
    install("acme", source(RMS))
    selection = load().placement().selection()
    assert load(selection=selection).placement().selection()["sha256"] == selection["sha256"]
    install("acme", source("Kernel('rms_norm', 'another', T + 'rms_norm')"))
    with pytest.raises(dsv3.BackendUnavailable, match=r"acme\.fast, which is not here"):
        load(selection=selection)
