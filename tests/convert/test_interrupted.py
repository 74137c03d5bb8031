"""Whatever happens to a conversion, no half-written file has a final name, and the next try ends in the same bytes."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from dsv3.checkpoint.convert.journal import Journal
from dsv3.checkpoint.convert.run import convert as convert_here
from dsv3.checkpoint.convert.target import Target
from dsv3.errors import CheckpointError, UsageError
from tests.support.checkpoints import FP8, TINY, poke, random_tensors, write_hf
from tests.support.convert import command, convert, hashes

LARGER = {**TINY, "num_hidden_layers": 3, "hidden_size": 384, "intermediate_size": 512, "moe_intermediate_size": 256}


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 9 MB of FP8 in six shards."""
    tensors = random_tensors(LARGER, fp8=True)
    return write_hf(tmp_path_factory.mktemp("larger") / "fp8", {**LARGER, "quantization_config": FP8}, tensors, shards=6)


def names(folder: Path) -> set[str]:
    """What has a final name."""
    if not folder.exists():
        return set()
    return {p.name for p in folder.iterdir() if not p.name.endswith(".partial") and not p.name.startswith(".dsv3-")}


def killed_and_resumed(arguments: list[object], out: Path, wanted: dict[str, str], rng: random.Random, most: float) -> int:
    """Kill a conversion at a random moment; what is left is right, and goes on. How many files were whole by then."""
    process = subprocess.Popen(command(*arguments), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    time.sleep(rng.uniform(0, most))
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = names(out)
    for name in left:
        assert hashes(out)[name] == wanted[name], f"{name} has its final name but not its bytes"
    convert(*arguments)
    assert hashes(out) == wanted
    return len(left)


@pytest.mark.parametrize(("moments", "to"), [(3, "bf16"), pytest.param(20, "bf16", marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_in_the_same_bytes(larger: Path, tmp_path: Path, moments: int, to: str) -> None:
    start = time.perf_counter()
    convert(larger, tmp_path / "wanted", "--to", to)
    seconds = time.perf_counter() - start
    wanted, rng = hashes(tmp_path / "wanted"), random.Random(5)
    for moment in range(moments):
        out = tmp_path / f"out{moment}"
        killed_and_resumed([larger, out, "--to", to], out, wanted, rng, seconds)
        shutil.rmtree(out)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["int8", "int4"])
def test_a_calibrated_conversion_goes_on_too(story: Path, shared_data: Path, tmp_path: Path, to: str) -> None:
    text = shared_data / "data" / "train" / "aesop.txt"
    arguments: list[object] = ["--to", to, "--calibrate", text, "--calibrate-tokens", 1024]
    start = time.perf_counter()
    convert(story, tmp_path / "wanted", *arguments)
    seconds = time.perf_counter() - start
    wanted, rng = hashes(tmp_path / "wanted"), random.Random(6)
    for moment in range(4):
        out = tmp_path / f"out{moment}"
        killed_and_resumed([story, out, *arguments], out, wanted, rng, seconds)


def test_a_finished_file_that_changed_is_made_again(larger: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(larger, tmp_path / "wanted", "--to", "bf16")
    wanted = hashes(tmp_path / "wanted")
    convert_partly(larger, out)
    name = sorted(names(out))[0]
    raw = bytearray((out / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (out / name).write_bytes(bytes(raw))
    (out / sorted(names(out))[1]).write_bytes(b"short")
    convert(larger, out, "--to", "bf16")
    assert hashes(out) == wanted


def convert_partly(source: Path, out: Path) -> None:
    """A conversion that fails at its last shard, after five whole ones."""
    broken = sorted(source.glob("*.safetensors"))[-1]
    good = broken.read_bytes()
    stat = broken.stat()
    first = next(n for n in _names(broken) if n.endswith("down_proj.weight"))
    poke(broken, first, np.array([0x7F], np.uint8))
    os.utime(broken, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    try:
        convert(source, out, "--to", "bf16", "--workers", 1, code=4)
    finally:
        broken.write_bytes(good)
        os.utime(broken, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert len(names(out)) == 5


def _names(path: Path) -> list[str]:
    from dsv3.checkpoint.header import read_header

    return list(read_header(path))


def test_nan_in_a_shard_ends_in_an_error_that_names_it(larger: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(larger, source)
    shard = sorted(source.glob("*.safetensors"))[0]
    tensor = next(n for n in _names(shard) if n.endswith("down_proj.weight"))
    poke(shard, tensor, np.array([0xFF], np.uint8))
    with pytest.raises(CheckpointError, match=r"NaN codes") as refused:
        convert_here(str(source), tmp_path / "out", Target("bf16"))
    assert shard.name in str(refused.value) and tensor in str(refused.value)
    assert not (tmp_path / "out" / shard.name).exists() and not list((tmp_path / "out").glob("*.partial"))


def test_a_truncated_shard_is_refused_before_anything_is_written(larger: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(larger, source)
    shard = sorted(source.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "truncated" in convert(source, tmp_path / "out", "--to", "bf16", code=4)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_full_is_said(larger: Path, tmp_path: Path) -> None:
    """The operating system refuses to let a file grow past 64 kB: what it says of a full disk, but for the words."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, 64 << 10))

    said = convert(larger, tmp_path / "out", "--to", "bf16", code=1, preexec_fn=limit)
    assert "cannot be written" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def mounted(folder: Path, options: str) -> None:
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip() or 'mount failed'}")


def test_too_small_and_read_only_disks_are_said(larger: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    mounted(small, "size=4m")
    try:
        said = convert(larger, small / "out", "--to", "bf16", code=1)
        assert "needs" in said and "are free" in said and not (small / "out").exists()
        subprocess.run(["mount", "-o", "remount,ro", small], check=True)
        said = convert(larger, small / "out", "--to", "bf16", code=1)
        assert "Read-only file system" in said and "Traceback" not in said
    finally:
        subprocess.run(["umount", small], check=True)


def test_nothing_is_overwritten(larger: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokenizer.json").write_text("mine")
    with pytest.raises(UsageError, match=r"holds tokenizer\.json: nothing is overwritten"):
        convert_here(str(larger), out, Target("bf16"))
    assert (out / "tokenizer.json").read_text() == "mine"
    convert_here(str(larger), tmp_path / "done", Target("bf16"))
    with pytest.raises(UsageError, match="nothing is overwritten"):
        convert_here(str(larger), tmp_path / "done", Target("int8"))
    with pytest.raises(UsageError, match="is the checkpoint itself"):
        convert_here(str(larger), larger, Target("bf16"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        convert_here(str(larger), tmp_path / "file", Target("bf16"))


def test_what_is_complete_is_left_alone_unless_the_source_is_newer(larger: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(larger, source)
    convert(source, out, "--to", "bf16")
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert "nothing to do" in convert(source, out, "--to", "bf16")
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    next(source.glob("*.safetensors")).touch()
    assert "nothing is overwritten" in convert(source, out, "--to", "bf16", code=2)


def test_another_conversion_in_the_folder_is_not_gone_on_with(larger: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_partly(larger, out)
    with pytest.raises(UsageError, match="unfinished conversion of another checkpoint, or with other options"):
        convert_here(str(larger), out, Target("int8"))
    assert len(names(out)) == 5


def test_two_processes_do_not_write_one_folder(larger: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with Journal(out, "first"), pytest.raises(UsageError, match="another process"):
        convert_here(str(larger), out, Target("bf16"))


def test_a_dry_run_writes_nothing(larger: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dsv3.cli import main

    assert main(["convert", str(larger), str(tmp_path / "out"), "--to", "int4", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "I32" in said and "model-00001-of-00006.safetensors" in said and "free" in said
    assert not (tmp_path / "out").exists()
