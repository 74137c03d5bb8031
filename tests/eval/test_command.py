"""`dsv3 eval` as a person calls it."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from dsv3.cli import main
from tests.eval.conftest import TALES


@pytest.fixture()
def tales(tmp_path: Path) -> Path:
    folder = tmp_path / "tales"
    folder.mkdir()
    for n, tale in enumerate(TALES):
        (folder / f"{n}.txt").write_text(tale)
    return folder


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["eval", *arguments])
    return code, *capsys.readouterr()


def test_a_scheme_beside_the_same_checkpoint(tales: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    flags = ["--backend", "reference", "--dtype", "float32", "--window", "32", "--quant", "int4-w4a16", "--against", "none"]
    files = ["--json", str(out / "found.json"), "--plot", str(out / "found.svg")]
    code, said, errors = call(capsys, "--text", str(tales), *flags, *files)
    assert code == 0
    data = json.loads((out / "found.json").read_text())
    assert ET.parse(out / "found.svg").getroot().tag.endswith("svg")
    assert sorted(p.name for p in out.iterdir()) == ["found.json", "found.svg"]
    assert (data["model"]["quant"], data["against"]["quant"]) == ("int4-w4a16", "none")
    rows = {line.split("  ")[0]: re.split(r" {2,}", line)[1:] for line in said.splitlines() if line}
    assert rows["loss, nats per token"][:2] == [f"{data[m]['loss']:.4f}" for m in ("model", "against")]
    assert rows["weights, bytes"][:2] == [f"{data[m]['weight_bytes']:,}" for m in ("model", "against")]
    assert rows["MTP acceptance"][0] == f"{data['model']['mtp_acceptance']:.4f}"
    kl = next(line for line in said.splitlines() if line.startswith("KL(demo none || demo int4-w4a16)"))
    assert f"{data['difference']['kl']:.3e}" in kl
    assert [r for r in rows if r.endswith(".txt")] == ["0.txt", "1.txt", "2.txt"]
    assert errors.startswith("dsv3: demo on reference") and "weights int4-w4a16" in errors and "weights none" in errors


def test_a_model_alone_and_flags_for_it_alone(tales: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = call(capsys, "--text", str(tales / "0.txt"), str(tales / "1.txt"), "--tokens", "40", "--no-mtp")
    assert code == 0 and said.startswith("40 tokens in 1 windows of 40")
    assert "MTP" not in said and "difference" not in said and "KL" not in said
    flags = ["--kv-dtype", "fp8", "--kernel", "linear=reference.torch", "--against", "demo", "--tokens", "20"]
    code, said, errors = call(capsys, "--text", str(tales), "--text", str(tales), *flags)
    assert code == 0 and "cache fp8" in errors and "cache bfloat16" in errors
    assert "demo fp8-w8a16 fp8" in said and "demo fp8-w8a16 bfloat16" in said


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "--text"),
        (["--text", "{tmp}/none.txt"], 2, "does not exist"),
        (["--text", "{tmp}"], 2, "folder without *.txt"),
        (["--text", "{tales}", "--window", "1"], 2, "at least 2"),
        (["--text", "{tales}", "--window", "x"], 2, "invalid int"),
        (["--text", "{tales}", "--window", "8000", "--tokens", "1"], 2, "at least 2"),
        (["--text", "{tales}", "--against", "int8-w8a61"], 2, "did you mean 'int8-w8a16'"),
        (["--text", "{tales}", "--against", "~nobody-here/x"], 2, "neither a folder nor"),
        (["--text", "{tales}", "--against", "{tales}/0.txt"], 2, "is a file"),
        (["--text", "{tales}", "--against", "{tales}"], 4, "no config.json"),
        (["--text", "{tales}", "--model", "{tales}"], 4, "no config.json"),
        (["--text", "{tales}", "--model", "671B"], 2, "without weights"),
        (["--text", "{tales}", "--device", "meta"], 2, "no weights"),
        (["--text", "{tales}", "--plot", "{tmp}/x.png"], 2, "ends in .svg"),
        (["--text", "{tales}", "--json", "{tmp}/no/x.json"], 2, "no folder"),
        (["--text", "{tales}", "--json", "{tmp}"], 2, "is a folder"),
        (["--text", "{tales}", "--backend", "nothing"], 3, "nothing"),
    ],
)
def test_errors_say_what_is_wrong(
    tales: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str
) -> None:
    got, out, errors = call(capsys, *[a.format(tmp=tmp_path, tales=tales) for a in arguments])
    assert (got, out) == (code, "")
    assert errors.splitlines()[-1].startswith("error: ") and said in errors


def test_a_folder_without_tokenizer_is_named(tales: Path, lookalike: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (lookalike / "tokenizer.json").unlink()
    code, out, errors = call(capsys, "--text", str(tales), "--against", str(lookalike))
    assert (code, out) == (2, "") and "lookalike has no tokenizer.json" in errors
