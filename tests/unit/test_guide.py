"""The runner of guides notices when a guide does not tell the truth."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RUNNER = Path(__file__).parents[2] / "ci" / "docs" / "guide.py"
TRUE = """
```sh
echo "took 1.25 s"
```
```text
took   3.50 s
```
```python file=a.py
x = 1
```
```python file=a.py append
print(x + 1)
```
```sh
python a.py
```
```text
2
```
```sh fails
false
```
"""


def _follow(guide: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "guide.md").write_text(guide)
    command = [sys.executable, str(RUNNER), str(folder / "guide.md"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_true_guide_is_followed_to_its_end(tmp_path: Path) -> None:
    done = _follow(TRUE, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "7 blocks of" in done.stdout and (tmp_path / "a.py").read_text() == "x = 1\n\n\nprint(x + 1)\n"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("\n2\n", "\ntwo\n", "this is printed, and it is not:\ntwo"),
        ("\nfalse\n", "\ntrue\n", "exit code 0; the guide says that it fails"),
        ("python a.py", "python b.py", "the guide says that it works"),
    ],
)
def test_what_is_not_so_ends_it(old: str, new: str, words: str, tmp_path: Path) -> None:
    done = _follow(TRUE.replace(old, new), tmp_path)
    assert done.returncode == 1 and words in done.stderr
