"""What came out of a compilation: registers, spills, shared memory, occupancy, matrix instructions, loads.

Occupancy: how many programs a multiprocessor holds, by registers, warps and shared memory. Limits: CUDA programming guide,
technical specifications per compute capability; AMD CDNA instruction set references (512 registers per lane and SIMD, 4 SIMDs).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton

from dsv3_triton.facts import Facts

_MATRIX = re.compile(r"wgmma\.mma_async\S*|tcgen05\.mma\S*|mma\.sync\.aligned\S*|v_mfma_\S+|v_smfmac_\S+")
_SHAPE = re.compile(r"m\d+n\d+k\d+|kind::\S+|e4m3|bf16|f16|f32|tf32|s8|s32")
_ASYNC = re.compile(r"cp\.async\.c[ag]\S*|cp\.async\.bulk\S*|(?:buffer|global)_load_(?:dword\S*|lds\S*)[^\n]*\blds\b")
_PTX_LOAD = re.compile(r"ld\.global\S*?(?:\.v(\d))?\.[bsuf](\d+)\b")
_PTX_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global[^;]*?,\s*(0x[0-9a-f]+|\d+)(?:,|;)")
_AMD_LOAD = re.compile(r"(?:buffer|global)_load_(dwordx?\d?|u?short|[us]byte|b\d+|u16|u8|d16)\S*")
_AMD_BYTES = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "ushort": 2, "short": 2, "ubyte": 1, "sbyte": 1, "d16": 2}
# Warps (waves) and shared memory in KiB that a multiprocessor holds.
_WARPS = {"sm_80": 64, "sm_86": 48, "sm_89": 48, "sm_90": 64, "sm_100": 64, "sm_120": 48}
_SHARED = {"sm_80": 164, "sm_86": 100, "sm_89": 100, "sm_90": 228, "sm_100": 228, "sm_120": 100}


@dataclass
class Binary:
    """One compiled kernel. registers per lane, accumulation registers included; spills in bytes or registers, 0 if none;
    shared in bytes; occupancy in programs per multiprocessor; matrix: instruction -> count in the text; loads: bytes per lane
    -> count, asynchronous copies included."""

    registers: int
    spills: int
    shared: int
    warps: int
    occupancy: int
    matrix: dict[str, int] = field(default_factory=dict)
    loads: dict[int, int] = field(default_factory=dict)
    copies: int = 0


def inspect(compiled: Any, facts: Facts) -> Binary:
    """Read a compiled kernel of an architecture."""
    nvidia = facts.vendor == "nvidia"
    text = compiled.asm["ptx"] if nvidia else compiled.asm["amdgcn"]
    registers, spills = _nvidia(compiled.asm["cubin"]) if nvidia else _amd(text)
    warps = compiled.metadata.num_warps
    shared = compiled.metadata.shared
    matrix = Counter(_kind(m) for m in _MATRIX.findall(text))
    loads = Counter(_ptx_widths(text) if nvidia else _amd_widths(text))
    occupancy = _occupancy(facts, registers, warps, shared)
    return Binary(registers, spills, shared, warps, occupancy, dict(matrix), dict(loads), len(_ASYNC.findall(text)))


def _kind(instruction: str) -> str:
    """Without the modifiers that say nothing of which unit runs it."""
    kept = _SHAPE if instruction.startswith(("mma.sync", "wgmma")) else re.compile(r"kind::\S+")
    if instruction.startswith("v_"):
        return instruction
    head, *parts = instruction.split(".")
    head = "mma.sync" if head == "mma" else head
    return ".".join([head, *(p for p in parts if kept.fullmatch(p))])


def _nvidia(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        shown = subprocess.run([str(tool), "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True)
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", shown.stdout)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _amd(text: str) -> tuple[int, int]:
    def value(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found.group(1)) if found else 0

    spilled = value("vgpr_spill_count") + value("sgpr_spill_count") + value("private_segment_fixed_size")
    return value("vgpr_count"), spilled


def _ptx_widths(text: str) -> list[int]:
    direct = [int(many or 1) * int(bits) // 8 for many, bits in _PTX_LOAD.findall(text)]
    return direct + [int(size, 0) for size in _PTX_COPY.findall(text)]


def _amd_widths(text: str) -> list[int]:
    return [_AMD_BYTES.get(width, 0) for width in _AMD_LOAD.findall(text)]


def _occupancy(facts: Facts, registers: int, warps: int, shared: int) -> int:
    if facts.vendor == "amd":
        waves = 4 * min(8, 512 // max(8, -(-registers // 8) * 8))
        by_shared = facts.shared_memory // shared if shared else waves
        return min(waves // warps, by_shared)
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = 65536 // max(per_warp, 256) // warps
    by_shared = _SHARED[facts.arch] * 1024 // (shared + 1024)
    return min(by_registers, _WARPS[facts.arch] // warps, by_shared, 32)
