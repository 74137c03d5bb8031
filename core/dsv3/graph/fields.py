"""Reading fields of a configuration file with errors that name the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from dsv3.errors import CheckpointError

T = TypeVar("T")
_MISSING: Any = object()
LARGEST = 1 << 24  # of any size: beyond it lie damaged files, not models


class Fields:
    """A JSON object with typed access; every complaint names the file and the field."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def integer(self, name: str, default: Any = _MISSING, minimum: int = 1, maximum: int = LARGEST) -> int:
        value = self._get(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self.wrong(name, value, f"an integer of at least {minimum} and at most {maximum}")
        return value

    def optional_integer(self, name: str, default: Any = None, minimum: int = 1) -> int | None:
        return None if self.values.get(name, default) is None else self.integer(name, default, minimum)

    def number(self, name: str, default: Any = _MISSING, minimum: float = 0.0, maximum: float = 1e9) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not minimum <= value <= maximum:
            raise self.wrong(name, value, f"a number of at least {minimum:g} and at most {maximum:g}")
        return float(value)

    def flag(self, name: str, default: Any = _MISSING) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def text(self, name: str, default: Any = _MISSING) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.wrong(name, value, "a string")
        return value

    def table(self, name: str) -> Fields | None:
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, value, "an object")
        return Fields(value, f"{self.source}: {name}")

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            if default is _MISSING or default is None:
                raise CheckpointError(f"{self.source}: field {name!r} is missing; expected it in a DeepSeek-V3 family model")
            return default
        return value

    def wrong(self, name: str, found: Any, expected: str) -> CheckpointError:
        shown = repr(found) if not isinstance(found, int) or abs(found) < 1 << 64 else "a huge integer"
        return CheckpointError(f"{self.source}: field {name!r} is {shown[:80]}; expected {expected}")
