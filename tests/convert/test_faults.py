"""What was once done wrong without a word: sources of odd shape, folders that hold something else, processes that collide."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import dsv3
from dsv3.checkpoint.convert import compensated
from dsv3.checkpoint.convert.files import FileWriter
from dsv3.checkpoint.convert.journal import Journal
from dsv3.checkpoint.convert.run import convert, plan_conversion
from dsv3.checkpoint.convert.target import Target
from dsv3.errors import CheckpointError, UnsupportedModel, UsageError
from tests.convert.conftest import ALIGNED
from tests.support.checkpoints import FP8, TINY, random_tensors, write_demo, write_hf, write_index
from tests.support.convert import hashes, tensors

WINDOWS = torch.arange(32).view(2, 16)


def test_shards_of_which_one_is_called_model_keep_their_index(tmp_path: Path) -> None:
    made, source = random_tensors(TINY), tmp_path / "source"
    files = {name: "mtp.safetensors" if ".layers.2." in name else "model.safetensors" for name in made}
    source.mkdir()
    (source / "config.json").write_text(json.dumps(TINY))
    for file in set(files.values()):
        save_file({name: made[name] for name in made if files[name] == file}, source / file)
    write_index(source, files)
    convert(str(source), tmp_path / "out", Target("int8"))
    assert dsv3.load(str(tmp_path / "out")).mtp_logits([0, 5, 9]).isfinite().all()


def test_another_source_of_the_same_shape_is_not_taken_for_done(made: dict[str, Path], tmp_path: Path) -> None:
    other = write_hf(tmp_path / "other", TINY, random_tensors(TINY, seed=9, copies=True))
    os.utime(other / "model.safetensors", ns=(0, 0))
    convert(str(made["bf16"]), tmp_path / "out", Target("int8"))
    before = hashes(tmp_path / "out")
    with pytest.raises(UsageError, match="nothing is overwritten"):
        convert(str(other), tmp_path / "out", Target("int8"))
    assert hashes(tmp_path / "out") == before


def test_a_calibrated_result_is_known_by_its_text(made: dict[str, Path], tmp_path: Path) -> None:
    target = Target("int8", calibrate=True)
    convert(str(made["bf16"]), tmp_path / "out", target, windows=WINDOWS)
    before = hashes(tmp_path / "out")
    convert(str(made["bf16"]), tmp_path / "out", target, windows=WINDOWS)
    assert hashes(tmp_path / "out") == before
    for other, windows in ((target, WINDOWS + 1), (Target("int8"), None)):
        with pytest.raises(UsageError, match="nothing is overwritten"):
            convert(str(made["bf16"]), tmp_path / "out", other, windows=windows)


def test_who_comes_second_leaves_the_journal_of_the_first(made: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with Journal(out, "first"):
        with pytest.raises(UsageError, match="another process"):
            convert(str(made["bf16"]), out, Target("int8"))
        assert (out / Journal.NAME).exists()
    with pytest.raises(UsageError, match="unfinished conversion"):
        convert(str(made["bf16"]), out, Target("int8"))
    assert (out / Journal.NAME).exists()


def test_the_lock_of_a_journal_that_was_removed_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ends between the second's opening of the journal and its lock."""
    from dsv3.checkpoint.convert import journal

    real = journal.fcntl.flock

    def late(file: Any, how: int) -> None:
        (tmp_path / Journal.NAME).unlink()
        real(file, how)

    monkeypatch.setattr(journal.fcntl, "flock", late)
    with pytest.raises(UsageError, match="another process"):
        Journal(tmp_path, "name")


@pytest.mark.parametrize("junk", [b"\0" * 40 + b"\n", b'{"file": "x"}\n', b"[1]\n", b"\xff\xfe\n", b'{"fi{"file": 1}\n'])
def test_a_damaged_line_of_the_journal_costs_what_comes_after_it(tmp_path: Path, junk: bytes) -> None:
    with Journal(tmp_path, "name") as journal:
        journal.add("a", "1")
    with (tmp_path / Journal.NAME).open("ab") as file:
        file.write(junk + b'{"file": "b", "digest": "2"}\n')
    with Journal(tmp_path, "name") as journal:
        assert journal.finished == {"a": "1"}
        journal.add("c", "3")
    with Journal(tmp_path, "name") as journal:
        assert journal.finished == {"a": "1", "c": "3"}
    (tmp_path / Journal.NAME).write_bytes(junk)
    with pytest.raises(UsageError, match="delete the folder"):
        Journal(tmp_path, "name")


def interrupted(source: Path, out: Path, target: Target, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """A conversion that is stopped when it would give a name to one file more than `after`."""
    finish, count = FileWriter.finish, 0

    def counted(self: FileWriter) -> str:
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        return finish(self)

    with monkeypatch.context() as patched:
        patched.setattr(compensated.FileWriter, "finish", counted)
        with pytest.raises(KeyboardInterrupt):
            convert(str(source), out, target, windows=WINDOWS)


@pytest.mark.parametrize(
    "harm",
    [
        lambda layers, hidden: layers[0].unlink(),
        lambda layers, hidden: layers[1].write_bytes(layers[1].read_bytes()[:-1] + b"\xff"),
        lambda layers, hidden: [path.unlink() for path in hidden],
        lambda layers, hidden: [path.write_bytes(b"short") for path in hidden],
    ],
    ids=["first gone", "last damaged", "states gone", "states damaged"],
)
def test_layers_that_were_finished_and_harmed_are_made_again(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[list[Path], list[Path]], Any]
) -> None:
    target, out = Target("int4", calibrate=True), tmp_path / "out"
    convert(str(made["bf16"]), tmp_path / "wanted", target, windows=WINDOWS)
    interrupted(made["bf16"], out, target, monkeypatch, after=3)
    layers = sorted(out.glob("model-*"))
    assert len(layers) == 3
    harm(layers[1:], list(out.glob(".dsv3-hidden*")))
    convert(str(made["bf16"]), out, target, windows=WINDOWS)
    assert hashes(out) == hashes(tmp_path / "wanted")


def test_a_text_that_does_not_fit_the_model_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    config = {**TINY, "num_nextn_predict_layers": 2}
    source = write_hf(tmp_path / "source", config, random_tensors(config))
    with pytest.raises(UsageError, match="2 MTP modules need 3"):
        convert(str(source), tmp_path / "out", Target("int4", calibrate=True), windows=WINDOWS[:, :2])
    with pytest.raises(UsageError, match="id 91, the model has 64"):
        convert(str(source), tmp_path / "out", Target("int8", calibrate=True), windows=WINDOWS + 60)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("spelling", [{}, {"dtype": "float32"}, {"torch_dtype": "float32", "dtype": "float32"}])
@pytest.mark.parametrize("to", ["bf16", "int8"])
def test_float32_becomes_bf16_also_in_the_configuration(tmp_path: Path, spelling: dict[str, str], to: str) -> None:
    config = {name: value for name, value in TINY.items() if name != "torch_dtype"} | spelling
    source = write_hf(tmp_path / "source", config, random_tensors(config, dtype=torch.float32))
    convert(str(source), tmp_path / "out", Target(to))  # type: ignore[arg-type]
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {written.get(name, "bfloat16") for name in ("dtype", "torch_dtype")} == {"bfloat16"}
    assert tensors(tmp_path / "out")["model.norm.weight"].dtype.name == "bfloat16"


def test_links_out_of_the_checkpoint_do_not_come_along(made: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(made["bf16"], source)
    (tmp_path / "secret").write_text("mine")
    (source / "inner.txt").write_text("ours")
    (source / "link.txt").symlink_to("inner.txt")
    (source / "dangling.txt").symlink_to("nowhere")
    convert(str(source), tmp_path / "out", Target("int8"))
    assert (tmp_path / "out" / "link.txt").read_text() == "ours" and not (tmp_path / "out" / "link.txt").is_symlink()
    (source / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"README\.md: expected a file inside the checkpoint's folder"):
        convert(str(source), tmp_path / "again", Target("int8"))
    assert not (tmp_path / "again").exists()


def test_a_name_that_leaves_no_room_is_refused_before_the_work(made: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(made["bf16"], source)
    (source / ("n" * 251 + ".txt")).write_text("")
    with pytest.raises(CheckpointError, match="at most 247 bytes; found 255"):
        plan_conversion(str(source), tmp_path / "out", Target("int8"))


@pytest.mark.parametrize(
    ("where", "values", "words"),
    [
        ("", {"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}, "transform_config"),
        ("", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ("group", {"output_activations": {"num_bits": 8}}, "output_activations"),
    ],
)
def test_what_changes_the_arithmetic_is_refused_by_name(
    made: dict[str, Path], tmp_path: Path, where: str, values: dict[str, Any], words: str
) -> None:
    convert(str(made["bf16"]), tmp_path / "int4", Target("int4"))
    path = tmp_path / "int4" / "config.json"
    config = json.loads(path.read_text())
    table = config["quantization_config"]
    (table if not where else table["config_groups"]["group_0"]).update(values)
    path.write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=words):
        dsv3.load(str(tmp_path / "int4"))
    table.update(transform_config={}, sparsity_config={"format": "dense"})
    table["config_groups"]["group_0"]["output_activations"] = None
    path.write_text(json.dumps(config))
    dsv3.load(str(tmp_path / "int4"))


def test_a_group_that_is_null_is_said(made: dict[str, Path], tmp_path: Path) -> None:
    convert(str(made["bf16"]), tmp_path / "int4", Target("int4"))
    path = tmp_path / "int4" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"] = {"group_0": None}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="'group_0' is None"):
        dsv3.load(str(tmp_path / "int4"))


def test_fp8_ranks_that_cut_through_a_block_are_refused(tmp_path: Path) -> None:
    """Two ranks of 96 rows have two scales, as 192 rows have; but the second is of rows 96 on, not 128 on."""
    config = {**ALIGNED, "intermediate_size": 192, "quantization_config": FP8}
    write_demo(tmp_path / "demo", config, random_tensors({**ALIGNED, "intermediate_size": 192}, fp8=True), 2)
    with pytest.raises(CheckpointError, match=r"w1\.weight: expected a multiple of 128 along axis 0; found 96"):
        convert(str(tmp_path / "demo"), tmp_path / "out", Target("bf16"))


def test_copies_that_are_none_are_refused(tmp_path: Path) -> None:
    made = random_tensors(TINY, copies=True)
    made["model.layers.2.embed_tokens.weight"] += 1
    source = write_hf(tmp_path / "source", TINY, made)
    with pytest.raises(CheckpointError, match=r"layers\.2\.embed_tokens\.weight: expected the same bytes"):
        convert(str(source), tmp_path / "out", Target("int8"))
    assert not (tmp_path / "out").exists()
    convert(str(source), tmp_path / "out", Target("int8", mtp=False))
