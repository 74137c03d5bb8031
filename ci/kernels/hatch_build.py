"""Part of building a wheel, also of `pip install -e .`: kernels of the CPU backend are compiled, see backends/dsv3_cpu/ship.py.

DSV3_BUILD_KERNELS=none leaves them to the first start; =all compiles for all processors of this machine's architecture, for
wheels that others install; otherwise for processors like this one. What fails is said (`pip install -v`) and leaves a wheel
without them, whose first start takes longer.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_LIMIT = 900  # seconds


class Kernels(BuildHookInterface[Any]):
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        asked = os.environ.get("DSV3_BUILD_KERNELS", "host")
        if asked not in ("none", "host", "all"):
            raise ValueError(f"DSV3_BUILD_KERNELS is {asked!r}: use none, host or all")
        if asked == "none":
            return
        build_data["artifacts"].append("/backends/dsv3_cpu/_objects/**/*.o")
        folders = [str(Path(self.root) / folder) for folder in ("backends", "core")]
        # Not by PYTHONPATH, which is pip's here.
        code = "import sys; sys.path[:0] = sys.argv.pop(1), sys.argv.pop(1); from dsv3_cpu import ship; ship.main()"
        command = [sys.executable, "-c", code, *folders, *(["--all"] if asked == "all" else [])]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_LIMIT)
            said = done.stdout.strip() if done.returncode == 0 else done.stderr.strip()[-2000:]
        except (OSError, subprocess.TimeoutExpired) as error:
            said = str(error)
        self.app.display_info(f"kernels of the CPU backend: {said}")
