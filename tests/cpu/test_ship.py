"""Kernels that came with the package: used without numba, or not at all where they are not of these sources or damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsv3_cpu import ahead, objects, processor, ship
from dsv3_cpu.programs import EXPORTED, program_name

_STORY = """
import json, sys, dsv3
from dsv3_cpu import programs
with dsv3.load("demo", backend="cpu") as model:
    text = model.generate(["Once upon a time", "The little fox"], max_new_tokens=4)[0].text
    model.generate("Once upon a time there was a fox who lived in the woods. " * 4, max_new_tokens=2)
print(json.dumps({"numba": "numba" in sys.modules, "used": programs.used, "text": text}))
"""


def _told(cache: Path, **environment: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", _STORY], env={**os.environ, "NUMBA_CACHE_DIR": str(cache), **environment},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_common_programs_are_what_the_demo_uses() -> None:
    used = {tuple(entry) for entry in _told(objects.cache_folder().parent)["used"]}
    assert len(used) > 10 and used <= set(ahead.common("short", "long"))


def test_a_first_start_needs_no_numba_where_kernels_came_with_the_package(tmp_path: Path) -> None:
    level = processor.level()
    if level is None or not objects.installed_folder(level).exists():
        pytest.skip("this package was built without kernels for this processor, or its sources changed since")
    told = _told(tmp_path / "empty")
    assert told["numba"] is False and not list(tmp_path.rglob("*.o"))
    assert told["text"] == _told(objects.cache_folder().parent)["text"], "as from its own kernels, or these"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder of objects that came with the package, empty; and an empty cache."""
    folder = tmp_path / "installed"
    folder.mkdir()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(objects, "installed_folder", lambda level: folder)
    monkeypatch.setattr(objects, "level", lambda: "x86-64-v3")
    _forget_folders()
    yield folder
    monkeypatch.undo()
    _forget_folders()


def _forget_folders() -> None:
    objects.cache_folder.cache_clear()
    objects._folders.cache_clear()


def test_an_installed_object_is_read_and_a_damaged_one_is_not(installed: Path) -> None:
    assert objects.read("some") is None and not objects.is_there("some")
    objects.keep("some", b"code")
    shutil.move(objects.cache_folder() / objects.file_of("some"), installed)
    assert objects.is_there("some") and objects.read("some") == b"code"
    objects.keep("some", b"newer")
    assert objects.read("some") == b"newer", "the user's own come first"
    (objects.cache_folder() / objects.file_of("some")).write_bytes(b"damaged")
    assert objects.read("some") == b"code"
    (installed / objects.file_of("some")).write_bytes(b"damaged")
    assert objects.read("some") is None


def test_objects_are_of_these_sources_and_of_a_level_that_the_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processor.sources().hex()[:16] in objects.installed_folder("x86-64-v3").name
    monkeypatch.setattr(processor.platform, "machine", lambda: "x86_64")
    for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_OPT"):
        monkeypatch.delenv(name, raising=False)
    for missing, wanted in ((None, "x86-64-v4"), ("avx512vnni", "x86-64-v3"), ("fma", None)):
        there = {feature: feature != missing for feature in processor.LEVELS["x86-64-v4"]}
        monkeypatch.setattr(processor.llvm, "get_host_cpu_features", lambda there=there: there)
        assert processor.level() == wanted
    monkeypatch.setattr(processor.llvm, "get_host_cpu_features", lambda: dict.fromkeys(processor.LEVELS["x86-64-v4"], True))
    monkeypatch.setenv("NUMBA_NUM_THREADS", "1")
    assert processor.level() == "x86-64-v4", "what numba is told of threads has nothing to do with it"
    monkeypatch.setenv("NUMBA_CPU_NAME", "haswell")
    assert processor.level() is None, "somebody chose what to compile for"
    monkeypatch.delenv("NUMBA_CPU_NAME")
    monkeypatch.setattr(processor.platform, "machine", lambda: "aarch64")
    assert processor.level() is None


def test_what_is_wanted_has_names_of_its_own() -> None:
    for everything in (False, True):
        names = [program_name(*entry) for entry in ship.wanted(everything)]
        assert len(set(names)) == len(names) > len(EXPORTED)
