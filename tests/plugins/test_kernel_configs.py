"""Configurations of kernels: tables, their mistakes, and how the chosen one reaches the kernel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import dsv3
import dsv3.conformance
from dsv3.dispatch.choose import choose
from dsv3.errors import BackendUnavailable
from dsv3.loading import calls
from tests.support.tuning import CONFIGURED, FLAGS, OPTIONS, THREE, Install, chosen, forget, install, notes, run, table  # noqa: F401


def test_a_kernel_gets_the_first_configuration_that_matches_until_another_is_measured_faster(
    install: Install, tmp_path: Path
) -> None:
    table(
        tmp_path,
        {"arch": ["elsewhere"], "config": {"BLOCK": 1, "SLEEP": 0}},
        {"when": {"T": [1, 2], "D": [256, 256]}, "config": {"BLOCK": 2, "SLEEP": 0.005}},
        {"config": {"BLOCK": 3, "SLEEP": 0.006}},
        {"arch": ["cpu_1"], "config": {"BLOCK": 4, "SLEEP": 0}},
        {"config": {"BLOCK": 5, "SLEEP": 0, "RIGHT": False}},
    )
    kernels = install(CONFIGURED)
    found = {(c["span"], c["config"]["BLOCK"]) for c in chosen()["choices"]}
    assert found == {("1-2", 2), ("1-2", 3), (">=3", 3)}  # the norm of the latents is 128 wide
    dsv3.load("demo", **OPTIONS).logits([1, 2])
    assert set(kernels.calls) == {2, 3}
    report = run(tmp_path)
    assert {r.candidate.config["BLOCK"] for _, r in report.wrong if r.candidate.config} == {5}
    assert {row.winner.name for row in report.rows if row.winner} == {"acme.tiled (BLOCK=4, SLEEP=0)"}
    assert {c["config"]["BLOCK"] for c in chosen()["choices"]} == {4} and "config BLOCK=4, SLEEP=0" in chosen()["why"]
    kernels.calls.clear()
    dsv3.load("demo", **OPTIONS).logits([1, 2])
    assert set(kernels.calls) == {4}
    table(tmp_path, {"config": {"BLOCK": 4, "SLEEP": 0}}, {"config": {"BLOCK": 6, "SLEEP": 0}})
    assert "the kernel's source changed" in notes()


def test_a_kernel_without_a_configuration_for_the_device_is_not_eligible(install: Install, tmp_path: Path) -> None:
    table(tmp_path, {"arch": ["elsewhere"], "config": {"BLOCK": 1, "SLEEP": 0}})
    install(CONFIGURED)
    found = chosen()
    assert found["chosen"] == "reference.torch"
    assert any("dsv3_acme_data:tiled.json has no configuration for cpu_1" in r["reason"] for r in found["rejected"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"op": "rms_nrom"}, r"key 'op': expected 'rms_norm', found 'rms_nrom'"),
        ({"configs": []}, r"key 'configs': expected a list with at least one entry"),
        ({"config": []}, r"key 'config': expected op or configs; did you mean 'configs'"),
        ({"configs": [{"confg": {}}]}, r"configs\[0\]\.confg: expected one of arch, when, config"),
        ({"configs": [{"config": {"A": [1]}}]}, r"configs\[0\]\.config\.A: expected a number, a string or a boolean"),
        ({"configs": [{"config": {}, "arch": "sm_90"}]}, r"configs\[0\]\.arch: expected a list of architectures"),
        ({"configs": [{"config": {}, "when": {"K": [1, 2]}}]}, r"configs\[0\]\.when\.K: expected a dimension of rms_norm"),
        (
            {"configs": [{"config": {}}, {"config": {}, "when": {"T": [4, 2]}}]},
            r"configs\[1\]\.when\.T: expected \[first, last\]",
        ),
    ],
)
def test_a_mistake_in_a_table_is_named_with_file_and_key(
    install: Install, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    table(tmp_path, {"config": {}}, **changes)
    install(CONFIGURED)
    with pytest.raises(BackendUnavailable, match=message) as caught:
        chosen()
    assert "dsv3_acme_data:tiled.json" in str(caught.value) and "acme.tiled" in str(caught.value)


def test_a_table_that_is_missing_or_a_function_without_config_rejects_the_backend(install: Install, tmp_path: Path) -> None:
    install(CONFIGURED.replace("dsv3_acme_data:tiled.json", "no_such_table"))
    with pytest.raises(BackendUnavailable, match=r"configs/kernels/no_such_table\.json"):
        chosen()
    table(tmp_path, {"config": {}})
    install(CONFIGURED.replace("T + 'tiled'", "T + 'fast'"))
    with pytest.raises(BackendUnavailable, match="because the kernel has configs, the keyword config"):
        chosen()


def test_source_and_calls_are_those_of_load(install: Install) -> None:
    install()
    source, sites = calls("demo", **OPTIONS)
    assert source.name == choose("acme", None, None).name and any(site.op == "rms_norm" for site in sites.all)


def test_conformance_runs_a_kernel_with_the_configuration_of_each_call(install: Install, tmp_path: Path) -> None:
    table(tmp_path, {"when": {"T": [1, 1]}, "config": {"BLOCK": 1, "SLEEP": 0}}, {"config": {"BLOCK": 2, "SLEEP": 0}})
    kernels = install(CONFIGURED)
    report = dsv3.conformance.run("acme", ops=["rms_norm"], size="quick")
    mine = [case for case in report.cases if case.kernel == "acme.tiled" and case.status != "absent"]
    assert mine and not report.failed and set(kernels.calls) == {1, 2}


def test_a_selection_carries_the_configurations_to_workers(install: Install, tmp_path: Path) -> None:
    table(tmp_path, {"config": {"BLOCK": 1, "SLEEP": 0.005}}, {"config": {"BLOCK": 2, "SLEEP": 0}})
    kernels = install(CONFIGURED)
    run(tmp_path)
    selection = json.loads(json.dumps(dsv3.load("demo", **OPTIONS, device="meta").placement().selection()))
    for file in (tmp_path / "tuning").iterdir():
        file.unlink()  # a worker on another machine has measured nothing
    kernels.calls.clear()
    model = dsv3.load("demo", **OPTIONS, selection=selection)
    model.logits([1, 2])
    assert set(kernels.calls) == {2}
