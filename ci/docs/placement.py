"""Draw the picture of the README: the placement of the demo checkpoint on the example NumPy backend.

pip install ./plugins/dsv3-numpy && python ci/docs/placement.py ci/docs/placement.svg
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

import dsv3
from dsv3.dispatch.bind import Decision

_COLOURS = {"native": "#3fb950", "composite": "#79c0ff", "reference": "#d29922", "torch": "#8b949e"}
# Without rich's own fonts, which a viewer would have to fetch.
_SVG = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: {char_height}px;
line-height: {line_height}px; }}
{styles}
</style>
<defs>{lines}</defs>
<rect fill="#0d1117" x="1" y="1" width="{width}" height="{height}" rx="8"/>
<g transform="translate({terminal_x}, {terminal_y}) translate(0, -28)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g></g></svg>
"""


def _kind(d: Decision) -> str:
    if d.kernel is None:
        return "composite"
    return "reference" if d.fallback else "torch" if d.kernel.source.name == "reference" else "native"


def main(target: Path) -> None:
    placement = dsv3.load("demo", backend="numpy", dtype="float32", quant="none", device="meta").placement()
    table = Table(box=None, header_style="bold white", pad_edge=False)
    for column in ("operator", "kernel", "sites", "why"):
        table.add_column(column, no_wrap=True)
    for op in placement.operators():
        rows: dict[tuple[str, str, str], int] = {}
        for _, _, d in placement.decisions(op):
            name = d.kernel.name if d.kernel else ", ".join(d.parts)
            rows[_kind(d), name, d.why] = rows.get((_kind(d), name, d.why), 0) + 1
        for (kind, name, why), sites in rows.items():
            colour = _COLOURS[kind]
            table.add_row(Text(op, style="#e6edf3"), Text(name, style=colour), Text(str(sites)), Text(why, style="#8b949e"))
    console = Console(record=True, width=128, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text(placement.summary + "\n", style="bold #e6edf3"))
    console.print(table)
    svg = console.export_svg(title="", code_format=_SVG, unique_id="dsv3")
    target.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
