"""Starting and watching the process that a plugin is tried in: it may hang, crash or end itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3.settings import environment
from dsv3.trial.findings import Finding, absent
from dsv3.trial.subject import quoted

# What makes accelerators invisible to their runtimes.
HIDING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")
_START_LIMIT_S = 60.0
_GRACE_S = 10.0
_POLL_S = 0.02


class Trial:
    """One process; `findings()` waits for it. A context manager: leaving it ends the process and removes its files."""

    def __init__(self, plugin: tuple[str, str, str], emulate: str | None, cases: Sequence[str], hidden: bool) -> None:
        self._cases = cases
        self._folder = tempfile.TemporaryDirectory(prefix="dsv3-l0-", ignore_cleanup_errors=True)
        root = Path(self._folder.name)
        self._results, self._stderr = root / "results", root / "stderr"
        request: dict[str, Any] = {"plugin": plugin, "emulate": emulate, "hidden": hidden}
        request |= {"results": str(self._results), "stdout": str(root / "stdout"), "stderr": str(self._stderr)}
        (root / "request.json").write_text(json.dumps(request), encoding="utf-8")
        (root / "cwd").mkdir()
        path = os.pathsep.join(os.path.abspath(p) for p in sys.path)
        changed = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        changed |= dict.fromkeys(HIDING, "") if hidden else {}
        with open(root / "stdout", "w") as out, open(self._stderr, "w") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "dsv3.trial.child", str(root / "request.json")],
                stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=root / "cwd", env={**environment(), **changed},
            )  # fmt: skip

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()

    def findings(self) -> list[Finding]:
        """One per case, in whatever way the process ended."""
        found: dict[str, Finding] = {}
        begun, deadline, read = "", time.monotonic() + _START_LIMIT_S, 0
        while True:
            over = self._process.poll() is not None
            lines = self._lines()
            for line in lines[read:]:
                if "begin" in line:
                    begun, deadline = line["begin"], time.monotonic() + line["limit_s"] + _GRACE_S
                else:
                    found[line["id"]] = Finding(**line)
                    deadline = time.monotonic() + _START_LIMIT_S
            read = len(lines)
            if over:
                break
            if time.monotonic() > deadline:
                return self._completed(found, begun, "it hangs without letting go of the interpreter; its process was ended")
            time.sleep(_POLL_S)
        code = self._process.returncode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        errors = self._stderr.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
        last = f"; its last words: {quoted(errors, 200)}" if errors else ""
        return self._completed(found, begun, f"its process ended with {how} during this check{last}")

    def _lines(self) -> list[dict[str, Any]]:
        if not self._results.exists():
            return []
        text = self._results.read_text(encoding="utf-8")
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def _completed(self, found: dict[str, Finding], begun: str, what: str) -> list[Finding]:
        missing = [case for case in self._cases if case not in found]
        if missing:
            at = begun if begun in missing else missing[0]
            found[at] = Finding(at, "failed", what)
            found |= {f.id: f for f in absent((c for c in missing if c != at), f"not tried: {at} ended the process")}
        return [found[case] for case in self._cases]
