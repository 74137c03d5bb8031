"""SoC names as the driver gives them, and what each generation has. Importing it costs no torch.

Names: torch_npu.npu.get_device_name. "Ascend910B" without a digit is an older chip than "Ascend910B1": only whole names count.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dsv3.plugin import Capability

_DTYPES = frozenset({"bfloat16", "float32", "int8"})
_UNITS = frozenset({"bf16_mma", "int8_mma"})


@dataclass(frozen=True)
class Facts:
    """One generation. names: a pattern over whole SoC names."""

    arch: str
    title: str
    names: str
    capability: Capability


# None has float64. FP8 of the 950 is MX, one power of two per 32 numbers: not the 128x128 blocks of "fp8_mma".
_ALL = (
    Facts("910b", "Ascend 910B", r"Ascend910B([1-4]|2C|4-1)", Capability(_DTYPES, _UNITS)),
    Facts("910c", "Ascend 910C", r"Ascend910_93\d\d", Capability(_DTYPES, _UNITS)),
    Facts("950", "Ascend 950", r"Ascend950\w*|Ascend910_95\d\d", Capability(_DTYPES, _UNITS | {"mx_fp8"})),
)
ARCHITECTURES: dict[str, Facts] = {facts.arch: facts for facts in _ALL}
# Known, but without bfloat16.
_TOO_OLD = re.compile(r"Ascend(310\w*|910|910A|910B|910ProA|910ProB|910PremiumA)")


def arch_of(soc: str) -> str | None:
    """The architecture of a SoC by its whole name; None for one that is not known."""
    return next((facts.arch for facts in _ALL if re.fullmatch(facts.names, soc)), None)


def too_old(soc: str) -> bool:
    """Whether it is a chip from before the 910B, which has no bfloat16."""
    return _TOO_OLD.fullmatch(soc) is not None
