"""Reports of runs that never were, made from the real records: small, large, and with hostile text."""

from __future__ import annotations

import hashlib
import math
import random
from pathlib import Path
from typing import Any

from dsv3 import ops
from dsv3.conformance.report import installed
from dsv3.conformance.result import CaseResult, Report

HOSTILE = (
    "]]> <script>alert(1)</script> & \x00\x07\x1b[31m \ud800 \ufffe \u202e | `code` [a](javascript:x) **b** "
    "<!-- -- > \" ' é 模型 \U0001f600"
)


def case(case_id: str, status: str = "passed", **fields: Any) -> CaseResult:
    """A result with sensible values where none are given."""
    op = fields.pop("op", case_id.partition("/")[0])
    values: dict[str, Any] = {
        "kernel": "" if status == "absent" else "acme.fast",
        "margin": 3.0 if status in ("failed", "waived") else 0.25,
        "nmse": 1e-12,
        "message": "" if status == "passed" else f"{status} for a reason",
        "repeat": f"dsv3 conformance --backend acme --cases {case_id} --seed 0",
        "numerics": "f32",
        "seconds": 0.01,
        "level": case_id[:2].upper() if case_id[:3] in ("l0/", "l2/", "l3/") else "L1",
    }
    return CaseResult(id=case_id, op=op, status=status, **{**values, **fields})  # type: ignore[arg-type]


def report(cases: list[CaseResult], **info: Any) -> Report:
    """A run of backend acme, which claims every operator that has a kernel in a case."""
    claims: dict[str, list[str]] = {}
    for c in cases:
        if c.kernel and c.op:
            claims.setdefault(c.op, [])
            if c.kernel not in claims[c.op]:
                claims[c.op].append(c.kernel)
    facts = {
        "backend": "acme",
        "level": "L1",
        "size": "quick",
        "seed": 0,
        "date": "2025-01-31T12:00:00+00:00",
        "device": {"family": "npu", "arch": "acme_1", "index": 0, "name": "Acme One", "memory": 64 * 2**30, "driver": "1.2"},
        "plugin": {"dist": "dsv3-acme", "version": "1.0", "files": {}},
        "versions": installed.versions(),
        "seconds": 12.5,
        "list_sha256": "0" * 64,
        "claims": claims,
        "notes": [],
        "unmatched_waivers": [],
        "unexpected_passes": [],
    }
    return Report(cases, "v1 000000000000", {**facts, **info})


def write_list(folder: Path, ids: list[str], size: str = "quick") -> str:
    """A frozen list with profiles beside it; returns its sha256."""
    from dsv3.resources import resources

    home = folder / "v1"
    home.mkdir(parents=True, exist_ok=True)
    raw = ("# ids\n" + "".join(f"{i}\n" for i in ids)).encode()
    (home / f"{size}.txt").write_bytes(raw)
    shipped = resources("configs", "conformance", "v1", "profiles.json")
    (home / "profiles.json").write_bytes(shipped.read_bytes())
    return hashlib.sha256(raw).hexdigest()


def large(count: int, seed: int = 0) -> Report:
    """A run of `count` cases over all operators with every status and a plausible spread of margins."""
    draw = random.Random(seed)
    names = [n for n in ops.names() if n not in ("mla_prolog", "moe", "all_reduce")]
    cases = []
    for i in range(count):
        op = names[i % len(names)]
        case_id = f"{op}/T{draw.choice((0, 1, 63, 64, 129, 4097))}/K{draw.choice((128, 576, 7168))}/bf16/{i // len(names)}"
        chance = draw.random()
        if op in ("route", "fused_experts", "add_rms_norm", "embedding"):
            cases.append(case(case_id, "absent", message="acme has no kernel for it", margin=0.0, nmse=0.0))
        elif op == "linear" and chance < 0.3:
            cases.append(case(case_id, "absent", kernel="acme.gemm", message="acme.gemm needs Divides(K, 128): K is 576"))
        elif op == "mla_decode" and chance < 0.03:
            index = (draw.randrange(64), draw.randrange(128), draw.randrange(512))
            details = {
                "output": "o",
                "index": index,
                "expected": 0.123456789,
                "found": math.nan,
                "error": math.nan,
                "budget": 1e-3,
            }
            text = "o: expected 0.123456789, found nan at (3, 17, 200); error nan, budget 0.001"
            margin = draw.choice((math.inf, math.nan, 4.5, 1.7))
            cases.append(case(case_id, "failed", kernel="acme.split_kv", margin=margin, message=text, details=details))
        elif op == "act_quant" and chance < 0.05:
            waiver = {"pattern": "act_quant/*", "reason": "ties go up before driver 1.3", "url": "https://example.com/issues/7"}
            cases.append(case(case_id, "waived", margin=2.0, message="waived: ties", details={"waiver": waiver}))
        else:
            margin = 0.0 if op in ("moe_permute", "kv_cache_write", "fn_to_fnuz") else min(0.98, 10 ** draw.gauss(-1.2, 0.45))
            cases.append(
                case(
                    case_id,
                    "passed",
                    margin=margin,
                    nmse=10 ** draw.gauss(-12, 1),
                    numerics="tc14" if op == "linear" else "f32",
                )
            )
    for i in range(6):
        cases.append(case(f"l0/probe/{i}", op="", kernel="", margin=0.0))
        cases.append(case(f"l2/mtp/{i}", op="", kernel="", margin=0.1 * i))
    return report(cases, level="L2")
