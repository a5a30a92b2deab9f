"""A merge report as one HTML page: two curves and two tables, without scripts, links or anything fetched."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path

from gnomon.merge.report import RESULT, Group, MergeReport
from gnomon.models.cache import atomic_write

COLOURS = ("#1668a8", "#c2571a", "#2f7d32", "#7b3fa0", "#8a6d00", "#b0306a", "#007a7a", "#666")
WIDTH, HEIGHT, LEFT = 480, 190, 52
STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:68rem;padding:0 1rem}
h1{margin-bottom:.2rem}h2{font-size:1.05rem;margin:1.8rem 0 .4rem}p{margin:.2rem 0;opacity:.8}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}.wide{overflow-x:auto}
td,th{padding:.2rem .8rem .2rem 0;text-align:right;border-bottom:1px solid #8884;white-space:nowrap}
td:first-child,th:first-child{text-align:left}tr.all td{font-weight:600}
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(20rem,1fr));gap:1.5rem}svg{width:100%;height:auto}
.legend span{margin-right:1.2rem;white-space:nowrap}.legend i{display:inline-block;width:1.1rem;height:.2rem;
margin-right:.4rem;vertical-align:middle}.warnings{border-left:3px solid #c2571a;padding-left:1.5rem}
"""


def write_html(found: MergeReport, path: Path) -> None:
    """One self-contained page."""
    names = list(found.whole.relative)
    unit = "norm over the base's" if found.has_base else "norm"
    whose = "of each change" if found.has_base else "of each model"
    warnings = "".join(f"<li>{html.escape(warning)}</li>" for warning in found.warnings)
    parts = [
        "<h1>Merge report</h1>",
        f"<p>{html.escape(found.method)}, {len(found.inputs)} models, {found.whole.tensors} tensors</p>",
        f'<ul class="warnings">{warnings}</ul>' if warnings else "",
        "<h2>Models</h2>" + _models(found),
        _curves(found, names, f"Size {whose}, {unit}"),
        f"<h2>Layer by layer</h2><p>Size {whose} ({unit}), its cosine with the result, the share of parameters that "
        "the models change in opposite directions, and numbers that are NaN or infinite.</p>",
        _layers(found, names),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Merge report</title>'
    page = f'<!doctype html><html lang="en">{head}<style>{STYLE}</style>{"".join(parts)}</html>\n'
    with atomic_write(path) as out:
        out.write(page.encode())


def _models(found: MergeReport) -> str:
    measured = bool(found.perplexity)
    head = "<th>model</th><th>identity</th>" + (
        f"<th>perplexity on {found.text_tokens} tokens</th>" if measured else ""
    )
    rows = ""
    for name, identity in {**found.inputs, RESULT: found.identity}.items():
        cells = f"<td>{html.escape(name)}</td><td><code>{identity[:16]}</code></td>"
        cells += f"<td>{found.perplexity[name]:.2f}</td>" if measured else ""
        rows += f"<tr{_marked(name == RESULT)}>{cells}</tr>"
    return f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'


def _layers(found: MergeReport, names: Sequence[str]) -> str:
    head = "".join(f"<th>{html.escape(_short(n))}</th>" for n in names)
    head += "".join(f"<th>cos {html.escape(_short(n))}</th>" for n in names[:-1])
    rows = ""
    for group in [*found.groups, found.whole]:
        cells = [f"{group.relative[n]:.4f}" for n in names] + [f"{group.cosine[n]:.3f}" for n in names[:-1]]
        cells += [f"{group.sign_conflicts:.1%}", str(group.nonfinite)]
        listed = "".join(f"<td>{cell}</td>" for cell in cells)
        rows += f"<tr{_marked(group is found.whole)}><td>{html.escape(group.name)}</td>{listed}</tr>"
    table = f"<table><tr><th></th>{head}<th>sign conflicts</th><th>not finite</th></tr>{rows}</table>"
    return f'<div class="wide">{table}</div>'


def _marked(last: bool) -> str:
    return ' class="all"' if last else ""


def _curves(found: MergeReport, names: Sequence[str], title: str) -> str:
    """Sizes and cosines over the layers, one line per model; nothing for fewer than two layers."""
    layers = [group for group in found.groups if group.name.startswith("layer ")]
    if len(layers) < 2:
        return ""
    legend = "".join(
        f'<span><i style="background:{_colour(i)}"></i>{html.escape(_short(n))}</span>' for i, n in enumerate(names)
    )
    highest = max(max(group.relative.values()) for group in layers) or 1.0
    sizes = _curve(layers, names, lambda group, name: group.relative[name], (0.0, highest), title)
    lowest = min(0.0, *(min(group.cosine.values(), default=0.0) for group in layers))
    angles = _curve(layers, names[:-1], lambda group, name: group.cosine[name], (lowest, 1.0), "Cosine with the result")
    return f'<div class="curves">{sizes}{angles}</div><p class="legend">{legend}</p>'


def _curve(
    layers: Sequence[Group],
    names: Sequence[str],
    value: Callable[[Group, str], float],
    span: tuple[float, float],
    title: str,
) -> str:
    low, high = span
    right, bottom = WIDTH - 8, HEIGHT - 24

    def x(layer: int) -> float:
        return LEFT + (right - LEFT) * layer / (len(layers) - 1)

    def y(number: float) -> float:
        return bottom - (bottom - 10) * (number - low) / (high - low)

    drawn = ""
    for tick in (low, (low + high) / 2, high):
        drawn += f'<path d="M{LEFT} {y(tick):.1f}H{right}" stroke="#8884"/>'
        drawn += f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.3g}</text>'
    for place in sorted({0, (len(layers) - 1) // 2, len(layers) - 1}):
        anchor = "end" if place == len(layers) - 1 else "middle"
        drawn += f'<text x="{x(place):.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{layers[place].name}</text>'
    for i, name in enumerate(names):
        points = " ".join(f"{x(j):.1f},{y(value(group, name)):.1f}" for j, group in enumerate(layers))
        drawn += f'<polyline points="{points}" fill="none" stroke="{_colour(i)}" stroke-width="2"/>'
    label = html.escape(title)
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" font-size="11" fill="currentColor" role="img" aria-label="{label}">'
    return f'<figure style="margin:0"><h2>{label}</h2>{picture}{drawn}</svg></figure>'


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _short(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1]
