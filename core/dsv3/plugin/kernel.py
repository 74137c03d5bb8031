"""A kernel's metadata, and the call it is asked about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dsv3.plugin.device import Device

Numerics = Literal["exact", "f32", "tc14", "bf16-operand", "bf16-p"]


@dataclass(frozen=True)
class Call:
    """What is known about a call when kernels are bound: operator, its dimensions, the dtype of each tensor argument
    (torch names), the quantisation of its weights ("none" where it has none), and the device.

    Dimensions that change from step to step other than with the number of tokens (sequences, pages, keys) are not in
    `dims`.
    """

    op: str
    dims: Mapping[str, int]
    dtypes: Mapping[str, str]
    quant: str
    device: Device


@dataclass(frozen=True)
class Kernel:
    """Metadata of one implementation of an operator; nothing is imported before it is bound.

    op: operator name. name: unique within the backend and operator. target: "module:function"; core passes every argument
    by keyword, with defaults filled in. since: the version of the operator's specification it was written to.
    needs: `Feature`, `Arch`, `DType`, `Scheme`, `Divides`, `AtMost`, `AtLeast`; all must hold (several `DType` on one
    argument are alternatives). accepts: "module:function" taking a `Call`, returning None or the reason for refusal.
    layouts: weight argument -> layout it expects ("weights.q_a" inside mla_prolog). priority: order within the backend.
    numerics, deterministic, batch_invariant, graph_safe: claims that the conformance suite holds it to.
    configs: a table of meta-parameters: a name in configs/kernels, or "package:path/file.json" of the backend's own package;
    the function then takes one more keyword, `config`, a read-only mapping with the entry chosen at binding (by `dsv3 tune`,
    else the first that matches).
    """

    op: str
    name: str
    target: str
    since: int = 1
    needs: tuple[Any, ...] = ()
    accepts: str | None = None
    layouts: Mapping[str, str] = field(default_factory=dict)
    priority: int = 0
    numerics: Numerics = "f32"
    deterministic: bool = True
    batch_invariant: bool = False
    graph_safe: bool = True
    configs: str | None = None
