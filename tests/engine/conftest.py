"""A small model in float64 whose drafts are often right, with the demo's tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dsv3
from dsv3.resources import resources
from tests.support.checkpoints import TINY, random_tensors, write_hf


def write_small(folder: Path) -> Path:
    """Blocks add little to the embedding, and the MTP module starts from the embedding alone: both see nearly the same."""
    config = {**TINY, "vocab_size": 4096, "max_position_embeddings": 512}
    tensors = random_tensors(config, dtype=torch.float32)
    width = config["hidden_size"]
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.mul_(0.3)
        if name.endswith("embed_tokens.weight"):
            tensor.div_(tensor.std())
        if name.endswith("enorm.weight"):
            tensor.fill_(1.0)
        if name.endswith("shared_head.norm.weight"):
            tensor.copy_(tensors["model.norm.weight"])
        if name.endswith("eh_proj.weight"):
            tensor.zero_()[:, :width] = torch.eye(width)
    write_hf(folder, config, tensors)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resources("configs", "demo", name), folder / name)
    return folder


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("small") / "small")


@pytest.fixture(scope="module")
def small(small_folder: Path) -> Iterator[dsv3.Model]:
    with dsv3.load(str(small_folder), dtype="float64") as model:
        yield model
