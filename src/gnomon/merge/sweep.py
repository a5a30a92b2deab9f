"""Sweep one parameter of a merge and measure each result on texts; nothing is written but the curve.

`weight=0:1:0.1` (from, to, step) or `lambda=0.3,0.5,1`; `models[1].weight=...` changes one model's alone.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gnomon.errors import MissingExtra, UsageError
from gnomon.loading import load
from gnomon.merge.build import MergeRun, open_merge
from gnomon.merge.config import parse_config, read_documents
from gnomon.merge.perplexity import Text, TextLoss, text_loss
from gnomon.merge.registry import find_method, suggest
from gnomon.progress import progress

RESAMPLES = 1000


@dataclass(frozen=True)
class Point:
    """One value: per text, mean loss (nats per token) and its 95 % bootstrap interval over windows."""

    value: float
    losses: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]

    @property
    def mean(self) -> float:
        return sum(self.losses.values()) / len(self.losses)


@dataclass(frozen=True)
class Sweep:
    parameter: str
    points: tuple[Point, ...]

    @property
    def best(self) -> Point:
        """The least mean loss over all texts; the first of equals."""
        return min(self.points, key=lambda point: point.mean)


def parse_sweep(text: str) -> tuple[str, list[float]]:
    """ "weight=0:1:0.25" -> ("weight", [0, 0.25, 0.5, 0.75, 1]). Raises UsageError."""
    name, _, values = text.partition("=")
    try:
        if ":" in values:
            start, stop, step = (float(part) for part in values.split(":"))
            if step <= 0 or stop < start:
                raise ValueError
            count = int((stop - start) / step + 1e-9)
            return name, [round(start + i * step, 10) for i in range(count + 1)]
        return name, [float(part) for part in values.split(",")]
    except ValueError:
        raise UsageError(
            f"--sweep: `{text}` is no sweep.", hint="Write weight=0:1:0.1 or lambda=0.3,0.5,1.", param="sweep"
        ) from None


def with_value(content: Mapping[str, Any], parameter: str, value: float) -> dict[str, Any]:
    """The merge file's content with one parameter set. Raises UsageError for an unknown one."""
    changed: dict[str, Any] = copy.deepcopy(dict(content))
    method = find_method(str(changed.get("merge_method")))
    match = re.fullmatch(r"(?:models\[(\d+)\]\.)?(.+)", parameter)
    index, name = (match[1], match[2]) if match else (None, parameter)
    if name not in method.parameters:
        raise UsageError(f"`{method.name}` has no parameter `{name}`.", hint=suggest(name, method.parameters))
    entries = changed.get("models") or []
    if index is not None:
        if int(index) >= len(entries):
            raise UsageError(f"The file has {len(entries)} models: there is no models[{index}].", param="sweep")
        entries[int(index)].setdefault("parameters", {})[name] = value
        return changed
    for entry in [*entries, *(source for piece in changed.get("slices") or [] for source in piece["sources"])]:
        (entry.get("parameters") or {}).pop(name, None)
    changed["parameters"] = {**(changed.get("parameters") or {}), name: value}
    return changed


def sweep(
    file: str | Path,
    parameter: str,
    values: Sequence[float],
    texts: Mapping[str, Text],
    *,
    run: MergeRun | None = None,
    most_tokens: int | None = None,
) -> Sweep:
    """Merge in memory for each value and measure every text."""
    documents = read_documents(Path(file))
    if len(documents) != 1:
        raise UsageError(f"{file} has {len(documents)} documents; a sweep takes a file of one.", param="file")
    contents = [with_value(documents[0], parameter, value) for value in values]
    for content in contents:
        parse_config(content, str(file))
    points = []
    with progress(f"sweeping {parameter}", total=len(values)) as bar:
        for value, content in zip(values, contents, strict=True):
            merged = open_merge(content, run, folder=Path(file).parent)
            with load(merged, max_sequences=1, ledger=False) as model:
                found = {name: text_loss(model, text, most_tokens=most_tokens) for name, text in texts.items()}
            losses = {name: loss.mean for name, loss in found.items()}
            points.append(Point(value, losses, {name: interval(loss) for name, loss in found.items()}))
            bar.advance()
    return Sweep(parameter, tuple(points))


def interval(loss: TextLoss, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean, resampling windows."""
    draw = random.Random(seed)
    means = []
    for _ in range(RESAMPLES):
        picked = draw.choices(loss.windows, k=len(loss.windows))
        means.append(sum(total for total, _ in picked) / sum(count for _, count in picked))
    means.sort()
    return means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES)]


def require_plotting(path: Path) -> None:
    """Raises MissingExtra without matplotlib, UsageError for a file it cannot make: before a sweep, not after it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise MissingExtra("Plotting", "plot") from None
    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in known:
        raise UsageError(f"--plot: `{path}` is of no known kind.", hint="Name a .png, .svg or .pdf file.", param="plot")
    path.parent.mkdir(parents=True, exist_ok=True)


def plot(found: Sweep, path: Path) -> None:
    """Losses over the parameter, one curve a text, with intervals. Needs matplotlib."""
    require_plotting(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    values = [point.value for point in found.points]
    for name in found.points[0].losses:
        axes.plot(values, [point.losses[name] for point in found.points], marker="o", label=name)
        low, high = zip(*(point.intervals[name] for point in found.points), strict=True)
        axes.fill_between(values, low, high, alpha=0.15)
    axes.axvline(found.best.value, color="grey", linestyle=":")
    axes.set_xlabel(found.parameter)
    axes.set_ylabel("nats per token")
    axes.legend()
    figure.savefig(path)
