"""The order of a call's candidates by measured cost, and what that says about why one is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dsv3.dispatch.configs import text_of
from dsv3.dispatch.site import Example
from dsv3.dispatch.tuning.tuned import fastest, representative

if TYPE_CHECKING:
    from dsv3.dispatch.select import Candidate, Catalogue


def by_cost(
    catalogue: Catalogue, found: Sequence[Candidate], calls: Sequence[Example], bucket: tuple[int, int]
) -> list[Candidate]:
    """The candidates, each with its best measured configuration and cost, and the reason against one that was found wrong.
    Cheapest first (see `fastest`) if every eligible one that is not wrong was measured for these calls, else in the order they
    come in."""
    tuned = catalogue.tuned
    assert tuned is not None
    at = representative(bucket)
    known: list[Candidate] = []
    for candidate in found:
        if candidate.reasons:
            known.append(candidate)
            continue
        cost = None
        if at is not None:
            others = [c for c in catalogue.configs(candidate.kernel) if c != candidate.config]
            cost = tuned.cost(calls, at, candidate.name, [candidate.config, *others])
        config = candidate.config if cost is None else cost.config
        wrong = "" if cost is not None else tuned.wrong(calls, at, candidate.name, config)
        known.append(replace(candidate, config=config, cost=cost, wrong=wrong))
    able = [c for c in known if not c.reasons and not c.wrong]
    if not able or any(c.cost is None for c in able):
        return known
    first = able.pop(fastest([_us(c) for c in able]))
    ranked = [replace(c, ranked=True) for c in (first, *sorted(able, key=_us))]
    return [*ranked, *(c for c in known if c.reasons or c.wrong)]


def _us(candidate: Candidate) -> float:
    assert candidate.cost is not None
    return candidate.cost.us


def why_taken(taken: Candidate, others: Sequence[Candidate]) -> str:
    """ "measured: 12.3 us, next best 15.0 us (tuned 2026-01-02 at 64 tokens)"; "best eligible kernel" where nothing was."""
    config = f"; config {text_of(taken.config)}" if taken.config else ""
    if taken.cost is None:
        return f"best eligible kernel{config}"
    known = [c.cost.us for c in others if c.cost is not None and not c.reasons and c.kernel is not taken.kernel]
    best = f", next best {min(known):.1f} us" if known else ""
    missing = [c.kernel.name for c in others if c.cost is None and not c.reasons and not c.wrong]
    order = "" if taken.ranked else f"; order by priority, not measured: {', '.join(missing)}"
    when = f"tuned {taken.cost.day} at {taken.cost.tokens} tokens"
    return f"measured: {taken.cost.us:.1f} us{best} ({when}){order}{config}"


def why_not(candidate: Candidate, taken: Candidate) -> str:
    """The reason against an eligible candidate that comes after the one taken."""
    if candidate.ranked and taken.ranked and candidate.cost and taken.cost:
        return f"{taken.name} comes first (measured {taken.cost.us:.1f} us, this {candidate.cost.us:.1f} us)"
    return f"{taken.name} comes first (priority, needs, name)"
