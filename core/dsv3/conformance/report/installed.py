"""What is installed: a plugin's files by hash, and versions, so that a certificate can say what it is about."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Written by the installer, different for every installation of the same distribution.
_INSTALLERS = ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json", "uv_cache.json", "uv_build.json")
_PACKAGES = ("dsv3", "torch", "numpy", "triton", "numba", "onnxruntime", "torch-npu")


def plugin(dist: str) -> dict[str, Any]:
    """`{"dist", "version", "files"}` of an installed distribution; files: name -> sha256. PackageNotFoundError if it is not
    installed.

    The files are those of the packages that its entry points name, where Python would import them from (an editable
    installation lists none of its own), and all others that it installed; byte code and the installer's notes left out.
    """
    found = importlib.metadata.distribution(dist)
    paths = dict(_recorded(found))
    for name, path in _imported(found):
        paths[name] = path
    files = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(paths.items())}
    return {"dist": str(found.metadata["Name"]), "version": found.version, "files": files}


def _recorded(found: importlib.metadata.Distribution) -> Iterator[tuple[str, Path]]:
    for entry in found.files or ():
        path = Path(str(found.locate_file(entry)))
        # Scripts in bin/ hold the path of their interpreter; a .pth file points to a folder of this machine.
        ours = entry.parts[0] != ".." and entry.suffix != ".pth"
        if ours and not _generated(path) and path.is_file():
            yield str(entry), path


def _imported(found: importlib.metadata.Distribution) -> Iterator[tuple[str, Path]]:
    for top in sorted({e.module.partition(".")[0] for e in found.entry_points}):
        spec = importlib.util.find_spec(top)
        if spec is None:
            continue
        for folder in spec.submodule_search_locations or ():
            root = Path(folder)
            for path in sorted(root.rglob("*")):
                if path.is_file() and not _generated(path):
                    yield f"{top}/{path.relative_to(root).as_posix()}", path
        if not spec.submodule_search_locations and spec.origin:
            yield Path(spec.origin).name, Path(spec.origin)


def _generated(path: Path) -> bool:
    return path.suffix in (".pyc", ".pyo") or (path.parent.suffix == ".dist-info" and path.name in _INSTALLERS)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that computed, without those that are not installed."""
    known = {name: installed_version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **{name: text for name, text in known.items() if text}}


def installed_version(name: str) -> str:
    """Of a package, or of "python"; "" if it is not installed. Build tags such as +cu128 stay."""
    if name == "python":
        return platform.python_version()
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def file_problems(recorded: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """A line for every file that is missing, changed or added since it was recorded."""
    problems = [
        f"plugin.files: {name}: expected sha256 {recorded[name]}, found no such file"
        for name in sorted(recorded.keys() - found)
    ]
    problems += [
        f"plugin.files: {name}: expected no such file, found sha256 {found[name]}" for name in sorted(found.keys() - recorded)
    ]
    for name in sorted(recorded.keys() & found):
        if recorded[name] != found[name]:
            problems.append(f"plugin.files: {name}: expected sha256 {recorded[name]}, found {found[name]}")
    return problems
