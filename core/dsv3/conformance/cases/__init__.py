"""All cases of level 1. What they are made of never changes under an id; new cases get new ids."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from dsv3.conformance import relations
from dsv3.conformance.case import Case
from dsv3.conformance.cases import attention, cache, experts, pointwise, products, quantise, routing
from dsv3.conformance.result import Size

_FAMILIES = (pointwise, quantise, products, routing, experts, cache, attention)


@functools.cache
def all_cases() -> Mapping[str, Case]:
    """Every case by id."""
    found: dict[str, Case] = {}
    for family in _FAMILIES:
        for case in family.cases():
            assert case.id not in found, case.id
            found[case.id] = case
    for case in relations.cases(dict(found)):
        found[case.id] = case
    return found


def cases_of(size: Size, ops: Sequence[str] | None = None) -> list[Case]:
    """The cases of a size, for some operators or all."""
    return [c for c in all_cases().values() if c.in_size(size) and (ops is None or c.op in ops)]
