"""A trace as one HTML page: heat maps and curves drawn as SVG, nothing loaded from anywhere."""

from __future__ import annotations

from html import escape

from gnomon.edit.trace import Trace

CELL_WIDTH, CELL_HEIGHT, LEFT, TOP = 16, 18, 150, 34
TITLES = {
    "state": "One layer's state restored",
    "mlp": "MLP restored in a window of layers",
    "attention": "Attention restored in a window of layers",
}
COLOURS = {"subject": "#c0392b", "before": "#7f8c8d", "after": "#2471a3"}


def page(found: Trace) -> str:
    """The whole page."""
    maps = "".join(_heat_map(found, kind) for kind in found.effects)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{escape(found.prompt)}: traced</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}}
svg{{display:block;max-width:100%}}text{{font:11px monospace}}h2{{margin-bottom:.2rem}}</style>
<h1>{escape(found.prompt)} <b>{escape(found.answer)}</b></h1>
<p>Probability of the answer: {found.clean:.3f}; with noise on the subject: {found.corrupted:.3f}.
A dark cell is a place whose clean state brings the answer back (window: {found.window} layers).</p>
{maps}
<h2>Attention knocked out</h2>
<p>Probability of the answer when the last position cannot attend to the subject, to what stands before it or to what
stands after it, in a window of layers around each one.</p>
{_curves(found)}
</html>
"""


def _heat_map(found: Trace, kind: str) -> str:
    effects = found.effects[kind]
    low, high = found.corrupted, max(found.clean, found.corrupted + 1e-6)
    cells = []
    for layer, row in enumerate(effects):
        for token, value in enumerate(row):
            shade = min(max((value - low) / (high - low), 0.0), 1.0)
            x, y = LEFT + layer * CELL_WIDTH, TOP + token * CELL_HEIGHT
            cells.append(
                f'<rect x="{x}" y="{y}" width="{CELL_WIDTH}" height="{CELL_HEIGHT}" fill="#1b4f72" '
                f'fill-opacity="{shade:.3f}"><title>layer {layer}: {value:.3f}</title></rect>'
            )
    labels = "".join(
        f'<text x="{LEFT - 6}" y="{TOP + t * CELL_HEIGHT + 13}" text-anchor="end"'
        f"{' font-weight=bold' if t in found.subject else ''}>{escape(piece)}{'*' if t in found.subject else ''}</text>"
        for t, piece in enumerate(found.tokens)
    )
    height = TOP + len(found.tokens) * CELL_HEIGHT + 6
    return f"<h2>{TITLES[kind]}</h2>{_canvas(len(effects), height)}{labels}{''.join(cells)}</svg>"


def _curves(found: Trace) -> str:
    layers = len(next(iter(found.knockout.values()), []))
    top = max([found.clean, *(value for row in found.knockout.values() for value in row)], default=1.0) or 1.0
    lines = []
    for i, (name, row) in enumerate(found.knockout.items()):
        points = " ".join(
            f"{LEFT + (n + 0.5) * CELL_WIDTH:.1f},{TOP + 120 * (1 - value / top):.1f}" for n, value in enumerate(row)
        )
        colour = COLOURS[name]
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{TOP + 16 + i * 16}" text-anchor="end" fill="{colour}">{name}</text>')
    level = TOP + 120 * (1 - found.clean / top)
    width = LEFT + layers * CELL_WIDTH
    lines.append(
        f'<line x1="{LEFT}" x2="{width}" y1="{level:.1f}" y2="{level:.1f}" stroke="#999" stroke-dasharray="4"/>'
    )
    return f"{_canvas(layers, TOP + 130)}{''.join(lines)}</svg>"


def _canvas(layers: int, height: int) -> str:
    """An SVG begun, with the layers' numbers."""
    numbers = "".join(
        f'<text x="{LEFT + (n + 0.5) * CELL_WIDTH:.1f}" y="{TOP - 8}" text-anchor="middle">{n}</text>'
        for n in range(0, layers, 2)
    )
    width = LEFT + layers * CELL_WIDTH + 8
    return f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}">{numbers}'
