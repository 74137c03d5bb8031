"""One safetensors file of known contents, filled from several threads, under its final name only when it is whole."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from pathlib import Path

from dsv3.checkpoint.convert.plan import OutFile
from dsv3.checkpoint.convert.unit import Output, Unit
from dsv3.checkpoint.header import read_header
from dsv3.errors import CheckpointError

PARTIAL = ".partial"
_READ = 1 << 22


def header_of(file: OutFile) -> bytes:
    """The header with its length, padded to 8 bytes; the tensors follow in order, without gaps."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}} if file.metadata else {}
    at = 0
    for output in file.outputs:
        entries[output.name] = {"dtype": output.dtype, "shape": list(output.shape), "data_offsets": [at, at + output.nbytes]}
        at += output.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _allocate(handle: int, size: int) -> None:
    """Take the disk space at once, where the file system can: a full disk shows now, not after an hour."""
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise


class FileWriter:
    """A file of the destination. `digest` is the SHA-256 over the header and the SHA-256 of every tensor, so that threads can
    hash what they write."""

    def __init__(self, folder: Path, file: OutFile) -> None:
        self.path, self.file = folder / file.name, file
        self.partial = folder / (file.name + PARTIAL)
        self._header = header_of(file)
        self._offsets: dict[str, int] = {}
        at = len(self._header)
        for output in file.outputs:
            self._offsets[output.name] = at
            at += output.nbytes
        self.size, self.left = at, len(file.units)
        self._digests: dict[str, bytes] = {}
        self._handle = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            _allocate(self._handle, self.size)
            os.pwrite(self._handle, self._header, 0)
        except OSError:
            self.discard()
            raise

    def sinks(self, unit: Unit) -> list[Sink]:
        """Where the bytes of a unit's outputs go."""
        return [Sink(self._handle, self._offsets[output.name], output) for output in unit.outputs]

    def done(self, sinks: list[Sink]) -> None:
        """A unit is complete."""
        for sink in sinks:
            self._digests[sink.output.name] = sink.digest()

    def finish(self) -> str:
        """Flush to the disk, then give the file its name. The digest, in hexadecimal."""
        os.fsync(self._handle)
        os.close(self._handle)
        self._handle = -1
        os.rename(self.partial, self.path)
        sync_folder(self.path.parent)
        return _total(self._header, [self._digests[output.name] for output in self.file.outputs])

    def discard(self) -> None:
        """Remove what is not whole."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        self.partial.unlink(missing_ok=True)


class Sink:
    """The bytes of one tensor, written in order."""

    def __init__(self, handle: int, offset: int, output: Output) -> None:
        self.output, self._handle, self._at, self._end = output, handle, offset, offset + output.nbytes
        self._hash = hashlib.sha256()

    def write(self, data: memoryview) -> None:
        if self._at + len(data) > self._end:
            raise AssertionError(f"{self.output.name}: more bytes than its shape has")
        self._hash.update(data)
        while data:
            written = os.pwrite(self._handle, data, self._at)
            self._at += written
            data = data[written:]

    def digest(self) -> bytes:
        if self._at != self._end:
            raise AssertionError(f"{self.output.name}: {self._end - self._at} bytes are missing")
        return self._hash.digest()


def holds(path: Path, file: OutFile) -> bool:
    """Whether a file has the header and the size of `file`."""
    header = header_of(file)
    with path.open("rb") as f:
        return f.read(len(header)) == header and path.stat().st_size == len(header) + file.nbytes


def digest_of(path: Path) -> str:
    """What `FileWriter.finish` said of the file, computed from its bytes."""
    infos = read_header(path)
    digests = []
    with path.open("rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        f.seek(0)
        header = f.read(8 + length)
        for info in sorted(infos.values(), key=lambda i: (i.start, i.end)):
            hashed, left = hashlib.sha256(), info.end - info.start
            while left:
                block = f.read(min(left, _READ))
                if not block:
                    raise CheckpointError(f"{path.name}: ended while it was read")
                hashed.update(block)
                left -= len(block)
            digests.append(hashed.digest())
    return _total(header, digests)


def _total(header: bytes, digests: list[bytes]) -> str:
    whole = hashlib.sha256(header)
    for digest in digests:
        whole.update(digest)
    return whole.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames in the folder survive a crash of the machine."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, data: bytes) -> None:
    """A small file, under its name only when it is whole."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.rename(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
