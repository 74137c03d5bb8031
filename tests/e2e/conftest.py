"""Good checkpoints, made once for the module that needs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv3.resources import resources
from tests.support.checkpoints import FP8, TINY, random_tensors, write_demo, write_hf


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Good checkpoints to break: one file, two shards, FP8, and the demo's two ranks."""
    root = tmp_path_factory.mktemp("whole")
    tensors = random_tensors(TINY, copies=True)
    config = {**TINY, "quantization_config": FP8}
    return {
        "single": write_hf(root / "single", TINY, tensors),
        "sharded": write_hf(root / "sharded", TINY, tensors, shards=2),
        "fp8": write_hf(root / "fp8", config, random_tensors(TINY, fp8=True)),
        "demo": write_demo(root / "demo", TINY, random_tensors(TINY), 2),
        "story": resources("configs", "demo"),
    }
