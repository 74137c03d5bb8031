"""The conversion from one folder to another."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsv3.checkpoint.calibrate.windows import check_windows
from dsv3.checkpoint.convert.companions import CONFIG, companions, converted, write_companions
from dsv3.checkpoint.convert.compensated import write_layers
from dsv3.checkpoint.convert.files import digest_of, holds, write_whole
from dsv3.checkpoint.convert.journal import Journal, fingerprint, foreign
from dsv3.checkpoint.convert.migrated import choose_shifts
from dsv3.checkpoint.convert.plan import OutFile, plan_files
from dsv3.checkpoint.convert.target import Target
from dsv3.checkpoint.convert.work import Work
from dsv3.checkpoint.folder import folder_config, model_folder
from dsv3.checkpoint.layout import INDEX, open_checkpoint, read_json
from dsv3.checkpoint.progress import bytes_progress
from dsv3.checkpoint.reader import Reader, check_copy
from dsv3.checkpoint.validate import LoadPlan, plan_load
from dsv3.errors import CheckpointError, Dsv3Error, UsageError
from dsv3.graph.config import ModelConfig

# Names the conversion that the folder holds, finished: another of the same shape is not taken for it.
DONE = ".dsv3-converted"
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
    wide = any(e.dtype == "F32" and name.endswith("proj.weight") for name, e in entries.items())
    target.check(config, ranks, wide)
    plan = plan_load(config, entries, where, target.mtp)
    sharded = (where / INDEX).exists()
    files = plan_files(config, plan, target, sharded)
    companions(where, files)  # refuses those that cannot come along
    return Conversion(where, folder, target, config, plan, files)


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
    if target.calibrate and windows is None:
        raise UsageError("calibrating needs a text: token ids in windows")
    if complete(planned, windows):
        return planned
    if windows is not None:
        check_windows(planned.config, windows, target.mtp)
    with _disk(folder):
        made = _make_folder(planned)
        with ExitStack() as failed:
            failed.callback(_remove_empty, folder, made)
            with Journal(folder, _fingerprint(planned, windows)) as journal, ExitStack() as unwritten:
                unwritten.callback(_forget, folder, journal)
                _refuse_foreign(planned, journal.resumed)  # again, now that nobody else writes here
                _write(planned, journal, windows, workers, progress)
                write_companions(planned.source, folder, planned.config, target, planned.files)
                write_whole(folder / DONE, _fingerprint(planned, windows).encode())
                _remove_notes(folder)
                journal.remove()
                unwritten.pop_all()
            failed.pop_all()
    return planned


def complete(planned: Conversion, windows: Tensor | None = None) -> bool:
    """Whether the folder holds this very conversion of this very source, finished and, as far as names and headers can tell,
    untouched since."""
    folder = planned.folder
    with _disk(folder):
        paths = [folder / file.name for file in planned.files]
        if (folder / Journal.NAME).exists() or not all(path.is_file() for path in [*paths, folder / CONFIG, folder / DONE]):
            return False
        if (folder / DONE).read_bytes() != _fingerprint(planned, windows).encode():
            return False
        if read_json(folder / CONFIG) != converted(planned.source, planned.config, planned.target):
            return False
        return all(holds(path, file) for path, file in zip(paths, planned.files, strict=True))


def _fingerprint(planned: Conversion, windows: Tensor | None) -> str:
    return fingerprint(planned.sources(), planned.files, f"{planned.target} {planned.config} {_digest(windows)}")


def _write(planned: Conversion, journal: Journal, windows: Tensor | None, workers: int, progress: bool | None) -> None:
    """All weights that are not written yet."""
    todo, folder, target = _unfinished(planned, journal, progress), planned.folder, planned.target
    _check_space(folder, todo)
    reader = Reader()
    for copy, original in planned.plan.copies if todo else []:
        check_copy(copy, original, reader)
    if windows is not None and target.to == "int8" and todo:
        shifts = choose_shifts(planned.config, planned.plan, windows, folder, progress)
        again = plan_files(planned.config, planned.plan, target, (planned.source / INDEX).exists(), shifts)
        names = {file.name for file in todo}
        todo = [file for file in again if file.name in names]
    plain = [f for f in todo if f.layer is None or f.layer < 0]
    with bytes_progress("converting", sum(f.nbytes for f in plain), progress) as advance:
        Work(folder, reader, journal.add, advance).run(plain, workers)
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
    _refuse_foreign(planned, (folder / Journal.NAME).exists())
    return made


def _refuse_foreign(planned: Conversion, started: bool) -> None:
    """UsageError for a folder that holds what this conversion has not put there. started: it has a journal from before."""
    known = companions(planned.source, planned.files) if started else []
    if others := foreign(planned.folder, planned.files if started else [], known):
        raise UsageError(f"{planned.folder} holds {others[0]}: nothing is overwritten; choose a new folder")


def _forget(folder: Path, journal: Journal) -> None:
    """A conversion that failed before it had anything worth keeping leaves no journal. Only for who holds its lock: to all
    others it is what another process goes on from."""
    try:
        if not journal.finished and [p.name for p in folder.iterdir()] == [Journal.NAME]:
            journal.remove()
    except OSError:  # what failed before is what there is to say
        return


def _remove_empty(folder: Path, made: bool) -> None:
    if made:
        with suppress(OSError):  # not empty: a finished file is kept, for the next try
            folder.rmdir()


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
    for file in claimed:
        if file.name not in whole:
            del journal.finished[file.name]
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
