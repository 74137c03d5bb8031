"""The bundled checkpoint in float32, and a text for it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import dsv3
from dsv3.eval import Text
from dsv3.resources import resources

TALES = (
    "Once upon a time there was a little fox who lived under an old oak. Every morning she went to the river to look for "
    "fish, and every evening she told her mother what she had seen.\n\nOne day the river was gone.",
    'The king had three sons. "Who brings me the golden apple," he said, "shall have my crown." So they set out.',
    "A boy found a stone that could sing. It sang of the sea — of ships, and whales, and a drowned bell.",
)


@pytest.fixture(scope="session")
def model() -> dsv3.Model:
    """The demo, converted to float32: what its FP8 codes say, in arithmetic that leaves little noise."""
    return dsv3.load("demo", dtype="float32", quant="none", backend="reference")


@pytest.fixture(scope="session")
def texts() -> list[Text]:
    return [Text("two.txt", "<|endoftext|>\n".join(TALES[:2])), Text("one.txt", f"\n{TALES[2]}\n<|endoftext|>\n")]


@pytest.fixture()
def lookalike(tmp_path: Path) -> Path:
    """A copy of the demo's folder, for a test to change."""
    return Path(shutil.copytree(resources("configs", "demo"), tmp_path / "lookalike"))
