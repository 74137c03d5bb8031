"""The plugin kit from outside: what `dsv3 plugin new` writes is a distribution that installs, loads, passes and runs."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.cli import main
from dsv3.cli.scaffold import RESERVED, check_name, write_plugin
from dsv3.errors import UsageError
from tests.support.install import install, run_python

SLOW = "import time\ntime.sleep(5)\n"
LOUD = "print('hello from acme')\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new plugin "acme", as the command line writes it."""
    into = tmp_path_factory.mktemp("kit")
    done = subprocess.run([sys.executable, "-m", "dsv3", "plugin", "new", "acme"], cwd=into, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = [line.strip() for line in done.stdout.splitlines()[1:]]
    assert commands == ["cd dsv3-acme && pip install -e .", "dsv3 plugin check acme", "dsv3 conformance --backend acme"]
    assert [p.name for p in into.iterdir()] == ["dsv3-acme"]
    return into / "dsv3-acme"


@pytest.fixture(scope="module")
def site(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pip installed it."""
    target = tmp_path_factory.mktemp("site")
    install(source, target)
    return target


def test_a_new_plugin_is_a_complete_distribution(source: Path) -> None:
    files = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()}
    assert files == {
        ".github/workflows/ci.yml", ".gitignore", ".gitlab-ci.yml", "README.md", "pyproject.toml", "waivers.txt",
        "dsv3_acme/__init__.py", "dsv3_acme/kernels.py", "tests/test_conformance.py", "tests/test_kernels.py",
    }  # fmt: skip
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    assert project["name"] == "dsv3-acme"
    assert project["entry-points"]["dsv3.backends.v1"] == {"acme": "dsv3_acme:backend"}
    whole = "".join((source / name).read_text() for name in files)
    assert not [word for word in ("__dist__", "__module__", "__name__") if word in whole]
    assert "case-id  reason  url" in (source / "waivers.txt").read_text()
    for ci in (".github/workflows/ci.yml", ".gitlab-ci.yml"):
        assert "dsv3 conformance --backend acme --size quick --waivers waivers.txt" in (source / ci).read_text()


def test_it_loads_runs_and_passes_its_own_tests(source: Path, site: Path) -> None:
    checked = run_python(site, "-m", "dsv3", "plugin", "check", "acme", "--json")
    (entry,) = json.loads(checked.stdout)
    assert checked.returncode == 0 and {c["state"] for c in entry["cases"]} <= {"ok", "warning"}, checked.stdout
    told = run_python(site, "-m", "dsv3", "run", "Once", "--backend", "acme", "--max-new-tokens", "3")
    assert told.returncode == 0 and "demo on acme" in told.stderr, told.stderr
    tests = run_python(site, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(source), str(source / "tests"))
    assert tests.returncode == 0, tests.stdout + tests.stderr


@pytest.mark.parametrize(
    ("added", "case", "words"),
    [
        (SLOW, "l0/import-time", "its import takes 5."),
        (LOUD, "l0/stdout", "its import prints 'hello from acme' to standard output"),
    ],
)
def test_a_slow_and_a_loud_import_are_warnings(added: str, case: str, words: str, site: Path, tmp_path: Path) -> None:
    changed = _changed(site, tmp_path, added, "")
    checked = run_python(changed, "-m", "dsv3", "plugin", "check", "acme", "--json")
    (entry,) = json.loads(checked.stdout)
    assert checked.returncode == 0 and entry["failed"] == 0, checked.stdout
    warnings = {c["id"]: c["message"] for c in entry["cases"] if c["state"] == "warning"}
    assert words in warnings[case]


def _changed(site: Path, target: Path, added: str, kernels: str) -> Path:
    """A copy of what is installed, with lines added to its modules."""
    for path in site.rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            place = target / path.relative_to(site)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    for name, lines in (("__init__.py", added), ("kernels.py", kernels)):
        module = target / "dsv3_acme" / name
        module.write_text(module.read_text() + lines)
    return target


@pytest.mark.parametrize(
    ("added", "kernels", "case", "words"),
    [
        ("import a_module_that_is_not_there\n", "", "l0/entry-point", "No module named 'a_module_that_is_not_there'"),
        ("", "def rms_norm(x, gamma, eps):\n    return x\n", "l0/signatures", "expected rms_norm(x[T,D], weight[D], eps)"),
        ("import time\nBackend.probe = lambda self, device: time.sleep(30)\n", "", "l0/probe", "gave no answer within 2 s"),
    ],
)
def test_a_broken_plugin_fails_with_its_cause(
    added: str, kernels: str, case: str, words: str, site: Path, tmp_path: Path
) -> None:
    checked = run_python(_changed(site, tmp_path, added, kernels), "-m", "dsv3", "plugin", "check", "acme")
    assert checked.returncode == 3 and "Traceback" not in checked.stderr
    (line,) = [line for line in checked.stdout.splitlines() if "FAILED" in line and f" {case} " in line]
    assert words in line
    assert f"again: dsv3 conformance --backend acme --level L0 --cases '{case}'" in checked.stdout


@pytest.mark.parametrize("name", RESERVED)
def test_the_names_of_dsv3s_own_backends_are_refused(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["plugin", "new", name, "--into", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert repr(name) in error and "choose another" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "hint"),
    [("Acme.Corp", "acme-corp"), ("9lives", "lives"), ("a b", "a-b"), ("a--b", "a-b"), ("dsv3-acme", "acme"), ("../up", "up")],
)
def test_a_name_that_cannot_be_one_is_refused_with_one_that_can(name: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"did you mean '{hint}'"):
        write_plugin(name, tmp_path)
    assert not list(tmp_path.iterdir())


@given(st.text(max_size=12))
def test_a_name_is_refused_or_good_for_package_module_and_pin(name: str) -> None:
    try:
        check_name(name)
    except UsageError:
        return
    assert f"dsv3_{name.replace('-', '_')}".isidentifier() and "." not in name and "=" not in name and name.isascii()


def test_what_is_there_is_never_overwritten_and_a_failure_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dsv3-acme").mkdir()
    (tmp_path / "dsv3-other").symlink_to(tmp_path / "nowhere")
    for name in ("acme", "other"):
        with pytest.raises(UsageError, match="is there already and is left as it is"):
            write_plugin(name, tmp_path)
    made = write_plugin("two-words", tmp_path / "deep" / "er")
    assert (made / "dsv3_two_words" / "kernels.py").exists() and "two-words = " in (made / "pyproject.toml").read_text()
    before = sorted(p.name for p in tmp_path.iterdir())

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UsageError, match="No space left on device"):
        write_plugin("third", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_name_that_somebody_elses_package_claims_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support.plugins import good
    from tests.support.plugins import write_plugin as installed

    monkeypatch.syspath_prepend(str(tmp_path))
    installed(tmp_path, "taken", good("taken"), dist="someone-elses")
    with pytest.raises(UsageError, match=r"claimed by someone-elses 1\.0"):
        write_plugin("taken", tmp_path)
