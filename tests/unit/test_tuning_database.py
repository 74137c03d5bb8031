"""The tuning database: lines that survive concurrent writers, damage, and other people's lines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.dispatch.tuning.database import Database, Record
from dsv3.errors import UsageError
from dsv3.settings import resolve, tuning_folder


def record(kernel: str = "acme.fast", tokens: tuple[int, int] = (1, 1), us: float = 5.0, **changes: Any) -> Record:
    key = {
        "op": "rms_norm", "dims": {"T": "T", "D": 8}, "dtypes": {"x": "float32"}, "quant": "none", "tokens": list(tokens),
        "family": "cpu", "arch": "cpu_1", "emulated": False, "kernel": kernel, "config": None, "memory": 0,
        "compute_units": None, "versions": {"torch": "1"}, "source": "ab", "layouts": {},
    }  # fmt: skip
    return Record(
        {**key, **changes}, {"median_us": us, "spread": 0.1, "margin": 0.2, "repeats": 5, "when": "2026-01-02T03:04:05Z"}
    )


def test_what_is_written_is_read_and_a_later_measurement_replaces_an_earlier_one(tmp_path: Path) -> None:
    database = Database(tmp_path / "made" / "below", "cpu_1")
    assert database.read().records == []
    database.add([record(us=5.0), record("acme.slow", us=9.0)])
    database.add([record(us=4.0)])
    assert [(r.key["kernel"], r.median_us) for r in database.read().records] == [("acme.slow", 9.0), ("acme.fast", 4.0)]
    database.add([record(us=3.0, memory=1)])  # other conditions: another measurement
    assert len(database.read().records) == 3


_BROKEN = {
    "{not json": "not JSON",
    "[1, 2]": "not a record of format 1",
    '{"format": 2}': "not a record of format 1",
    '{"format": 1, "key": {}}': "key or value is missing",
    '{"format": 1, "key": {}, "value": {}}': "key 'op' is None",
}


@pytest.mark.parametrize("line", _BROKEN)
def test_malformed_lines_are_ignored_with_file_and_line_and_survive_writing(tmp_path: Path, line: str) -> None:
    database = Database(tmp_path, "cpu_1")
    database.add([record()])
    with open(database.path, "a") as file:
        file.write(f"\n{line}\n")
    contents = database.read()
    assert len(contents.records) == 1
    (note,) = contents.notes
    assert f"{database.path}, line 3: ignored: " in note and _BROKEN[line] in note
    database.add([record("acme.other")])  # it may be a newer version's: not ours to delete
    assert len(database.read().records) == 2 and line in database.path.read_text()
    assert database.clear(lambda r: r.key["kernel"] == "acme.other") == 2
    assert [r.key["kernel"] for r in database.read().records] == ["acme.fast"]


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("value", "median_us", 0), ("value", "median_us", float("nan")), ("value", "median_us", "5"), ("key", "tokens", [1]),
        ("key", "tokens", [4, 2]), ("key", "memory", "big"), ("key", "config", [1]), ("key", "kernel", None),
    ],
)  # fmt: skip
def test_a_line_with_a_field_that_is_not_what_it_should_be_is_malformed(
    tmp_path: Path, part: str, name: str, value: Any
) -> None:
    made = json.loads(record().line())
    made[part][name] = value
    database = Database(tmp_path, "cpu_1")
    database.path.write_text(json.dumps(made) + "\n")
    contents = database.read()
    assert contents.records == [] and name in contents.notes[0]


@given(st.binary(max_size=200))
def test_reading_never_fails_for_what_the_file_holds(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    database = Database(tmp_path_factory.mktemp("db"), "cpu_1")
    database.path.write_bytes(raw)
    assert database.read().records == []


_WRITER = """
import json, sys
from pathlib import Path
from dsv3.dispatch.tuning.database import Database, Record
made = json.loads(sys.argv[3])
for i in range(25):
    key = {**made["key"], "kernel": f"acme.{sys.argv[2]}_{i}"}
    Database(Path(sys.argv[1]), "cpu_1").add([Record(key, made["value"])])
"""


def test_concurrent_writers_lose_nobodys_lines(tmp_path: Path) -> None:
    line = record().line()
    writers = [subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path), str(n), line]) for n in range(4)]
    assert [w.wait(60) for w in writers] == [0] * 4
    contents = Database(tmp_path, "cpu_1").read()
    assert {r.key["kernel"] for r in contents.records} == {f"acme.{n}_{i}" for n in range(4) for i in range(25)}
    assert contents.notes == [] and {p.name for p in tmp_path.iterdir()} == {"cpu_1.jsonl", "cpu_1.lock"}


def test_an_architecture_cannot_name_a_file_elsewhere(tmp_path: Path) -> None:
    assert Database(tmp_path, "../../etc/x y").path.parent == tmp_path
    assert Database(tmp_path, "..").path.parent == tmp_path
    assert Database(tmp_path, "sm_90").path == tmp_path / "sm_90.jsonl"


def test_a_folder_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="DSV3_TUNING_DIR"):
        Database(tmp_path / "file", "cpu_1").add([record()])


def test_the_folder_is_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert tuning_folder() == tmp_path / "data" / "dsv3" / "tuning"
    (tmp_path / "config.toml").write_text(f'tuning_dir = "{tmp_path}/from_file"')
    monkeypatch.setenv("DSV3_CONFIG", str(tmp_path / "config.toml"))
    assert tuning_folder() == tmp_path / "from_file"
    monkeypatch.setenv("DSV3_TUNING_DIR", str(tmp_path / "variable"))
    assert tuning_folder() == tmp_path / "variable" and tuning_folder(str(tmp_path / "flag")) == tmp_path / "flag"
    assert resolve({})["tuning_dir"].source == "DSV3_TUNING_DIR"
