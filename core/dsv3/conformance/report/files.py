"""Report files appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from dsv3.errors import UsageError


def write_text(path: str | Path, text: str) -> None:
    """UTF-8 text under a temporary name in the same folder, then renamed. UsageError if it cannot be written."""
    path = Path(path)
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with open(handle, "wb") as file:
            file.write(text.encode("utf-8"))
        # mkstemp makes files that only their owner reads; a report is for others too.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error}; give a folder that can be written to") from error
    finally:
        # Gone already where the renaming worked.
        with suppress(OSError):
            os.unlink(temporary)
