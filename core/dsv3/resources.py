"""Files that ship with the program: model presets, the demo checkpoint, the plugin template.

One lookup for a checkout, an editable install, a wheel and a source distribution: a wheel carries the folders beside the
code (`dsv3/_resources`), everywhere else they are at the repository's root, two levels above `core/dsv3`.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def resources(*parts: str) -> Path:
    """Path of a shipped file or folder, e.g. `resources("configs", "models")`; FileNotFoundError names where it looked."""
    candidates = [_PACKAGE / "_resources", _PACKAGE.parent.parent]
    for root in candidates:
        path = root.joinpath(*parts)
        if path.exists():
            return path
    looked = " and ".join(str(root.joinpath(*parts)) for root in candidates)
    raise FileNotFoundError(f"shipped file missing: {'/'.join(parts)}; looked at {looked}; reinstall dsv3")
