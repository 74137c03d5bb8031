"""Flag, variable, file, default, in this order; unknown names are errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv3.errors import UsageError
from dsv3.settings import SETTINGS, resolve


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
