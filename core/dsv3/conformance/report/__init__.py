"""Reports of a conformance run, each in a module: terminal, junit, jsonl, support, html, certificate; `write_all` writes the
files of all of them."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dsv3.conformance.report import certificate, html, jsonl, junit, support
from dsv3.conformance.result import Report
from dsv3.errors import UsageError

__all__ = ["FILES", "Written", "write_all"]

# In the order in which they appear: a certificate is never there before the results it certifies.
FILES = ("results.jsonl", "junit.xml", "SUPPORT.md", "report.html", "certificate.json")


@dataclass(frozen=True)
class Written:
    """paths: the files, by name. refusal: why there is no certificate; "" if there is one."""

    paths: dict[str, Path]
    refusal: str


def write_all(report: Report, folder: str | Path, *, lists: Path | None = None) -> Written:
    """Write junit.xml, results.jsonl, SUPPORT.md and report.html into a folder, made if it is missing, and certificate.json if
    the run earned one.

    All files are written aside first, and moved over those of an earlier report when they are complete; the earlier
    certificate goes before that, so that it never stands beside results it is not about. Other files in the folder stay.
    UsageError if the folder cannot be written to; it is then as it was. lists: frozen lists other than the shipped.
    """
    folder = Path(folder)
    existed = folder.exists()
    aside: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder, prefix=".report-"))
        refusal = _write(report, aside, lists)
        (folder / "certificate.json").unlink(missing_ok=True)
        names = [name for name in FILES if (aside / name).exists()]
        for name in names:
            os.replace(aside / name, folder / name)
        aside.rmdir()
    except BaseException as error:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        if not existed:
            with suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise UsageError(f"cannot write the report to {folder}: {error}; give a folder that can be written to") from error
        raise
    return Written({name: folder / name for name in names}, refusal)


def _write(report: Report, folder: Path, lists: Path | None) -> str:
    jsonl.write(report, folder / "results.jsonl")
    junit.write(report, folder / "junit.xml")
    support.write(report, folder / "SUPPORT.md")
    html.write(report, folder / "report.html")
    refusal = certificate.refusal(report, lists)
    if not refusal:
        certificate.write(report, folder / "certificate.json", lists)
    return refusal
