"""Wheel and source distribution hold what is needed, and run from elsewhere; the editable install is what these tests
run in."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import dsv3
from dsv3.resources import resources

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sdist from the checkout, wheel from the sdist, and a wheel from the checkout."""
    out = tmp_path_factory.mktemp("dist")
    # Kernels are compiled once: those of the checkout are there since it was installed.
    for arguments, kernels in ((["--outdir", str(out)], "none"), (["--wheel", "--outdir", str(out / "direct")], "host")):
        subprocess.run(
            [sys.executable, "-m", "build", "--no-isolation", *arguments, str(ROOT)], check=True, capture_output=True,
            env={**os.environ, "DSV3_BUILD_KERNELS": kernels},
        )  # fmt: skip
    return out


def _names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as z:
        return set(z.namelist())


def test_the_wheel_carries_configs_and_template(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = _names(wheel)
    for name in (
        "dsv3/_resources/configs/demo/model.safetensors", "dsv3/_resources/configs/models/671B.json",
        "dsv3/_resources/configs/templates/deepseek_v3.jinja", "dsv3/_resources/configs/templates/deepseek_v31.jinja",
        "dsv3/_resources/plugins/template/pyproject.toml",
        "dsv3/py.typed", "dsv3_reference/__init__.py", f"dsv3-{dsv3.__version__}.dist-info/licenses/LICENSE",
    ):  # fmt: skip
        assert name in names
    assert not [n for n in names if n.startswith(("tests/", "ci/", "plugins/"))]
    assert wheel.stat().st_size < 25e6


def test_the_sdist_builds_the_same_wheel(built: Path) -> None:
    (from_sdist,), (direct,) = built.glob("*.whl"), (built / "direct").glob("*.whl")
    assert _names(from_sdist) == {name for name in _names(direct) if not name.endswith(".o")}
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as t:
        names = {n.partition("/")[2] for n in t.getnames()}
    assert {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "configs/demo/config.json", "tests/conftest.py"} <= names


def test_the_wheel_tells_the_same_story_from_another_folder(built: Path, tmp_path: Path) -> None:
    (wheel,) = (built / "direct").glob("*.whl")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    where = "import dsv3, dsv3_reference; print(dsv3.__file__, dsv3_reference.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", where], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert all(path.startswith(str(site)) for path in found.stdout.split())
    run = [sys.executable, "-m", "dsv3", "run", "Once upon a time", "--max-new-tokens", "25"]
    done = subprocess.run(run, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == dsv3.load("demo").generate("Once upon a time", max_new_tokens=25).text + "\n"


def test_resources_are_found_in_the_checkout_and_missing_ones_are_named() -> None:
    assert resources("configs", "models").is_dir()
    assert resources("plugins", "template", "pyproject.toml").is_file()
    with pytest.raises(FileNotFoundError, match="configs/nothing"):
        resources("configs", "nothing")


def test_triton_is_never_a_hard_dependency() -> None:
    import importlib.metadata

    required = [r for r in importlib.metadata.requires("dsv3") or [] if "extra ==" not in r]
    assert not [r for r in required if r.startswith("triton")]
    assert [r for r in required if r.startswith("torch")] == ["torch<2.14,>=2.10"]
