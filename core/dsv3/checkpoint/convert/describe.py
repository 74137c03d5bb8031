"""A planned conversion, for a person."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

from dsv3.checkpoint.convert.companions import companions
from dsv3.checkpoint.convert.run import Conversion


def describe(planned: Conversion) -> str:
    """What `dsv3 convert --dry-run` prints: what is read, the files that would be written, and whether they fit on the disk."""
    tensors = sum(len(file.outputs) for file in planned.files)
    kinds = Counter[str]()
    for file in planned.files:
        for output in file.outputs:
            kinds[output.dtype] += output.nbytes
    held = ", ".join(f"{dtype} {_size(n)}" for dtype, n in kinds.most_common())
    lines = [
        f"{planned.source} ({planned.config.quant_method if planned.config.quant_method != 'none' else 'unquantised'}) "
        f"-> {planned.folder} ({planned.target.to})",
        f"reads  {_size(planned.read_bytes)} of tensors",
        f"writes {_size(planned.write_bytes)} in {tensors} tensors: {held}",
        *(f"  {file.name}  {len(file.outputs)} tensors, {_size(file.nbytes)}" for file in planned.files),
        f"  {', '.join(companions(planned.source, planned.files))}",
        f"disk   {_size(shutil.disk_usage(_existing(planned.folder)).free)} free",
    ]
    return "\n".join(lines)


def _size(n: int) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.2f} {unit}"
    return f"{n} bytes"


def _existing(path: Path) -> Path:
    """The nearest folder above that is there already."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
