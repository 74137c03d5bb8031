"""INT8 with outlier channels moved into the weights: choose on a text, then convert like any other."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dsv3.checkpoint.calibrate.migrate import Migrate, Shift
from dsv3.checkpoint.calibrate.source import Source
from dsv3.checkpoint.calibrate.sweep import Sweep
from dsv3.checkpoint.convert.files import write_whole
from dsv3.checkpoint.progress import steps_progress
from dsv3.checkpoint.reader import Reader
from dsv3.checkpoint.validate import LoadPlan
from dsv3.graph.config import ModelConfig

SHIFTS = ".dsv3-shifts.safetensors"


def choose_shifts(
    config: ModelConfig, plan: LoadPlan, windows: Tensor, folder: Path, progress: bool | None
) -> dict[str, Shift]:
    """Shifts by tensor; kept in the folder while the conversion lasts."""
    path = folder / SHIFTS
    if path.exists():
        found = _read(path)
        if found is not None:
            return found
    source = Source(config, plan, Reader())
    visitor = Migrate(source.real)
    sweep = Sweep(config, source, windows, visitor)
    state = sweep.start()
    with steps_progress("calibrating", sweep.layers, progress) as step:
        while state.layer < sweep.layers:
            state = sweep.advance(state)
            step(f"layer {state.layer} done")
    tensors = {"none": torch.zeros(1, dtype=torch.int8)}
    for name, shift in visitor.shifts.items():
        for axis, tensor in (("rows", shift.rows), ("columns", shift.columns)):
            if tensor is not None:  # many linears share one
                tensors[f"{name}:{axis}"] = tensor.clone()
    write_whole(path, save(tensors))
    return visitor.shifts


def _read(path: Path) -> dict[str, Shift] | None:
    """None for a file that is damaged: the choice is made again."""
    try:
        tensors = load(path.read_bytes())
    except SafetensorError:
        return None
    shifts: dict[str, Shift] = {}
    for key, tensor in tensors.items():
        name, _, axis = key.partition(":")
        if axis:
            setattr(shifts.setdefault(name, Shift()), axis, tensor)
    return shifts
