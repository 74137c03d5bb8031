"""Loading holds the weights once: peak anonymous memory above the level before is at most the weights plus a tenth."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.checkpoints import FP8, TINY, random_tensors, write_hf

PROBE = """
import sys, threading, time
def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
import torch, dsv3
dsv3.load("demo")  # what any load brings along is not the weights'
before = peak = anonymous()
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
options = dict(pair.split("=") for pair in sys.argv[2:])
start = time.perf_counter()
model = dsv3.load(sys.argv[1], progress=False, **options)
seconds = time.perf_counter() - start
done = True
thread.join()
print(before, peak, anonymous(), model.weight_bytes, seconds)
"""

# About 1.5 GB in bf16: wide experts, so that tensors are many and none is most of it.
BIG = {
    **TINY, "vocab_size": 9000, "hidden_size": 2048, "intermediate_size": 4096, "moe_intermediate_size": 1024,
    "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": 512, "kv_lora_rank":
    512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 24,
    "num_nextn_predict_layers": 1,
}  # fmt: skip


def _measure(folder: Path, **options: str) -> tuple[float, float, float]:
    arguments = [f"{k}={v}" for k, v in options.items()]
    done = subprocess.run([sys.executable, "-c", PROBE, str(folder), *arguments], capture_output=True, text=True, check=True)
    before, peak, after, weights, seconds = (float(x) for x in done.stdout.split())
    print(
        f"{folder.name} {options}: weights {weights / 1e6:.0f} MB, peak anonymous +{(peak - before) / 1e6:.0f} MB "
        f"({(peak - before) / weights:.3f} of the weights), after +{(after - before) / 1e6:.0f} MB, {seconds:.1f} s"
    )
    return before, peak, weights


@pytest.mark.slow
def test_peak_memory_of_loading_1500_mb(tmp_path: Path) -> None:
    tensors = random_tensors(BIG)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert size > 1.5e9
    folder = write_hf(tmp_path / "bf16", BIG, tensors, shards=4)
    del tensors
    for options in ({}, {"quant": "fp8-w8a16"}, {"quant": "int8-w8a16"}):
        before, peak, weights = _measure(folder, **options)
        assert peak - before <= 1.1 * weights


def test_peak_memory_of_a_small_fp8_checkpoint(tmp_path: Path) -> None:
    """The same for FP8 kept, and for FP8 made real; small, so that it runs every time."""
    config = {**BIG, "n_routed_experts": 8, "num_hidden_layers": 2, "vocab_size": 1024, "quantization_config": FP8}
    folder = write_hf(tmp_path / "fp8", config, random_tensors(config, fp8=True))
    assert json.loads((folder / "config.json").read_text())["quantization_config"] == FP8
    for options in ({}, {"quant": "none"}):
        before, peak, weights = _measure(folder, **options)
        assert peak - before <= 1.1 * weights + 40e6  # what conversion holds at a time does not shrink with the model
