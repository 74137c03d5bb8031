"""Numbers and foreign text as every report shows them."""

from __future__ import annotations

import math
import re

# Control characters (a terminal obeys them, XML forbids them), lone surrogates and non-characters (XML forbids them), and
# the marks that reverse the direction of text, which make a line read as what it is not.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]"
)


def printable(text: str) -> str:
    """Text with what is not printable as escapes (`\\x1b`); line ends and tabs stay. Valid in XML 1.0 once escaped."""
    return _UNPRINTABLE.sub(lambda m: f"\\x{ord(m[0]):02x}" if ord(m[0]) < 256 else f"\\u{ord(m[0]):04x}", text)


def one_line(text: str, limit: int = 0) -> str:
    """Printable text on one line; cut at `limit` characters, if given, with a word about how many are left out."""
    folded = " ".join(printable(text).split())
    return cut(folded, limit) if limit else folded


def cut(text: str, limit: int) -> str:
    """Text of at most about `limit` characters; of a long text, what is left out is counted: results.jsonl keeps it."""
    if len(text) <= limit:
        return text
    if limit < 100:
        return text[: limit - 3] + "..."
    return f"{text[:limit]}... ({len(text) - limit} more characters in results.jsonl)"


def number(value: float) -> str:
    """Two significant digits: "0", "0.31", "2.1e-13", "inf", "nan"; four near 1, where a margin passes or fails."""
    if value == 0:
        return "0"
    if 0.95 < value < 1.05:
        return f"{value:.4g}"
    if math.isfinite(value) and 1e-3 <= abs(value) < 1e4:
        return f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"
    return f"{value:.1e}" if math.isfinite(value) else str(value)


def seconds(value: float) -> str:
    """A duration: "0.04 s", "12 s", "3 min 20 s"."""
    if not math.isfinite(value):
        return str(value)
    if value < 60:
        return f"{value:.2g} s" if value < 9.5 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def plural(count: int, word: str) -> str:
    """`1 case`, `2 cases`."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
