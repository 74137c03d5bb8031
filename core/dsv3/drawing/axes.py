"""Numbers to places on an axis, and the SVG elements that all panels of a plot are made of."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """A linear axis: values low..high at pixels start..end."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The pixel of a value; one off the axis lies at its end."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.0
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` + 1 round values that span low..high: multiples of 1, 2 or 5 times a power of ten."""
    span = high - low if high > low else max(abs(high), 1.0)
    rough = span / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, max(last, first + 1) + 1)]


def tick_text(value: float) -> str:
    """A tick without the noise of its arithmetic."""
    return f"{round(value, 10):g}"


def power_text(power: int) -> str:
    """10 to a power."""
    return "10" + str(power).translate(_SUPERSCRIPT)


def escaped(content: str) -> str:
    """Text as XML has it. What XML cannot hold, and a file's name can, is replaced."""
    return html.escape("".join(c if c.isprintable() else "\ufffd" for c in content))


def text(x: float, y: float, content: str, style: str = "soft", anchor: str = "start") -> str:
    """A text element; style is a class of the plot's style sheet."""
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escaped(content)}</text>'


def bar(x: float, y: float, width: float, height: float, style: str, title: str) -> str:
    """A rectangle that says on hovering what it stands for."""
    return (
        f'<rect class="{style}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}" rx="1.5">'
        f"<title>{escaped(title)}</title></rect>"
    )


def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    """A straight line."""
    return f'<path class="{style}" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>'


def curve(points: list[tuple[float, float]], style: str) -> str:
    """Points joined by lines."""
    return f'<path class="{style}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in points)}"/>'


def short(words: str, most: int) -> str:
    """Text of at most so many characters, with an ellipsis for what is left out of its middle."""
    if len(words) <= most:
        return words
    head = (most - 1) // 2
    return f"{words[:head]}…{words[len(words) - (most - 1 - head) :]}"
