"""After a merge: what came of it, layer by layer, as JSON and as one HTML page without scripts or links.

Norms of task vectors and of the result, cosines, sign conflicts, NaN; perplexities on a text where one is given.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gnomon.loading import load
from gnomon.merge.geometry import TensorGeometry, cosines, geometry, summed
from gnomon.merge.merged import MergedCheckpoint
from gnomon.merge.perplexity import Text, text_loss
from gnomon.models.cache import atomic_write
from gnomon.models.checkpoint import Checkpoint

RESULT = "merge"


@dataclass(frozen=True)
class Group:
    """A layer, or what stands outside of all. relative: each vector's norm over the base's. cosine: with the result."""

    name: str
    tensors: int
    relative: Mapping[str, float]
    cosine: Mapping[str, float]
    sign_conflicts: float
    nonfinite: int


@dataclass
class MergeReport:
    """Everything in plain values."""

    identity: str
    method: str
    inputs: dict[str, str]
    warnings: list[str]
    groups: list[Group]
    whole: Group
    perplexity: dict[str, float] = field(default_factory=dict)
    text_tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def report(
    merged: MergedCheckpoint,
    *,
    result: Checkpoint | None = None,
    text: Text | None = None,
    most_tokens: int | None = None,
    blocks: int | None = 8,
) -> MergeReport:
    """result: the written model where there is one (else tensors are computed again). text: measured on all models."""
    result = result or merged
    base = _base(merged)
    models = {reference: model for reference, model in merged.models.items() if model is not base}
    parts = geometry({**models, RESULT: result}, base, threads=merged.threads, blocks=blocks)
    by_layer: dict[str, list[TensorGeometry]] = {}
    for part in parts:
        by_layer.setdefault("outside of the layers" if part.layer is None else f"layer {part.layer}", []).append(part)
    names = [*models, RESULT]
    groups = [_group(name, members, names) for name, members in sorted(by_layer.items(), key=_order)]
    methods = sorted({tensor.method for tensor in merged.plan.tensors if tensor.method})
    inputs = {reference: model.identity for reference, model in merged.models.items()}
    whole = _group("all", parts, names)
    found = MergeReport(merged.identity, ", ".join(methods), inputs, list(merged.plan.warnings), groups, whole)
    if text is not None:
        for name, checkpoint in {**merged.models, RESULT: result}.items():
            with load(checkpoint, max_sequences=1, ledger=False) as model:
                loss = text_loss(model, text, most_tokens=most_tokens)
            found.perplexity[name], found.text_tokens = loss.perplexity, loss.tokens
    return found


def _base(merged: MergedCheckpoint) -> Checkpoint | None:
    bases = {tensor.base.model for tensor in merged.plan.tensors if tensor.base is not None}
    return merged.models[bases.pop()] if len(bases) == 1 else None


def _order(item: tuple[str, Any]) -> tuple[int, int]:
    name = item[0]
    return (0, int(name.split()[1])) if name.startswith("layer ") else (1, 0)


def _group(name: str, parts: list[TensorGeometry], names: list[str]) -> Group:
    square, products = summed(parts)
    cosine = cosines(products)
    last = len(names) - 1
    lengths = products.diagonal().clamp_min(0).sqrt().tolist()
    compared = sum(part.compared for part in parts)
    return Group(
        name,
        len(parts),
        {n: length / square**0.5 if square else length for n, length in zip(names, lengths, strict=True)},
        {n: float(cosine[i, last]) for i, n in enumerate(names[:-1])},
        sum(part.conflicts for part in parts) / compared if compared else 0.0,
        sum(sum(part.nonfinite) for part in parts),
    )


def write_html(found: MergeReport, path: Path) -> None:
    """One self-contained page."""
    names = list(found.whole.relative)
    head = "".join(f"<th>{html.escape(_short(n))}</th>" for n in names)
    head += "".join(f"<th>cos {html.escape(_short(n))}</th>" for n in names[:-1])
    rows = "".join(_row(group, names) for group in [*found.groups, found.whole])
    inputs = "".join(
        f"<tr><td>{html.escape(n)}</td><td><code>{i[:16]}</code></td><td>{_perplexity(found, n)}</td></tr>"
        for n, i in {**found.inputs, RESULT: found.identity}.items()
    )
    warnings = "".join(f"<li>{html.escape(warning)}</li>" for warning in found.warnings)
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Merge report</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#222}}
table{{border-collapse:collapse;margin:1rem 0}}
td,th{{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #ddd}}
td:first-child,th:first-child{{text-align:left}}svg{{width:100%;height:12rem}}</style>
<h1>Merge report</h1><p>Method {html.escape(found.method)}. Norms are relative to the base's (absolute without a base);
cosines are with the result.</p><ul>{warnings}</ul>
<table><tr><th>model</th><th>identity</th><th>perplexity ({found.text_tokens} tokens)</th></tr>{inputs}</table>
{_curve(found, names)}
<table><tr><th></th>{head}<th>sign conflicts</th><th>not finite</th></tr>{rows}</table></html>
"""
    with atomic_write(path) as out:
        out.write(page.encode())


def _row(group: Group, names: list[str]) -> str:
    cells = [f"{group.relative[n]:.4f}" for n in names] + [f"{group.cosine[n]:.3f}" for n in names[:-1]]
    cells += [f"{group.sign_conflicts:.1%}", str(group.nonfinite)]
    return f"<tr><td>{html.escape(group.name)}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _perplexity(found: MergeReport, name: str) -> str:
    return f"{found.perplexity[name]:.2f}" if name in found.perplexity else ""


def _curve(found: MergeReport, names: list[str]) -> str:
    """Relative norms over the layers, one line per model."""
    layers = [group for group in found.groups if group.name.startswith("layer ")]
    highest = max((group.relative[n] for group in layers for n in names), default=0.0)
    if len(layers) < 2 or highest == 0:
        return ""
    colours = ("#1668a8", "#b3451f", "#2f7d32", "#7b3fa0", "#8a6d00", "#444")
    lines = ""
    for place, name in enumerate(names):
        points = " ".join(
            f"{60 + 900 * i / (len(layers) - 1):.1f},{150 - 130 * group.relative[name] / highest:.1f}"
            for i, group in enumerate(layers)
        )
        colour = colours[place % len(colours)]
        lines += f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        lines += f'<text x="{60 + 220 * place}" y="180" fill="{colour}">{html.escape(_short(name))}</text>'
    axis = f'<text x="0" y="24">{highest:.4f}</text><text x="0" y="154">0</text>'
    return (
        f'<svg viewBox="0 0 1000 190" font-size="13" role="img" aria-label="norms over the layers">{axis}{lines}</svg>'
    )


def _short(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1]
