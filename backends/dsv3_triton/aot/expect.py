"""What every binary must be: the gate of the ahead-of-time matrix, and the table of which matrix unit runs what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv3_triton.aot.inspect import Binary
from dsv3_triton.facts import Facts

# A floor, not the aim: scales are loads of 4 bytes, many of them unrolled. Half of the products are above 0.9; FP8 caches on
# AMD, whose codes come 4 and 8 bytes at a time, are at 0.23.
_WIDE = 0.2
# Kernels that multiply on matrix units, and whose operands must be loaded 16 bytes a lane.
_PRODUCTS = frozenset({
    "linear_kernel", "block_scaled_kernel", "dequant_linear_kernel", "int8_scaled_kernel", "bmm_kernel", "grouped_kernel",
    "decode_kernel", "prefill_kernel",
})  # fmt: skip
# Kernels that multiply in float32 without matrix units: what they decide depends on the last bits.
_NO_MATRIX = ("route", "router", "topk")


def wide(b: Binary) -> float:
    """Share of the bytes that loads of 16 bytes bring, each load in the text counted once, however often it runs."""
    total = sum(size * count for size, count in b.loads.items())
    return 16 * b.loads.get(16, 0) / total if total else 0.0


def matrix_unit(facts: Facts, rows: int) -> str:
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
        unit = matrix_unit(facts, rows)
        if not any(m.startswith(unit) for m in b.matrix):
            wrong.append(f"expected {unit} with {rows} rows, found {', '.join(b.matrix) or 'no matrix instruction'}")
    if name in _PRODUCTS and real and wide(b) < _WIDE:
        wrong.append(f"expected {_WIDE:.0%} of what is loaded in loads of 16 bytes, found {dict(sorted(b.loads.items()))}")
    eight = any(word in m for m in b.matrix for word in ("f8", "fp8", "e4m3"))
    if rows >= 64 and facts.fp8 and dtypes.count(facts.fp8) >= 2 and not eight:
        wrong.append(f"expected an FP8 matrix instruction, found {', '.join(b.matrix)}: an upcast")
    return wrong
