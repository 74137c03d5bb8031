"""What every binary must be: the gate of the ahead-of-time matrix, and the table of which matrix unit runs what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv3_triton.aot.inspect import Binary
from dsv3_triton.facts import Facts

# Kernels that multiply on matrix units, and whose hot operands must be loaded 16 bytes a lane.
_PRODUCTS = frozenset({
    "linear_kernel", "block_scaled_kernel", "dequant_linear_kernel", "int8_scaled_kernel", "bmm_kernel", "grouped_kernel",
    "mla_decode_kernel", "mla_prefill_kernel",
})  # fmt: skip
# Kernels that multiply in float32 without matrix units: what they decide depends on the last bits.
_NO_MATRIX = ("route", "router", "topk")


def matrix_unit(facts: Facts, rows: int, fp8: bool) -> str:
    """What the instruction's name starts with: wgmma and tcgen05 need 64 rows; with fewer, mma.sync."""
    if facts.vendor == "amd":
        return "v_mfma"
    if rows >= 64 and facts.matrix in ("wgmma", "tcgen05"):
        return facts.matrix
    return "mma.sync"


def violations(name: str, constants: Mapping[str, Any], dtypes: list[str], b: Binary, facts: Facts) -> list[str]:
    """What is wrong with a binary, expected and found; [] if nothing. dtypes: of the kernel's tensors."""
    wrong = []
    if b.spills:
        wrong.append(f"expected no spills, found {b.spills}")
    if b.shared > facts.shared_memory:
        wrong.append(f"expected at most {facts.shared_memory} bytes of shared memory, found {b.shared}")
    if b.occupancy < 1:
        wrong.append("expected room for one program on a multiprocessor, found none")
    if any(word in name for word in _NO_MATRIX) and b.matrix:
        wrong.append(f"expected no matrix instructions, found {', '.join(b.matrix)}")
    rows = constants.get("BLOCK_M", constants.get("BLOCK_H", 0)) if name in _PRODUCTS else 0
    real = not any(d == "float32" for d in dtypes[:2])
    if rows and real and not any(word in name for word in _NO_MATRIX):
        unit = matrix_unit(facts, rows, False)
        if not any(m.startswith(unit) for m in b.matrix):
            wrong.append(f"expected {unit} with {rows} rows, found {', '.join(b.matrix) or 'no matrix instruction'}")
    if name in _PRODUCTS and real and b.loads.get(16, 0) == 0:
        wrong.append(f"expected loads of 16 bytes, found {dict(sorted(b.loads.items()))}")
    eight = any(word in m for m in b.matrix for word in ("f8", "fp8", "e4m3"))
    if rows >= 64 and facts.fp8 and dtypes.count(facts.fp8) >= 2 and not eight:
        wrong.append(f"expected an FP8 matrix instruction, found {', '.join(b.matrix)}: an upcast")
    return wrong
