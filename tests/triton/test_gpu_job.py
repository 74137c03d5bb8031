"""The job for a GPU: its counts, its table of calls, and the whole of it in emulation."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from dsv3.ops import names, spec

FOLDER = Path(__file__).parents[2] / "ci" / "gpu"
MODULES = (
    "timing",
    "ceilings",
    "peers",
    "kernels",
    "conform",
    "report",
    "run",
)


@pytest.fixture(scope="module")
def job():
    """The job's modules by name; they import each other as scripts do, and are forgotten afterwards."""
    sys.path.insert(0, str(FOLDER))
    before = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    shared = {"shapes": "dsv3.bench.calls.shapes", "calls": "dsv3.bench.calls.table"}
    yield {name: importlib.import_module(shared.get(name, name)) for name in (*shared, *MODULES)}
    while str(FOLDER) in sys.path:
        sys.path.remove(str(FOLDER))
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.modules.update(before)


def _call(job, name):
    return next(c for c in job["calls"].all_calls(job["shapes"].V3) if c.name == name)


def _bytes(job, call):
    return call.nbytes(call.arguments(job["shapes"].Maker(job["shapes"].V3, "meta")))


@pytest.mark.parametrize(
    "name, moved, flop",
    [
        # x in bf16; codes and a scale per 128 channels out
        ("act_quant T=32", 32 * 7168 * (2 + 1) + 32 * 56 * 4, 0),
        # [7168, 16 heads x 128] in FP8 with 56 x 16 block scales
        ("quant_linear o fp8-w8a8 T=8", 7168 * 2048 + 56 * 16 * 4 + 8 * (2048 + 7168) * 2, 2 * 8 * 7168 * 2048),
        # [2 x 18432 / 8, 7168]: two codes a byte, a scale per 128
        ("quant_linear dense13 int4-w4a16 T=1", 4608 * (3584 + 56 * 4) + (7168 + 4608) * 2, 2 * 4608 * 7168),
        # 4096 rows of 512 codes, 4 scales, 64 bf16; q [16, 512 + 64] and o [16, 512] in bf16, lse; 64 pages, a length, cu_q
        (
            "mla_decode fp8 cache T=1",
            4096 * (512 + 16 + 128) + 16 * (576 + 512) * 2 + 16 * 4 + 64 * 4 + 4 + 8,
            2 * 16 * 4096 * (576 + 512),
        ),
        # the lower triangle: 512 x 513 / 2 pairs
        ("mla_prefill causal T=512", 512 * 16 * (192 + 192 + 128 + 128) * 2 + 16 * 512 * 4 + 16, 512 * 513 * 16 * 320),
        # rows of the table, not the table
        ("embedding T=8", 8 * 4 + 2 * 8 * 7168 * 2, 0),
        ("apply_rope T=1", 2 * 16 * 64 * 2 + 4 + 64 * 4, 0),
    ],
)
def test_bytes_and_flop_are_those_of_a_count_by_hand(job, name, moved, flop):
    call = _call(job, name)
    assert (_bytes(job, call), call.flop) == (moved, flop)


def test_only_experts_that_have_tokens_are_counted(job):
    call, shapes = _call(job, "fused_experts ep8 fp8-w8a8 T=1"), job["shapes"]
    ids = shapes.chosen(1, 8, 256, 32)
    here = ids[ids >= 0].tolist()
    assert 1 <= len(here) == len(set(here)) <= 8
    expert = 3 * 2048 * 7168 + (32 * 56 + 56 * 16) * 4
    assert _bytes(job, call) == len(here) * expert + 2 * 7168 * 2 + 8 * (4 + 4)
    assert call.flop == len(here) * 6 * 2048 * 7168


def test_every_operator_has_well_formed_calls(job):
    shapes, calls = job["shapes"], job["calls"]
    assert sorted(calls.TABLE) == sorted(names())
    for m in (shapes.V3, shapes.TINY):
        found = calls.all_calls(m)
        assert {c.op for c in found} == set(names()) and len({c.name for c in found}) == len(found)
        for call in found:
            arguments = call.arguments(shapes.Maker(m, "meta"))
            assert set(arguments) == set(spec(call.op).parameters), call.name
            spec(call.op).bind(arguments)
            assert call.nbytes(arguments) > 0 and (call.flop > 0) == bool(call.unit), call.name
    assert {c.tokens for c in calls.all_calls(shapes.V3)} == {1, 8, 32, 128, 512, 2048, 8192}


def test_the_reference_takes_every_call(job):
    shapes = job["shapes"]
    for call in job["calls"].all_calls(shapes.TINY):
        out = spec(call.op).reference(**call.arguments(shapes.Maker(shapes.TINY, "cpu")))
        for tensor in out if isinstance(out, tuple) else () if out is None else (out,):
            assert bool(torch.isfinite(tensor.float()).all()), call.name


def test_data_is_made_often_enough_to_leave_the_cache(job):
    clock = job["timing"].Clock(torch.device("cpu"), "sm_90", True)
    clock.emulated, clock.cache_bytes, clock.memory = False, 50 << 20, 80 << 30
    assert clock.copies(1 << 30) == 2 and clock.copies(10 << 20) == 11
    assert clock.copies(1000) == 128 and not clock.cold(1000) and clock.cold(1 << 20)
    assert clock.copies(60 << 30) == 1


def _keys(result):
    return {"ceilings", "conformance", "rows", "left_out", "device", "arch", "driver", "torch", "triton", "date"} <= set(result)


def test_the_whole_job_in_emulation(job, tmp_path, capsys):
    arguments = ["--emulate", "sm_90", "--out", str(tmp_path), "--ops", "act_quant", "--budget", "9"]
    code = job["run"].main(arguments)
    result = json.loads((tmp_path / "emulated-sm_90.json").read_text())
    assert code == 0 and result["finished"] and _keys(result)
    assert [p.name for p in tmp_path.iterdir()] == ["emulated-sm_90.json"]
    assert result["emulated"] and result["note"] == "emulated: times mean nothing"
    calls = {f"act_quant T={row['tokens']}" for row in result["rows"]} | {e["what"] for e in result["left_out"]}
    assert {"act_quant T=1", "act_quant T=3", "act_quant T=5"} <= calls  # measured, or said to be left out
    assert all(c["value"] is None for c in result["ceilings"].values())
    suite = result["conformance"]
    assert not suite["failed"] and not suite["error"] and sum(suite["counts"]["L0"].values()) > 0
    missing = [e["what"] for e in result["left_out"] if e["what"].startswith("conformance L1")]
    assert bool(missing) != suite["complete"]
    out, err = capsys.readouterr()
    assert "times mean nothing" in out and "act_quant" in out and "ceilings known" in err


def test_rows_of_an_emulated_device_have_no_times(job, tmp_path):
    arguments = ["--emulate", "gfx942", "--out", str(tmp_path / "x.json"), "--only", "kernels", "--ops", "act_quant"]
    assert job["run"].main([*arguments, "--budget", "60"]) == 0
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [row["tokens"] for row in rows] == [1, 3, 5]
    for row in rows:
        assert row["us"] is row["spread"] is row["share_of_copy"] is None and row["error"] == "" and row["how"] == "emulated"
        assert row["bytes"] == row["tokens"] * (256 * 3 + 2 * 4) and row["config"]
        assert [(p["us"], p["ratio"], p["error"]) for p in row["peers"]] == [(None, None, "")]


def test_without_time_everything_is_listed_as_left_out(job, tmp_path):
    code = job["run"].main(["--emulate", "gfx942", "--out", str(tmp_path), "--budget", "0", "--only", "ceilings,kernels"])
    result = json.loads((tmp_path / "emulated-gfx942.json").read_text())
    assert code == 0 and result["rows"] == []
    named = {e["what"].split(" ")[0] for e in result["left_out"]}
    assert set(names()) <= named and {"what": "conformance", "why": "not asked for"} in result["left_out"]
    assert {"what": "act_quant T=1", "why": "time"} in result["left_out"]


def test_a_kernel_that_raises_is_a_row_and_an_exit_code(job, tmp_path, monkeypatch, capsys):
    def broken(**arguments):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(job["kernels"], "resolve", lambda kernel, name: broken)
    arguments = ["--emulate", "sm_80", "--out", str(tmp_path / "x.json"), "--only", "kernels", "--ops", "act_quant"]
    assert job["run"].main(arguments) == 1
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert len(rows) == 3 and all("out of luck" in row["error"] and row["us"] is None for row in rows)
    assert "FAILED" in capsys.readouterr().out


def test_a_result_is_replaced_as_a_whole_or_not_at_all(job, tmp_path):
    path = tmp_path / "card.json"
    job["report"].save({"rows": []}, path)
    with pytest.raises(ValueError):
        job["report"].save({"rows": [float("nan")]}, path)
    assert json.loads(path.read_text()) == {"rows": []} and list(tmp_path.iterdir()) == [path]


def test_topk_routing_of_the_peers_is_the_operators(job):
    shapes = job["shapes"]
    call = next(c for c in job["calls"].all_calls(shapes.TINY) if c.op == "grouped_topk")
    arguments = call.arguments(shapes.Maker(shapes.TINY, "cpu"))
    weights, ids = spec("grouped_topk").reference(**arguments)
    (peer,) = job["peers"].peers("grouped_topk", arguments)
    theirs, chosen = peer.make(arguments)()
    torch.testing.assert_close(weights.sort(-1)[0], theirs.sort(-1)[0])
    assert torch.equal(ids.long().sort(-1)[0], chosen.sort(-1)[0])


class _Event:
    """A device whose every call takes 10 us, in a replay as outside."""

    now = 0.0

    def __init__(self, enable_timing):
        self.at = 0.0

    def record(self):
        self.at = _Event.now

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return (end.at - self.at) / 1e3


class _Graph:
    """What is called while it captures is played again."""

    def __init__(self):
        self.cost = 0.0

    def replay(self):
        _Event.now += self.cost

    def __enter__(self):
        self.begun = _Event.now

    def __exit__(self, *error):
        self.cost, _Event.now = _Event.now - self.begun, self.begun


@pytest.mark.parametrize("how", ["graph", "events"])
def test_time_is_the_median_of_one_call(job, monkeypatch, how):
    def refused(graph):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    monkeypatch.setattr(torch.cuda, "graph", refused if how == "events" else lambda graph: graph)
    monkeypatch.setattr(torch.cuda, "device", lambda device: _Graph())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    clock = job["timing"].Clock(torch.device("cpu"), "sm_90", True)
    clock.emulated = False

    def call():
        _Event.now += 10.0

    found = clock.time([call, call], seconds=0.0)
    assert found.how == how and found.us == found.least_us == pytest.approx(10) and found.spread == pytest.approx(0)
    assert found.repeats == 5 and found.calls == 20  # 200 us a replay
