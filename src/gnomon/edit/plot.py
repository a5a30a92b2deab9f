"""A comparison of methods as one SVG picture: a group of bars per method, with 95 % intervals.

Drawn by hand: no plotting library, the same bytes everywhere.
"""

from __future__ import annotations

from html import escape
from typing import Any

from gnomon.edit.table import Table

METRICS = ("reliability", "generalization", "locality", "portability", "chat")
COLOURS = ("#1b4f72", "#2e86c1", "#239b56", "#b9770e", "#7d3c98")
BAR, GAP, LEFT, TOP, HEIGHT = 14, 26, 48, 48, 200


def draw(found: Table) -> str:
    """Rows of compare_methods (method, protocol, shares and their intervals) -> SVG text."""
    shown = [name for name in METRICS if any(row.get(name) is not None for row in found)]
    group = BAR * len(shown) + GAP
    width = max(LEFT + group * len(found) + 10, LEFT + 110 * len(shown))
    parts = [_axis(share, width) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    for n, name in enumerate(shown):
        x = LEFT + n * 110
        parts.append(f'<rect x="{x}" y="10" width="10" height="10" fill="{COLOURS[METRICS.index(name)]}"/>')
        parts.append(f'<text x="{x + 14}" y="19">{name}</text>')
    for n, row in enumerate(found):
        at = LEFT + n * group + GAP / 2
        for i, name in enumerate(shown):
            if row.get(name) is not None:
                parts.append(_bar(at + i * BAR, float(row[name]), row.get(f"{name}_ci"), COLOURS[METRICS.index(name)]))
        middle = at + BAR * len(shown) / 2
        for line, text in enumerate((row.get("method", ""), row.get("protocol", ""))):
            y = TOP + HEIGHT + 16 + 14 * line
            parts.append(f'<text x="{middle:.1f}" y="{y}" text-anchor="middle">{escape(str(text))}</text>')
    height = TOP + HEIGHT + 40
    style = "<style>text{font:11px sans-serif}</style>"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        f'{style}<rect width="{width}" height="{height}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _axis(share: float, width: int) -> str:
    y = TOP + HEIGHT * (1 - share)
    line = f'<line x1="{LEFT}" x2="{width}" y1="{y}" y2="{y}" stroke="#ddd"/>'
    return f'{line}<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{share:.0%}</text>'


def _bar(x: float, share: float, interval: Any, colour: str) -> str:
    y = TOP + HEIGHT * (1 - share)
    drawn = f'<rect x="{x:.1f}" y="{y:.1f}" width="{BAR - 2}" height="{HEIGHT * share:.1f}" fill="{colour}"/>'
    if interval is None or interval != interval:
        return drawn
    low, high = max(share - interval, 0.0), min(share + interval, 1.0)
    middle = x + (BAR - 2) / 2
    top, bottom = TOP + HEIGHT * (1 - high), TOP + HEIGHT * (1 - low)
    return drawn + f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="{top:.1f}" y2="{bottom:.1f}" stroke="#111"/>'
