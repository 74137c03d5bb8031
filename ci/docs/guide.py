"""Do what a guide says, in order, in an empty folder: python ci/docs/guide.py plugins/README.md FOLDER

A block of `sh` is run by bash; one of `sh fails` must fail. A block `python file=PATH` is written to that file, with
`append` at its end. A block of `text` is what the block before it printed: every line of it, "..." apart, must be a line
of the output, numbers and white space apart.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_BLOCK = re.compile(r"^```(\S[^\n]*)\n(.*?)^```$", re.M | re.S)


def blocks(text: str) -> Iterator[tuple[list[str], str]]:
    """(words after the fence, content) of every block that names a language."""
    for found in _BLOCK.finditer(text):
        yield found[1].split(), found[2]


def follow(guide: Path, folder: Path) -> int:
    """Number of blocks that were done; exits with a message at the first that does not do what it says."""
    output, done = "", 0
    for (kind, *options), content in blocks(guide.read_text(encoding="utf-8")):
        done += 1
        if kind == "sh":
            output = _run(content, folder, fails="fails" in options)
        elif kind == "text":
            _compare(content, output)
        elif kind == "python" and (place := _option("file", options)):
            _write(folder / place, content, append="append" in options)
        else:
            done -= 1
    return done


def _option(name: str, options: list[str]) -> str:
    return next((word.partition("=")[2] for word in options if word.startswith(f"{name}=")), "")


def _run(commands: str, folder: Path, fails: bool) -> str:
    print(f"$ {commands.strip()}", flush=True)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if (done.returncode != 0) is not fails:
        sys.exit(f"{done.stdout}\nexit code {done.returncode}; the guide says that it {'fails' if fails else 'works'}")
    return done.stdout


def _write(path: Path, content: str, append: bool) -> None:
    before = path.read_text(encoding="utf-8").rstrip() + "\n\n\n" if append else ""
    path.write_text(before + content, encoding="utf-8")


def _compare(wanted: str, output: str) -> None:
    lines = {_plain(line) for line in output.splitlines()}
    for line in wanted.splitlines():
        if line.strip() and line.strip() != "..." and _plain(line) not in lines:
            sys.exit(f"{output}\nthe guide says that this is printed, and it is not:\n{line}")


def _plain(line: str) -> str:
    """Without what differs from run to run."""
    return " ".join(re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?", "#", line).split())


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(f"{follow(Path(sys.argv[1]), Path(sys.argv[2]))} blocks of {sys.argv[1]} are as it says")
