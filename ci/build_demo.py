"""Build the bundled demo checkpoint (configs/demo) from a bf16 checkpoint in Hugging Face layout.

    python ci/build_demo.py SOURCE_FOLDER [configs/demo]

Linears and experts become FP8 with 128x128 blocks, by dsv3's own quantiser; embedding, head, norms, routers and
eh_proj stay as they are; the MTP module's copies of embedding and head are left out.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

from safetensors.torch import save_file

from dsv3.checkpoint.folder import folder_config
from dsv3.checkpoint.layout import open_checkpoint
from dsv3.checkpoint.loader import as_tensor
from dsv3.checkpoint.reader import Reader, check_plan
from dsv3.checkpoint.validate import plan_load
from dsv3.graph.names import SCALE_SUFFIX
from dsv3.quant.fp8 import quantize_block

QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
CARRIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")


def build(source: Path, target: Path) -> int:
    """Write the checkpoint; returns its size in bytes."""
    plan = plan_load(folder_config(source), open_checkpoint(source), source)
    reader = Reader()
    check_plan(plan, reader)
    tensors = {}
    for item in plan.items:
        tensor = as_tensor(reader.array(item.entry))
        name = item.expected.name
        if item.expected.kind == "linear":
            tensors[name], tensors[name + SCALE_SUFFIX] = quantize_block(tensor)
        else:
            tensors[name] = tensor.clone()
    config = json.loads((source / "config.json").read_text(encoding="utf-8")) | {"quantization_config": QUANTIZATION}
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target) as scratch:
        made = Path(scratch) / "model.safetensors"
        save_file(tensors, made, metadata={"format": "pt"})
        made.chmod(0o644)
        made.replace(target / made.name)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in CARRIED:
        shutil.copyfile(source / name, target / name)
    for path in source.glob("*.ATTRIBUTION.txt"):
        shutil.copyfile(path, target / path.name)
    return sum(p.stat().st_size for p in target.iterdir())


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    size = build(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) == 3 else "configs/demo"))
    print(f"{size / 1e6:.1f} MB")
