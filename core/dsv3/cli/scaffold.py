"""Writing a new plugin from the template: a complete distribution, or nothing."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from dsv3.dispatch.plugins import discover
from dsv3.errors import UsageError
from dsv3.resources import resources

# The names of backends that come with dsv3, and what means "whichever".
RESERVED = ("reference", "cpu", "cuda", "rocm", "ascend", "auto")
_NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
# A leading dot is written so in the template, that no tool reads those files where the template lies.
_DOT = "dot-"


def write_plugin(name: str, into: Path) -> Path:
    """Make `into`/dsv3-NAME, a distribution with backend NAME; returns its folder.

    UsageError for a name that cannot be one, and where something of that name is there already.
    """
    check_name(name)
    target = into / f"dsv3-{name}"
    if os.path.lexists(target):
        raise UsageError(f"{target} is there already and is left as it is; remove it, or choose another --into")
    words = {"__dist__": f"dsv3-{name}", "__module__": f"dsv3_{name.replace('-', '_')}", "__name__": name}
    try:
        into.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".dsv3-{name}-", dir=into))
    except OSError as error:
        raise UsageError(f"cannot write into {into}: {error.strerror}; choose another --into") from error
    try:
        scratch.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        _fill(resources("plugins", "template"), scratch, words)
        scratch.rename(target)
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror}; choose another --into") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def check_name(name: str) -> None:
    """UsageError, with a spelling that would do, if no backend and package can be called this."""
    if name in RESERVED:
        why = "means that dsv3 chooses" if name == "auto" else "is the name of a backend of dsv3's own"
        raise UsageError(f"plugin name {name!r} {why}; a backend that uses it is refused; choose another")
    if name.startswith(("dsv3-", "dsv3_")):
        raise UsageError(f"plugin name {name!r}: the package gets the prefix by itself; did you mean {name[5:]!r}?")
    if not _NAME.fullmatch(name):
        like = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-").lstrip("0123456789-")
        hint = f"; did you mean {like!r}?" if _NAME.fullmatch(like) and like not in RESERVED else ""
        raise UsageError(
            f"plugin name {name!r} cannot name a backend and a package: lower-case letters, digits, and single - or _ between"
            f" them, beginning with a letter{hint}"
        )
    taken = [p for p in discover() if p.name == name and p.dist != f"dsv3-{name}".replace("_", "-")]
    if taken:
        raise UsageError(
            f"backend name {name!r} is claimed by {taken[0].source}, which is installed here: two of them exclude each other;"
            " choose another name, or uninstall that"
        )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fill(template: Path, target: Path, words: dict[str, str]) -> None:
    for path in sorted(template.rglob("*")):
        if not path.is_file() or "__pycache__" in path.parts:
            continue
        place, text = path.relative_to(template).as_posix(), path.read_text(encoding="utf-8")
        for word, value in words.items():
            place, text = place.replace(word, value), text.replace(word, value)
        parts = [f".{part.removeprefix(_DOT)}" if part.startswith(_DOT) else part for part in place.split("/")]
        made = target.joinpath(*parts)
        made.parent.mkdir(parents=True, exist_ok=True)
        made.write_text(text, encoding="utf-8")
