"""Evolving a merge's parameters (arXiv 2403.13187, its parameter space): CMA-ES in this process, fitness on texts.

A genome is, for each group of layers, one number for each parameter of each model; it becomes an ordinary merge file,
so what was found can be read, kept and merged again. Each text is halved: the search sees the first half, the report
is on the second, which no step of it has seen. The merges of a generation may be measured at once, on Ray. Needs the
extra `evolve`.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gnomon.errors import ConfigError, MissingExtra, UsageError
from gnomon.loading import load
from gnomon.merge.build import MergeRun, open_merge, parse_source
from gnomon.merge.evolve_ray import Begin, begun_on_ray
from gnomon.merge.layout import Layout
from gnomon.merge.perplexity import Text, halves, text_loss
from gnomon.merge.registry import find_method
from gnomon.merge.remembered import Remembered, key_of
from gnomon.models.checkpoint import Checkpoint
from gnomon.progress import progress

SIGMA = 1 / 6
RANGES = {"weight": (None, None), "density": (0.0, 1.0), "t": (0.0, 1.0), "lambda": (None, None)}
"""Parameters that may evolve, and where their values end."""
METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp")
Fitness = Callable[[Mapping[str, Any]], float]


@dataclass(frozen=True)
class Gene:
    """One number: a parameter of one model (None: of all), in one group of layers (None: everywhere)."""

    name: str
    model: int | None
    layers: tuple[int, int] | None


@dataclass(frozen=True)
class Evolved:
    """content: the best merge file. losses on the seen halves and on the held-out ones, before and after."""

    content: dict[str, Any]
    evaluations: int
    seen: tuple[float, float]
    held_out: tuple[float, float]
    history: tuple[float, ...]


def genes_of(content: Mapping[str, Any], names: Sequence[str], layers: int, group: int | None) -> list[Gene]:
    """The genome of a merge file of `models`. Raises UsageError for a parameter that the method does not have."""
    method = find_method(str(content.get("merge_method")))
    if method.name not in METHODS:
        raise UsageError(f"`{method.name}` cannot evolve.", hint=f"Methods: {', '.join(METHODS)}.")
    models = content.get("models") or []
    if not models:
        raise ConfigError("evolve takes a file with `models` (layers are its own business).", param="models")
    base = content.get("base_model")
    runs: list[tuple[int, int] | None] = [None]
    if group is not None:
        runs = [(start, min(start + group, layers)) for start in range(0, layers, group)]
    genes = []
    for name in names:
        if name not in RANGES or name not in method.parameters:
            known = ", ".join(n for n in RANGES if n in method.parameters)
            raise UsageError(f"`{name}` of `{method.name}` does not evolve.", hint=f"These do: {known}.", param="genes")
        own = method.parameters[name].per_model
        for run in runs:
            places = [place for place, entry in enumerate(models) if entry["model"] != base] if own else [None]
            genes += [Gene(name, place, run) for place in places]
    return genes


def with_genes(content: Mapping[str, Any], genes: Sequence[Gene], values: Sequence[float]) -> dict[str, Any]:
    """The merge file that a genome means: values by layer become filters on names."""
    changed: dict[str, Any] = copy.deepcopy(dict(content))
    settings: dict[tuple[str, int | None], list[tuple[tuple[int, int] | None, float]]] = {}
    for gene, value in zip(genes, values, strict=True):
        low, high = RANGES[gene.name]
        bounded = max(low if low is not None else -math.inf, min(high if high is not None else math.inf, value))
        settings.setdefault((gene.name, gene.model), []).append((gene.layers, round(float(bounded), 6)))
    for (name, model), found in settings.items():
        home = changed if model is None else changed["models"][model]
        home["parameters"] = {**(home.get("parameters") or {}), name: _setting(found)}
    return changed


def _setting(found: Sequence[tuple[tuple[int, int] | None, float]]) -> Any:
    """One number, or one per layer (the groups' mean for what lies outside of all layers)."""
    if found[0][0] is None:
        return found[0][1]
    listed: list[dict[str, Any]] = [
        {"filter": f".{layer}.", "value": value} for run, value in found if run is not None for layer in range(*run)
    ]
    mean = math.fsum(value for _, value in found) / len(found)
    return [*listed, {"value": round(mean, 6)}]


def evolve(
    file: str | Path,
    texts: Mapping[str, Text],
    *,
    genes: Sequence[str] = ("weight",),
    layer_group: int | None = None,
    budget: int = 60,
    seed: int = 0,
    most_tokens: int = 1000,
    threads: int = 0,
    on_step: Callable[[int, float], None] | None = None,
    journal: Path | None = None,
    ray: str | None = None,
) -> Evolved:
    """Search for at most `budget` merges. texts: each counts the same; most_tokens: of each half.

    journal: a file of what was measured, until the search is over; begun again, it goes on from there.
    ray: measure each generation's merges at once, on the cluster of this address ("local": one of its own).
    """
    try:
        import cma
    except ImportError:
        raise MissingExtra("gnomon merge evolve", "evolve") from None
    options, source, folder = parse_source(file)
    content = options.model_dump(exclude_unset=True)
    models = {reference: _open(reference, folder, source) for reference in options.references()}
    depth = Layout.of(models[options.references()[0]])
    layers = depth.stacks.get(depth.main_stack() or "", 0)
    genome = genes_of(content, genes, layers, layer_group)
    split = {name: halves(text) for name, text in texts.items()}
    run = MergeRun(seed=seed, threads=threads)
    identities = {reference: model.identity for reference, model in models.items()}
    known = {name: str(text) for name, text in texts.items()}
    named = json.dumps([content, [vars(gene) for gene in genome], known, most_tokens, seed, identities], sort_keys=True)
    remembered = Remembered(journal, hashlib.sha256(named.encode()).hexdigest())

    def loss(candidate: Mapping[str, Any], half: int) -> float:
        return _loss(candidate, models, run, folder, [pair[half] for pair in split.values()], most_tokens)

    first_halves = [pair[0] for pair in split.values()]
    alone = functools.partial(_loss_anew, source=source, run=run, folder=folder, texts=first_halves, most=most_tokens)
    start = [_start(gene, content, len(content["models"])) for gene in genome]
    first = with_genes(content, genome, start)
    history = [remembered.of(first, lambda: loss(first, 0))]
    best, least = first, history[0]
    with progress("evolving", total=budget) as bar, _begun(lambda c: loss(c, 0), alone, ray) as begin:
        bar.advance()
        strategy = cma.CMAEvolutionStrategy(
            start if len(start) > 1 else [*start, 0.0], SIGMA, {"seed": seed + 1, "verbose": -9, "maxfevals": budget}
        )
        while len(history) < budget and not strategy.stop():
            asked = strategy.ask()
            scores = []
            candidates = [with_genes(content, genome, list(values)[: len(genome)]) for values in asked]
            unknown = [c for c in candidates[: budget - len(history)] if not remembered.knows(c)]
            waiting = dict(zip(map(key_of, unknown), begin(unknown), strict=True))
            for candidate in candidates:
                score = math.inf
                if len(history) < budget:
                    score = remembered.of(candidate, waiting.get(key_of(candidate), _never))
                if math.isfinite(score):
                    history.append(score)
                    bar.advance()
                    if on_step is not None:
                        on_step(len(history), score)
                if score < least:
                    best, least = candidate, score
                scores.append(score if math.isfinite(score) else max(history))
            strategy.tell(asked, scores)
    held_out = (loss(first, 1), loss(best, 1))
    remembered.forget()
    return Evolved(best, len(history), (history[0], least), held_out, tuple(history))


def _loss(
    candidate: Mapping[str, Any],
    models: Mapping[str, Checkpoint],
    run: MergeRun,
    folder: Path,
    texts: Sequence[Text],
    most: int,
) -> float:
    """Mean nats a token of the merge, over the texts."""
    merged = open_merge(candidate, run, models, folder)
    with load(merged, max_sequences=1, ledger=False) as model:
        found = [text_loss(model, text, most_tokens=most).mean for text in texts]
    return math.fsum(found) / len(found)


def _loss_anew(
    candidate: Mapping[str, Any], *, source: str, run: MergeRun, folder: Path, texts: Sequence[Text], most: int
) -> float:
    """_loss in another process, which opens the models itself."""
    references = parse_source(candidate)[0].references()
    models = {reference: _open(reference, folder, source) for reference in references}
    return _loss(candidate, models, run, folder, texts, most)


def _never() -> float:
    raise AssertionError("What is known is not measured.")


@contextmanager
def _begun(here: Callable[[Mapping[str, Any]], float], alone: Fitness, ray: str | None) -> Iterator[Begin]:
    """How the merges of a generation are measured: one after the other here, or all at once on Ray."""
    if ray is None:
        yield lambda candidates: [functools.partial(here, candidate) for candidate in candidates]
    else:
        with begun_on_ray(alone, ray) as begin:
            yield begin


def _start(gene: Gene, content: Mapping[str, Any], models: int) -> float:
    """What the file says, where that is one number; else the common start."""
    home = content if gene.model is None else content["models"][gene.model]
    given = (home.get("parameters") or {}).get(gene.name, (content.get("parameters") or {}).get(gene.name))
    if isinstance(given, int | float) and not isinstance(given, bool):
        return float(given)
    return {"weight": 1 / models, "t": 0.5}.get(gene.name, 1.0)


def _open(reference: str, folder: Path, source: str) -> Checkpoint:
    from gnomon.merge.build import open_model

    return open_model(reference, folder, source)
