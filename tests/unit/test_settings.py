"""Flag, variable, file, default, in this order; unknown names are errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3.errors import UsageError
from dsv3.settings import OTHER_VARIABLES, PREFIX, SETTINGS, resolve


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config.toml"
    path.write_text("")
    monkeypatch.setenv("DSV3_CONFIG", str(path))
    return path


def test_the_order_of_settings(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (resolve({})["temperature"].value, resolve({})["temperature"].source) == (0.0, "default")
    file.write_text("temperature = 0.5\nstrict = true\n")
    assert (resolve({})["temperature"].value, resolve({})["temperature"].source) == (0.5, str(file))
    assert resolve({})["strict"].value is True
    monkeypatch.setenv("DSV3_TEMPERATURE", "0.7")
    assert (resolve({})["temperature"].value, resolve({})["temperature"].source) == (0.7, "DSV3_TEMPERATURE")
    found = resolve({"temperature": 0.9, "backend": None})
    assert (found["temperature"].value, found["temperature"].source, found["backend"].value) == (0.9, "flag", "auto")
    assert resolve({}).keys() == SETTINGS.keys()


def test_unknown_names_are_errors_with_the_nearest(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("bakend = 'cpu'\n")
    with pytest.raises(UsageError, match="unknown key 'bakend'; did you mean 'backend'"):
        resolve({})
    file.write_text("")
    monkeypatch.setenv("DSV3_DTIPE", "x")
    with pytest.raises(UsageError, match="DSV3_DTIPE is not a setting of dsv3; did you mean 'DSV3_DTYPE'"):
        resolve({})


def test_bad_values_name_where_they_stand(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("threads = 'many'\n")
    with pytest.raises(UsageError, match=r"config\.toml: threads='many'"):
        resolve({})
    file.write_text("not toml")
    with pytest.raises(UsageError, match=r"config\.toml"):
        resolve({})
    file.write_text("")
    monkeypatch.setenv("DSV3_STRICT", "perhaps")
    with pytest.raises(UsageError, match="DSV3_STRICT='perhaps': expected one of"):
        resolve({})
    monkeypatch.setenv("DSV3_STRICT", "off")
    assert resolve({})["strict"].value is False
    monkeypatch.setenv("DSV3_CONFIG", str(file) + ".absent")
    with pytest.raises(UsageError, match="does not exist"):
        resolve({})


@pytest.mark.parametrize(
    ("before", "first", "wanted"),
    [
        ({}, "", "1000"),
        ({}, "import torch; ", None),
        ({"OMP_WAIT_POLICY": "active"}, "", None),
        ({"GOMP_SPINCOUNT": "7"}, "", "7"),
    ],
)
def test_waits_are_shortened_unless_the_user_chose_or_it_is_too_late(
    before: dict[str, str], first: str, wanted: str | None
) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    code = (
        f"{first}import dsv3, os; from dsv3.settings import environment, without_our_waits;"
        "print(os.environ.get('GOMP_SPINCOUNT'), without_our_waits(environment()).get('GOMP_SPINCOUNT'))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**clean, **before}, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(wanted), str(before.get("GOMP_SPINCOUNT"))]


def test_every_variable_that_is_written_of_is_known() -> None:
    """One that is not would end every command with an error, whatever it is for."""
    root = Path(__file__).parents[2]
    pages = [root / "README.md", *root.glob("backends/*/README.md"), *root.glob("ci/**/*.py")]
    named = {name for page in pages for name in re.findall(r"\bDSV3_[A-Z0-9_]+\b", page.read_text(encoding="utf-8"))}
    known = {*OTHER_VARIABLES, *(PREFIX + name.upper() for name in SETTINGS)}
    assert "DSV3_BUILD_KERNELS" in named and named <= known, named - known
