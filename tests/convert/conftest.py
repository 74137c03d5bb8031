"""Small checkpoints to convert, made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import FP8, TINY, random_tensors, write_hf

# Sizes that cut through blocks, groups and words: 136 = 128 + 8, 132 experts wide, kv_a of 40 rows.
ALIGNED: dict[str, Any] = {
    **TINY, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256, "q_lora_rank": 128, "kv_lora_rank": 128,
    "qk_nope_head_dim": 64, "v_head_dim": 128, "qk_rope_head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """bf16 in one file and in three shards, FP8 with ragged blocks, and FP8 that splits over two ranks."""
    root = tmp_path_factory.mktemp("made")
    fp8 = {**TINY, "quantization_config": FP8}
    return {
        "bf16": write_hf(root / "bf16", TINY, random_tensors(TINY, copies=True)),
        "sharded": write_hf(root / "sharded", TINY, random_tensors(TINY), shards=3),
        "fp8": write_hf(root / "fp8", fp8, random_tensors(TINY, fp8=True), shards=2),
        "aligned": write_hf(root / "aligned", {**ALIGNED, "quantization_config": FP8}, random_tensors(ALIGNED, fp8=True)),
    }
