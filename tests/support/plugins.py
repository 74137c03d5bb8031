"""Plugins made on the fly: a module and the metadata that pip would have written, in a folder that goes on sys.path."""

from __future__ import annotations

from pathlib import Path

GROUP = "dsv3.backends.v1"
GOOD = """
from dsv3.plugin import *

class Made(BackendBase):
    name = "{name}"
    version = "1"
    def devices(self, emulate=None):
        return [Device("{family}", "{family}_1")]
    def probe(self, device):
        return Probe("usable", Capability(dtypes=frozenset({{"float32", "bfloat16", "float64"}})))
    def kernels(self, device):
        return []
    {body}

backend = Made()
"""


def good(name: str, family: str = "cpu", body: str = "") -> str:
    """Source of a backend that works, with `body` added to its class."""
    return GOOD.format(name=name, family=family, body=body.strip().replace("\n", "\n    "))


def write_plugin(root: Path, name: str, source: str, dist: str | None = None, group: str = GROUP, version: str = "1.0") -> Path:
    """A distribution with one entry point `name`, whose module holds `source`."""
    dist = dist or f"dsv3-{name}"
    module = dist.replace("-", "_")
    (root / f"{module}.py").write_text(source)
    info = root / f"{module}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:backend\n")
    return root
