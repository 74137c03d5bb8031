"""Isolation: no test reads the user's settings, writes to the user's caches, or reaches for a network."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from itertools import groupby
from pathlib import Path

import pytest

import dsv3  # noqa: F401  # before torch, as in use: see settings.shorten_waits

DATA = os.environ.get("DSV3_TEST_DATA")
_started = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--within", type=float, metavar="SECONDS", help="tests that would begin later are skipped, and named")
    parser.addoption("--turn", type=int, default=0, metavar="N", help="begin with the N-th file, so that all have their turn")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    files = [list(tests) for _, tests in groupby(items, key=lambda item: item.path)]
    first = config.getoption("turn") % max(1, len(files))
    items[:] = [item for tests in files[first:] + files[:first] for item in tests]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = item.config.getoption("within")
    if limit is not None and time.monotonic() - _started > limit:
        pytest.skip(f"LEFT OUT: {limit:.0f} seconds are over")


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("home")
    for name in [n for n in os.environ if n.startswith("DSV3_") and n != "DSV3_TEST_DATA"]:
        del os.environ[name]
    os.environ["XDG_CONFIG_HOME"] = str(root / "config")
    os.environ["XDG_DATA_HOME"] = str(root / "data")
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    os.environ["TRITON_CACHE_DIR"] = str(root / "triton")
    # Compiled kernels may stay from one run to the next: their folder is named by the hash of what was compiled.
    os.environ["NUMBA_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / "dsv3-tests" / "numba")
    os.environ["HF_HOME"] = str(root / "hf")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script; children would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """What a test draws does not depend on the tests before it, nor is it what small seeds of its own draw."""
    import torch

    torch.manual_seed(64357)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of DSV3_TEST_DATA."""
    if not DATA:
        pytest.skip("DSV3_TEST_DATA is not set: it names the folder with the story checkpoint and the held-out texts")
    return Path(DATA)


@pytest.fixture(scope="session")
def story(shared_data: Path) -> Path:
    """The bf16 story checkpoint."""
    return shared_data / "models" / "story"
