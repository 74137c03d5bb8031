"""The conversion from one folder to another."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsv3.checkpoint.convert.companions import CONFIG, companions, converted, write_companions
from dsv3.checkpoint.convert.compensated import write_layers
from dsv3.checkpoint.convert.files import digest_of, holds
from dsv3.checkpoint.convert.journal import Journal, fingerprint, foreign
from dsv3.checkpoint.convert.migrated import choose_shifts
from dsv3.checkpoint.convert.plan import OutFile, plan_files
from dsv3.checkpoint.convert.target import Target
from dsv3.checkpoint.convert.work import Work
from dsv3.checkpoint.folder import folder_config, model_folder
from dsv3.checkpoint.layout import INDEX, open_checkpoint, read_json
from dsv3.checkpoint.progress import bytes_progress
from dsv3.checkpoint.reader import Reader
from dsv3.checkpoint.validate import LoadPlan, plan_load
from dsv3.errors import CheckpointError, Dsv3Error, UsageError
from dsv3.graph.config import ModelConfig

_MARGIN = 1 << 20  # of disk, for the small files


@dataclass
class Conversion:
    """A conversion that has been planned and checked against its source's headers; nothing is written yet."""

    source: Path
    folder: Path
    target: Target
    config: ModelConfig
    plan: LoadPlan
    files: list[OutFile]

    @property
    def read_bytes(self) -> int:
        return sum(unit.nbytes for file in self.files for unit in file.units)

    @property
    def write_bytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    def sources(self) -> list[Path]:
        """Every file that is read."""
        entries = [e for i in self.plan.items for e in (i.entry, i.scale) if e is not None]
        entries += [copy for copy, _ in self.plan.copies]
        return list({part.file for e in entries for part in (*e.parts, *e.replicas)})


def plan_conversion(source: str, folder: Path, target: Target) -> Conversion:
    """CheckpointError for a source that is not what its configuration says, UsageError for a conversion that makes no sense."""
    where = model_folder(source, False)
    assert where is not None
    config = folder_config(where)
    entries = open_checkpoint(where)
    ranks = any(len(e.parts) > 1 or e.parts[0].key != e.name for e in entries.values())
    target.check(config, ranks)
    plan = plan_load(config, entries, where, target.mtp)
    sharded = (where / INDEX).exists()
    return Conversion(where, folder, target, config, plan, plan_files(config, plan, target, sharded))


def convert(
    source: str,
    folder: Path,
    target: Target,
    *,
    windows: Tensor | None = None,
    workers: int = 2,
    progress: bool | None = None,
) -> Conversion:
    """Write the checkpoint in `folder`, which must not exist, be empty, or hold the same conversion unfinished. windows: the
    calibration text, token ids [S, W], for a target that calibrates.

    Files appear under their names when they are whole and on the disk; config.json comes last. A conversion that was killed
    goes on: files that were finished are verified by their hash, and made again if they are not what was written; one that is
    `complete` is left alone. Raises UsageError, CheckpointError, and Dsv3Error where the disk does not do what it should.
    """
    planned = plan_conversion(source, folder, target)
    if complete(planned):
        return planned
    with _disk(folder):
        made = _make_folder(planned)
        name = fingerprint(planned.sources(), planned.files, f"{target} {_digest(windows)}")
        with ExitStack() as failed:
            failed.callback(_clean, folder, made)
            with Journal(folder, name) as journal:
                _write(planned, journal, windows, workers, progress)
                write_companions(planned.source, folder, planned.config, target, planned.files)
                _remove_notes(folder)
                journal.remove()
            failed.pop_all()
    return planned


def complete(planned: Conversion) -> bool:
    """Whether the folder holds this very conversion, as far as names, headers and times of change can tell: what a conversion
    leaves that was killed after its last file."""
    folder, target = planned.folder, planned.target
    paths = [folder / file.name for file in planned.files]
    if target.calibrate or (folder / Journal.NAME).exists() or not all(path.is_file() for path in [*paths, folder / CONFIG]):
        return False
    newest = max(path.stat().st_mtime_ns for path in planned.sources())
    if any(path.stat().st_mtime_ns < newest for path in paths):
        return False
    if read_json(folder / CONFIG) != converted(planned.source, planned.config, target):
        return False
    return all(holds(path, file) for path, file in zip(paths, planned.files, strict=True))


def _write(planned: Conversion, journal: Journal, windows: Tensor | None, workers: int, progress: bool | None) -> None:
    """All weights that are not written yet."""
    todo, folder, target = _unfinished(planned, journal, progress), planned.folder, planned.target
    _check_space(folder, todo)
    if target.calibrate and windows is None:
        raise UsageError("calibrating needs a text: token ids in windows")
    if windows is not None and target.to == "int8" and todo:
        shifts = choose_shifts(planned.config, planned.plan, windows, folder, progress)
        again = plan_files(planned.config, planned.plan, target, (planned.source / INDEX).exists(), shifts)
        names = {file.name for file in todo}
        todo = [file for file in again if file.name in names]
    plain = [f for f in todo if f.layer is None or f.layer < 0]
    with bytes_progress("converting", sum(f.nbytes for f in plain), progress) as advance:
        Work(folder, Reader(), journal.add, advance).run(plain, workers)
    if windows is not None and target.by_layer:
        layers = {f.layer: f for f in planned.files if f.layer is not None}
        write_layers(planned.config, planned.plan, windows, folder, layers, journal.finished, journal.add, progress)


def _digest(windows: Tensor | None) -> str:
    return "" if windows is None else hashlib.sha256(windows.to(torch.int64).numpy().tobytes()).hexdigest()


def _remove_notes(folder: Path) -> None:
    """What a calibration kept for itself."""
    for path in folder.glob(".dsv3-*.safetensors*"):
        path.unlink()


def _make_folder(planned: Conversion) -> bool:
    """Whether it had to be made."""
    folder = planned.folder
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; name a folder to write into")
    if folder.exists() and folder.resolve() == planned.source.resolve():
        raise UsageError(f"{folder} is the checkpoint itself; name another folder")
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    started = (folder / Journal.NAME).exists()
    known = companions(planned.source, planned.files) if started else []
    if others := foreign(folder, planned.files if started else [], known):
        raise UsageError(f"{folder} holds {others[0]}: nothing is overwritten; choose a new folder")
    return made


def _clean(folder: Path, made: bool) -> None:
    """A folder that holds nothing worth keeping goes; a finished file is kept, for the next try."""
    try:
        names = [p.name for p in folder.iterdir()]
        if set(names) == {Journal.NAME} and (folder / Journal.NAME).read_bytes().count(b"\n") <= 1:
            (folder / Journal.NAME).unlink()
            names = []
        if not names and made:
            folder.rmdir()
    except OSError:  # what failed before is what there is to say
        return


def _unfinished(planned: Conversion, journal: Journal, progress: bool | None) -> list[OutFile]:
    """The files that are still to be written, after a look at those that are said to be whole."""
    claimed = [f for f in planned.files if f.name in journal.finished]
    whole = set()
    with bytes_progress("verifying", sum(f.nbytes for f in claimed), progress) as advance:
        for file in claimed:
            path = planned.folder / file.name
            try:
                if path.is_file() and digest_of(path) == journal.finished[file.name]:
                    whole.add(file.name)
            except CheckpointError:  # damaged since: made again, like one that is missing
                path.unlink(missing_ok=True)
            advance(file.nbytes)
    return [f for f in planned.files if f.name not in whole]


def _check_space(folder: Path, todo: list[OutFile]) -> None:
    needed, free = sum(f.nbytes for f in todo) + _MARGIN, shutil.disk_usage(folder).free
    if needed > free:
        raise Dsv3Error(
            f"{folder}: needs {needed / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free; make room, or choose another disk"
        )


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """What the operating system says of the destination, as an error for a person."""
    try:
        yield
    except OSError as error:
        what = error.strerror or str(error)
        where = os.fspath(error.filename) if error.filename else folder
        raise Dsv3Error(f"{where}: cannot be written: {what}; nothing half-written was left under a final name") from error
