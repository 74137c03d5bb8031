"""Other engines: what they are given, what becomes of one that is not there, and the file for llama.cpp."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

import dsv3
from dsv3.bench.peers import engines
from dsv3.bench.peers.gguf_file import name_of, tensors, write
from dsv3.bench.peers.run import Job, Outcome, run
from dsv3.bench.peers.workload import Workload, parse
from dsv3.bench.session import random_ids
from dsv3.checkpoint.folder import folder_config
from dsv3.checkpoint.layout import open_checkpoint
from dsv3.checkpoint.validate import plan_load
from dsv3.cli import main
from dsv3.errors import UsageError


def test_workloads() -> None:
    assert parse(["prefill-512", "decode-b8-2048"], 32) == [
        Workload("prefill-512", 1, 512, 0), Workload("decode-b8-2048", 8, 2048, 32),
    ]  # fmt: skip
    assert [w.processed for w in parse(["prefill-512", "decode-b8-2048"], 32)] == [512, 256]
    job = Workload("decode-b2-5", 2, 5, 3).job(100)
    assert job["prompts"] == [random_ids(100, 5, 0), random_ids(100, 5, 1)] and job["prompts"][0] != job["prompts"][1]
    for wrong in ("decode-b0-5", "prefill", "decode-b1-x"):
        with pytest.raises(UsageError, match="neither prefill-N nor decode-bB-N"):
            parse([wrong], 1)


def test_engines_need_nothing_of_dsv3() -> None:
    """They run where dsv3 is not installed."""
    for path in Path(engines.__file__).parent.glob("*.py"):
        if path.name != "run_dsv3.py":
            assert "import dsv3" not in path.read_text() and "from dsv3" not in path.read_text(), path.name


def test_what_goes_wrong_with_an_engine_is_its_outcome(tmp_path: Path, story: Path) -> None:
    hollow = tmp_path / "python"
    hollow.write_text("#!/bin/sh\necho one line >&2\necho the engine exploded >&2\nexit 7\n")
    hollow.chmod(0o755)
    bare = tmp_path / "bare"  # a Python without any package
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    jobs = [
        Job("dsv3", sys.executable, str(tmp_path / "nowhere")), Job("transformers", str(hollow), str(story)),
        Job("vllm", str(bare), str(story)), Job("llama.cpp", str(tmp_path / "none"), "x", "Q8_0"),
    ]  # fmt: skip
    common = {"threads": 1, "dtype": "float32", "repeats": 1, "options": {}, "vocabulary": 64}
    said: list[str] = []
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    found = run(jobs, parse(["prefill-4"], 1), common, scratch, 60, said.append)
    assert [o.label for o in found] == ["dsv3", "transformers", "vllm", "llama.cpp Q8_0"]
    assert "nowhere" in found[0].reason and found[1].reason == "its process ended with 7: the engine exploded"
    assert found[2].reason.startswith("not installed: No module named 'vllm'") and "pip install vllm" in found[2].reason
    assert "cannot be started" in found[3].reason and not any(o.rates for o in found)


def test_an_engine_whose_workers_died_is_asked_what_of(tmp_path: Path) -> None:
    slow = tmp_path / "python"
    (tmp_path / "done.json").write_text(json.dumps({"error": "RuntimeError: see above"}))
    slow.write_text(f'#!/bin/sh\necho "(worker 1) ValueError: no memory"\ncp {tmp_path}/done.json "$4"\n')
    slow.chmod(0o755)
    common = {"threads": 1, "dtype": "float32", "repeats": 1, "options": {}, "vocabulary": 64}
    (found,) = run([Job("vllm", str(slow), "x")], parse(["prefill-4"], 1), common, tmp_path, 9, lambda text: None)
    assert found.reason == "RuntimeError: see above (ValueError: no memory)"


def test_an_engine_that_takes_too_long_keeps_what_it_had(tmp_path: Path) -> None:
    slow = tmp_path / "python"
    row = {"seconds": [0.5], "ids": [[1, 2]]}
    done = {"version": "9", "load_s": 0.1, "peak_bytes": 5, "workloads": {"decode-b1-4": row}}
    (tmp_path / "done.json").write_text(json.dumps(done))
    slow.write_text(f'#!/bin/sh\ncp {tmp_path}/done.json "$4"\nsleep 600 &\nsleep 600\n')
    slow.chmod(0o755)
    common = {"threads": 1, "dtype": "float32", "repeats": 1, "options": {}, "vocabulary": 64}
    (found,) = run(
        [Job("vllm", str(slow), "x")], parse(["decode-b1-4", "prefill-4"], 1), common, tmp_path, 2, lambda text: None
    )
    assert found.rates == {"decode-b1-4": (2.0, 2.0, 2.0)} and found.peak_bytes == 5 and not found.reason
    assert found.failed == {"prefill-4": "took longer than 2 s; give --timeout more"}


def test_tokens_in_common() -> None:
    ours = Outcome("dsv3", ids={"w": [[1, 2, 3, 4], [5, 6, 7, 8]]})
    assert Outcome("x", ids={"w": [[1, 2, 9, 4], [5, 6, 7, 8]]}).same(ours, "w") == 6 / 8
    assert Outcome("x").same(ours, "w") is None


def test_dsv3_beside_transformers(story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The real engines on the real checkpoint: both choose the same tokens in float32."""
    path = tmp_path / "peers.json"
    code = main(["bench", "peers", "--model", str(story), "--backend", "reference", "--dtype", "float32", "--threads", "1",
                 "--only", "transformers", "--workloads", "prefill-8,decode-b2-8", "--tokens", "4", "--repeat", "1",
                 "--json", str(path)])  # fmt: skip
    out, _ = capsys.readouterr()
    found = json.loads(path.read_text())
    ours, other = found["engines"]
    assert code == 0 and (ours["engine"], other["engine"]) == ("dsv3", "transformers")
    for engine in (ours, other):
        assert set(engine["tokens_per_s"]) == {"prefill-8", "decode-b2-8"} and not engine["failed"] and not engine["reason"]
        assert engine["peak_bytes"] > 1e8 and engine["load_s"] > 0
    assert other["same_tokens"] == {"prefill-8": 1.0, "decode-b2-8": 1.0}
    assert "dsv3 over" in out and found["ceilings"]["best"]["read_gb_s"] > 0


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--peer", "vlm=python"], "did you mean 'vllm'"), (["--peer", "vllm=/no/python"], "is no program"),
        (["--only", "llama"], "is not one of"), (["--gguf", "Q4_K"], "is not one of"), (["--repeat", "0"], "at least 1"),
        (["--workloads", "x"], "neither"),
    ],
)  # fmt: skip
def test_wrong_arguments(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "peers", *flags]) == 2
    assert said in capsys.readouterr().err


def test_every_tensor_has_a_place_in_the_file(story: Path) -> None:
    c = folder_config(story)
    items = plan_load(c, open_checkpoint(story), story, mtp=False).items
    made = {m.name: m for m in tensors(c, items, "Q4_0")}
    assert sum(len(m.items) for m in made.values() if ".attn_v_b." not in m.name) == len(items)
    assert made["blk.1.ffn_up_exps.weight"].shape == (16, 128, 256) and made["blk.0.ffn_up.weight"].shape == (768, 256)
    assert made["blk.3.attn_k_b.weight"].shape == (4, 128, 64) and made["blk.3.attn_v_b.weight"].shape == (4, 64, 128)
    assert made["output.weight"].kind == made["token_embd.weight"].kind == "Q8_0"
    assert made["blk.1.exp_probs_b.bias"].kind == made["blk.1.ffn_gate_inp.weight"].kind == "F32"
    assert made["blk.1.ffn_down_exps.weight"].kind == "Q4_0"
    assert {name_of(i) for i in items} == {n.rpartition(".")[0].replace("k_b", "kv_b") for n in made if "v_b" not in n}


def test_llama_cpp_computes_the_same_from_the_file(story: Path, tmp_path: Path) -> None:
    for name in ("gguf", "llama_cpp"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: no file for llama.cpp can be written and read back")
    import numpy as np

    ids = random_ids(4096, 40, 1)
    wanted = dsv3.load(str(story), backend="reference", dtype="float32", mtp=False).logits(ids).numpy()
    sys.path.insert(0, os.fspath(Path(engines.__file__).parent))
    import run_llama_cpp  # type: ignore[import-not-found]
    from llama_cpp import llama_cpp as ll

    for kind, limit in (("F32", 1e-2), ("BF16", 0.2), ("Q8_0", 0.5)):
        write(story, tmp_path / f"{kind}.gguf", kind)
        engine = run_llama_cpp.Engine({"model": str(tmp_path / f"{kind}.gguf"), "threads": 1})
        engine._open(1, 256)
        engine._feed([(token, at, 0, True) for at, token in enumerate(ids)])
        rows = [ll.llama_get_logits_ith(engine.context, at) for at in range(len(ids))]
        found = np.stack([np.ctypeslib.as_array(row, shape=(engine.vocabulary,)).copy() for row in rows])
        assert np.abs(found - wanted).max() < limit * wanted.std(), kind
