"""Workers that take a conversion's units in order, whichever file they belong to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path

import torch

from dsv3.checkpoint.convert.files import FileWriter
from dsv3.checkpoint.convert.plan import OutFile
from dsv3.checkpoint.convert.unit import Unit, buffer_of
from dsv3.checkpoint.progress import Advance
from dsv3.checkpoint.reader import Reader


class Stopped(Exception):
    """Another worker failed."""


class Work:
    """Writes files into a folder. finished(name, digest) is called for each that is whole."""

    def __init__(self, folder: Path, reader: Reader, finished: Callable[[str, str], None], advance: Advance) -> None:
        self.folder, self.reader, self.finished, self.advance = folder, reader, finished, advance
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._open: list[FileWriter] = []

    def run(self, files: list[OutFile], workers: int) -> None:
        """Threads, because reading, arithmetic, hashing and writing all release the interpreter's lock. A failure stops all
        and removes the files that are not whole."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a worker is a core
        try:
            with ThreadPoolExecutor(workers) as pool:
                tasks = [pool.submit(self._unit, file, unit) for file in files for unit in file.units]
                tasks += [pool.submit(self._empty, file) for file in files if not file.units]
                self._wait(tasks)
        finally:
            torch.set_num_threads(threads)
            for writer in self._open:
                writer.discard()

    def _wait(self, tasks: list[Future[None]]) -> None:
        with ExitStack() as failed:
            failed.callback(self._cancel, tasks)  # when interrupted, too
            done, _ = wait(tasks, return_when=FIRST_EXCEPTION)
            failures = [e for task in done if (e := task.exception()) is not None]
            if failures:
                raise next((e for e in failures if not isinstance(e, Stopped)), failures[0])
            failed.pop_all()

    def _cancel(self, tasks: list[Future[None]]) -> None:
        self._stop.set()
        for task in tasks:
            task.cancel()

    def _writer(self, file: OutFile) -> FileWriter:
        """Made when its first unit starts: few files are open at a time."""
        with self._lock:
            for writer in self._open:
                if writer.file is file:
                    return writer
            self._open.append(FileWriter(self.folder, file))
            return self._open[-1]

    def _unit(self, file: OutFile, unit: Unit) -> None:
        with ExitStack() as failed:
            failed.callback(self._stop.set)
            writer = self._writer(file)
            unit.check(self.reader)
            sinks = writer.sinks(unit)
            read = 0
            for number, parts in enumerate(unit.slices(self.reader)):
                if self._stop.is_set():
                    raise Stopped
                for sink, part in zip(sinks, parts, strict=True):
                    sink.write(buffer_of(part))
                read += sum(part.nbytes for part in parts)
                if number % 16 == 15:
                    read = self._told(unit, read)
            self._told(unit, read)
            with self._lock:
                writer.done(sinks)
                writer.left -= 1
                whole = writer.left == 0
                if whole:
                    self._open.remove(writer)
            if whole:
                self._finish(writer)
            failed.pop_all()

    def _told(self, unit: Unit, written: int) -> int:
        """Progress counts bytes written."""
        with self._lock:
            self.advance(written)
        return 0

    def _finish(self, writer: FileWriter) -> None:
        with ExitStack() as failed:
            failed.callback(writer.discard)
            digest = writer.finish()
            failed.pop_all()
        with self._lock:
            self.finished(writer.file.name, digest)

    def _empty(self, file: OutFile) -> None:
        self._finish(FileWriter(self.folder, file))
