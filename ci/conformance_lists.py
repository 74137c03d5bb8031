"""Writes the frozen lists configs/conformance/v1/*.txt from the code. Ids may be added; one that was released never goes."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from dsv3.conformance.cases import cases_of
from dsv3.conformance.model import model_ids
from dsv3.conformance.result import Size
from dsv3.conformance.roundtrip import round_trips
from dsv3.conformance.serving import serving_ids
from dsv3.trial.findings import ALL_IDS

ROOT = Path(__file__).parents[1]


def ids(size: Size) -> list[str]:
    """All case ids of a size, sorted."""
    found = [c.id for c in cases_of(size)] + [t.id for t in round_trips(size, None)]
    found += [*ALL_IDS, *model_ids(size), *serving_ids(size)]
    return sorted(found)


def main() -> None:
    folder = ROOT / "configs" / "conformance" / "v1"
    for size in get_args(Size):
        text = f"# Conformance suite v1, size {size}: one case id per line. Made by ci/conformance_lists.py.\n"
        (folder / f"{size}.txt").write_text(text + "\n".join(ids(size)) + "\n", encoding="utf-8")
        print(size, len(ids(size)))


if __name__ == "__main__":
    main()
