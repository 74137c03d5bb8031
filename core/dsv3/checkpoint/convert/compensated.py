"""INT4 with compensated rounding: the model runs over the text while its layers are written, a file for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dsv3.checkpoint.calibrate.compensate import Compensate
from dsv3.checkpoint.calibrate.source import Source
from dsv3.checkpoint.calibrate.sweep import State, Sweep
from dsv3.checkpoint.convert.files import FileWriter, write_whole
from dsv3.checkpoint.convert.linear import Linear, pack
from dsv3.checkpoint.convert.plan import OutFile
from dsv3.checkpoint.convert.unit import Unit, buffer_of
from dsv3.checkpoint.progress import steps_progress
from dsv3.checkpoint.reader import Array, Reader
from dsv3.checkpoint.validate import LoadPlan
from dsv3.graph.config import ModelConfig

HIDDEN = ".dsv3-hidden-{}.safetensors"


def write_layers(
    config: ModelConfig,
    plan: LoadPlan,
    windows: Tensor,
    folder: Path,
    files: Mapping[int, OutFile],
    finished: Mapping[str, str],
    add: Callable[[str, str], None],
    progress: bool | None,
) -> None:
    """files: layer -> its file; finished: names of those that are whole; add(name, digest) is called for each new one. The
    hidden states before the first layer that is not whole are in the folder: a conversion that was killed goes on there."""
    reader = Reader()
    writing = _Writing(folder, reader)
    sweep = Sweep(config, Source(config, plan, reader), windows, Compensate(writing.linear))
    state = _resumed(folder, files, finished) or sweep.start()
    with steps_progress("calibrating and rounding", sweep.layers - state.layer, progress) as step:
        while state.layer < sweep.layers:
            layer = state.layer
            if layer in files:
                with ExitStack() as failed:
                    writer = writing.begin(files[layer])
                    failed.callback(writer.discard)
                    state = sweep.advance(state)
                    writing.others()
                    # Before the file has its name: a layer that is whole always has the states that follow it.
                    write_whole(folder / HIDDEN.format(state.layer), save({"hidden": state.hidden.contiguous()}))
                    digest = writer.finish()
                    failed.pop_all()
                add(files[layer].name, digest)
                (folder / HIDDEN.format(layer)).unlink(missing_ok=True)
            else:
                state = sweep.advance(state)
            step(f"layer {layer}")


def _resumed(folder: Path, files: Mapping[int, OutFile], finished: Mapping[str, str]) -> State | None:
    """Where to go on; None for the beginning, also where the states that are needed are missing: all layers are made again."""
    done = 0
    while done in files and files[done].name in finished:
        done += 1
    if not done:
        return None
    try:
        return State(load((folder / HIDDEN.format(done)).read_bytes())["hidden"], done)
    except (FileNotFoundError, SafetensorError, KeyError):  # a file before the last was damaged, or the states were
        return None


class _Writing:
    """The file of the layer that the sweep is in."""

    def __init__(self, folder: Path, reader: Reader) -> None:
        self._folder, self._reader = folder, reader
        self._writer: FileWriter | None = None
        self._left: dict[str, Unit] = {}

    def begin(self, file: OutFile) -> FileWriter:
        self._writer = FileWriter(self._folder, file)
        self._left = {unit.name: unit for unit in file.units}
        return self._writer

    def linear(self, name: str, codes: Tensor, scale: Tensor) -> None:
        """A linear was rounded."""
        unit = self._left.pop(name)
        assert isinstance(unit, Linear)
        self._write(unit, [pack(codes, scale, "int4", unit.shape[1], unit.shape)])

    def others(self) -> None:
        """What the sweep does not round."""
        for name in list(self._left):
            unit = self._left.pop(name)
            unit.check(self._reader)
            self._write(unit, unit.slices(self._reader))

    def _write(self, unit: Unit, slices: Iterable[tuple[Array, ...]]) -> None:
        assert self._writer is not None
        sinks = self._writer.sinks(unit)
        for parts in slices:
            for sink, part in zip(sinks, parts, strict=True):
                sink.write(buffer_of(part))
        self._writer.done(sinks)
