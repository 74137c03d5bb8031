"""The story checkpoint through the reference, and ceilings of a moment's measuring."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import dsv3
from dsv3.bench import ceiling


@pytest.fixture(scope="session")
def model(story: Path) -> dsv3.Model:
    return dsv3.load(str(story), backend="reference", mtp=False)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Real ceilings of a small buffer and small products: no test looks at their size."""
    monkeypatch.setattr(ceiling, "BUFFER", 1 << 24)
    monkeypatch.setattr(ceiling, "SIZES", ((32, 64, 64),))
    yield
