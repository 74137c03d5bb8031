"""Events of a splitter, as they read."""

from __future__ import annotations

from dsv3.engine.split import Event


def joined(events: list[Event]) -> list[tuple[str, int | None, str]]:
    """Neighbours of a kind as one."""
    found: list[tuple[str, int | None, str]] = []
    for event in events:
        if found and event.kind != "call" and found[-1][:2] == (event.kind, event.index):
            found[-1] = (event.kind, event.index, found[-1][2] + event.text)
        else:
            found.append((event.kind, event.index, event.text))
    return found
