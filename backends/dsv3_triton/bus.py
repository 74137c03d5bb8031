"""What is plugged in, whatever the driver says."""

from __future__ import annotations

from pathlib import Path


def on_bus(bus: Path, vendor: str) -> bool:
    """Whether a display or 3D controller of the vendor is on the PCI bus."""
    for device in bus.glob("*"):
        try:
            kind, maker = (device / "class").read_text(), (device / "vendor").read_text()
        except OSError:
            continue
        if maker.strip() == vendor and kind.startswith(("0x03", "0x12")):
            return True
    return False
