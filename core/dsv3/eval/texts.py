"""Texts to score: files and folders, cut into documents. No torch: a wrong path is reported before a model is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv3.errors import UsageError

SEPARATOR = "<|endoftext|>"  # between documents of a file, as public corpora have it


@dataclass(frozen=True)
class Text:
    """A name for the tables, and what the file holds."""

    name: str
    content: str

    @property
    def documents(self) -> list[str]:
        """The parts between separators, stripped; empty ones are left out."""
        return [part for piece in self.content.split(SEPARATOR) if (part := piece.strip())]


def read_texts(paths: Sequence[str | Path]) -> list[Text]:
    """Files, and all *.txt of folders in name order. A text's name is its file's, or its path where two share one.

    UsageError for a path that is missing, a folder without *.txt, and a file that is empty, not readable or not UTF-8.
    """
    files = [file for path in paths for file in _files(Path(path))]
    if not files:
        raise UsageError("no text to score; name files, or folders with *.txt files")
    seen = Counter(file.name for file in files)
    return [Text(file.name if seen[file.name] == 1 else str(file), _content(file)) for file in files]


def _files(path: Path) -> list[Path]:
    try:
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix == ".txt" and p.is_file())
            if not found:
                raise UsageError(f"text {str(path)!r} is a folder without *.txt files; name one that has some, or files")
            return found
        if path.exists():
            return [path]
    except (OSError, ValueError) as error:  # not permitted, a name too long, a NUL byte
        raise UsageError(f"text {str(path)!r}: {error}") from error
    raise UsageError(f"text {str(path)!r} does not exist; name a UTF-8 text file, or a folder of *.txt files")


def _content(path: Path) -> str:
    try:
        content = path.read_bytes().decode("utf-8-sig")  # bytes: line ends count as they are
    except OSError as error:
        raise UsageError(f"text {str(path)!r}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"text {str(path)!r} is not UTF-8 (byte {error.start}); encode it as UTF-8") from error
    text = Text(path.name, content)
    if not text.documents:
        raise UsageError(f"text {str(path)!r} is empty; leave it out")
    return content
