"""The page of a plot: one SVG that needs nothing else, light or dark as its viewer is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dsv3.drawing.axes import escaped

# What is drawn, by the name of its colour; marks of data have two.
LIGHT = {"bg": "#ffffff", "text": "#1c2128", "soft": "#57606a", "grid": "#e1e6eb", "first": "#0b5cad", "second": "#b45309"}
DARK = {"bg": "#0f1216", "text": "#e4e8ec", "soft": "#9aa5b1", "grid": "#2a3139", "first": "#79b8ff", "second": "#e0a458"}
_PAINT = ".bg{fill:bg} .title,.head,.strong{fill:text} .soft{fill:soft} .grid{stroke:grid}"
# Fonts that are there already: a viewer would have to fetch others.
_BASE = """
svg { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
.title { font-size: 16px; font-weight: 600 }
.head { font-weight: 600 }
.grid { fill: none }
"""


def _painted(rules: str, colours: Mapping[str, str]) -> str:
    """Rules with the names of colours written out, because many viewers of SVG know no variables."""
    for name, colour in colours.items():
        rules = rules.replace(f":{name}}}", f":{colour}}}").replace(f":{name};", f":{colour};")
    return rules


def stylesheet(shapes: str, paint: str) -> str:
    """The text of <style>: `shapes` are rules without colours, `paint` rules such as ".roof{stroke:text}" that name them."""
    both = f"{_PAINT} {paint}"
    return f"{_BASE}{shapes}{_painted(both, LIGHT)}\n@media (prefers-color-scheme: dark) {{{_painted(both, DARK)}}}\n"


def light_only(drawn: str) -> str:
    """The page without its dark half, for formats that have one background."""
    return drawn.partition("@media")[0] + "</style>" + drawn.partition("</style>")[2]


def page(width: float, height: float, label: str, style: str, parts: Iterable[str]) -> str:
    """The whole file. label: what a screen reader says."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" role="img" aria-label="{escaped(label)}"><style>{style}</style>'
        f'<rect class="bg" width="{width:.0f}" height="{height:.0f}" rx="10"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )
