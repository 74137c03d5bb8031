"""What of a conversion is done: a line per finished file, in the destination, for a conversion that was killed to go on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from dsv3.checkpoint.convert.files import PARTIAL, header_of, sync_folder
from dsv3.checkpoint.convert.plan import OutFile
from dsv3.errors import UsageError


def fingerprint(sources: list[Path], files: list[OutFile], options: str) -> str:
    """Names a conversion: what it reads (by name, size and time of change), what it writes, and how."""
    whole = hashlib.sha256(options.encode())
    for path in sorted(sources):
        stat = path.stat()
        whole.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    for file in files:
        whole.update(file.name.encode() + header_of(file))
    return whole.hexdigest()


class Journal:
    """Open while a conversion runs; one process at a time. `finished` is file name -> digest; `resumed`: some conversion had
    begun it before."""

    NAME = ".dsv3-convert.jsonl"

    def __init__(self, folder: Path, name: str) -> None:
        self.path, self.finished, self.resumed = folder / self.NAME, dict[str, str](), False
        self._file = self.path.open("a+b")
        with ExitStack() as failed:
            failed.callback(self._file.close)
            self._lock(folder)
            self._read(folder, name)
            failed.pop_all()

    def _lock(self, folder: Path) -> None:
        busy = UsageError(f"{folder}: another process is converting into it; wait for it, or choose another folder")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise busy from error
        # Whoever had it may have removed it since it was opened here: then this lock keeps nobody out.
        if not self.path.exists() or not os.path.samestat(self.path.stat(), os.fstat(self._file.fileno())):
            raise busy

    def _read(self, folder: Path, name: str) -> None:
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        if not lines or not lines[0].endswith(b"\n"):  # new, or killed before its first line was whole
            self._file.truncate(0)
            self._append({"conversion": name})
            sync_folder(folder)
            return
        self.resumed = True
        if _parsed(lines[0], "conversion") != (name,):
            what = "an unfinished conversion of another checkpoint, or with other options"
            raise UsageError(f"{folder}: holds {what}; finish that one, delete the folder, or choose another")
        whole = len(lines[0])
        for line in lines[1:]:
            found = _parsed(line, "file", "digest")
            if found is None:  # killed, or the machine stopped, while it was written: take it back
                self._file.truncate(whole)
                break
            self.finished[found[0]] = found[1]
            whole += len(line)

    def add(self, file: str, digest: str) -> None:
        """A file is whole."""
        self.finished[file] = digest
        self._append({"file": file, "digest": digest})

    def _append(self, line: dict[str, str]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def remove(self) -> None:
        """The conversion is complete, or nothing of it is worth keeping."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


def _parsed(line: bytes, *names: str) -> tuple[str, ...] | None:
    """The strings that a line has under these names; None if it is damaged."""
    try:
        values = json.loads(line.decode()) if line.endswith(b"\n") else None
    except ValueError:
        return None
    found = [values.get(name) for name in names] if isinstance(values, dict) else []
    strings = tuple(value for value in found if isinstance(value, str))
    return strings if len(strings) == len(names) else None


def foreign(folder: Path, files: list[OutFile], companions: list[str]) -> list[str]:
    """What the folder holds that no conversion to these files has put there."""
    ours = {name + end for name in (*(f.name for f in files), *companions) for end in ("", PARTIAL)}
    return sorted(p.name for p in folder.iterdir() if p.name not in ours and not p.name.startswith(".dsv3-"))
