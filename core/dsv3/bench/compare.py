"""Two runs of the same benchmark: new over old, and the same with each run's own ceiling divided out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.bench.results import KIND, SCHEMA, Result
from dsv3.errors import UsageError

# What must be the same for a ratio to mean anything. Backends, formats and threads may differ: that is what one compares.
SAME = ("batch", "context", "tokens")
_NOISE = 0.03  # a change below this is not called one


@dataclass(frozen=True)
class Ratio:
    """One figure of both. normalised: the ratio over that of the two runs' ceilings; None for a figure that moves with none."""

    name: str
    old: float
    new: float
    ratio: float
    normalised: float | None
    better: str

    @property
    def verdict(self) -> str:
        """In words, from the ratio that the machine's own change is taken off."""
        found = self.ratio if self.normalised is None else self.normalised
        if not self.better or abs(found - 1) < _NOISE:
            return "" if not self.better else "same"
        return "better" if (found > 1) == (self.better == "more") else "worse"


def read(path: Path) -> dict[str, Any]:
    """The JSON of an earlier run; UsageError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"--compare {str(path)!r}: {error}; name a file that dsv3 bench --json wrote") from error
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise UsageError(f"--compare {str(path)!r} is no result of dsv3 bench; name a file that --json wrote")
    if found.get("schema") != SCHEMA:
        version = found.get("schema")
        raise UsageError(f"--compare {str(path)!r} has schema {version!r}, this dsv3 reads {SCHEMA}; measure the old one anew")
    return found


def check_same(old: Mapping[str, Any], what: str, numbers: Mapping[str, Any]) -> None:
    """UsageError where the old run measured something else, or with another batch, context or number of tokens."""
    if old.get("what") != what:
        raise UsageError(f"--compare: the old run measured {old.get('what')!r}, this one measures {what!r}")
    before = old.get("subject", {})
    for name in SAME:
        if name in numbers and before.get(name) != numbers[name]:
            raise UsageError(
                f"--compare: {name} {before.get(name)} in the old run, {numbers[name]} in this one; measure the same"
            )


def compare(old: Mapping[str, Any], new: Result) -> list[Ratio]:
    """Every figure that both have. UsageError where the two did not measure the same."""
    this = new.to_json()
    before, now = old.get("subject", {}), this["subject"]
    check_same(old, this["what"], {name: now[name] for name in SAME})
    if before.get("shape") != now["shape"]:
        models = f"{before.get('model')} in the old run, {now['model']} in this one"
        raise UsageError(f"--compare: {models} are models of different sizes; measure the same")
    known = {f["name"]: f for f in old.get("figures", [])}
    ceilings = [run["ceilings"]["best"] for run in (old, this)]
    rows = []
    for figure in this["figures"]:
        earlier = known.get(figure["name"])
        if earlier is not None and earlier["value"] and figure["unit"] == earlier["unit"]:
            rows.append(_ratio(earlier, figure, ceilings))
    return rows + list(_calls(old.get("rows", []), this["rows"], ceilings))


def _calls(old: list[Any], new: list[Any], ceilings: list[Mapping[str, Any]]) -> Iterator[Ratio]:
    """The time of a call of every operator and shape that both have, whatever kernel runs it."""
    if not all("us a call" in row for row in (*old, *new)):
        return
    known = {(row["operator"], row["shape"]): row for row in old}
    for row in new:
        earlier = known.get((row["operator"], row["shape"]))
        if earlier is not None and earlier["us a call"]:
            read = row["MB"] / _ceiling(ceilings[1], "read") >= row["MFLOP"] / _ceiling(ceilings[1], "matmul")
            facts = {"name": f"{row['operator']} {row['shape']}", "bound": "read" if read else "matmul", "better": "less"}
            yield _ratio({**facts, "value": earlier["us a call"]}, {**facts, "value": row["us a call"]}, ceilings)


def _ratio(old: Mapping[str, Any], new: Mapping[str, Any], ceilings: list[Mapping[str, Any]]) -> Ratio:
    ratio, bound = new["value"] / old["value"], new["bound"]
    normalised = None
    if bound and bound == old.get("bound"):
        machine = _ceiling(ceilings[1], bound) / _ceiling(ceilings[0], bound)
        normalised = ratio / machine if new["better"] == "more" else ratio * machine
    return Ratio(new["name"], old["value"], new["value"], ratio, normalised, new["better"])


def _ceiling(ceilings: Mapping[str, Any], bound: str) -> float:
    if bound == "read":
        return float(ceilings["read_gb_s"])
    return float(max(ceilings["bf16_gflop_s"], ceilings["f32_gflop_s"]))
