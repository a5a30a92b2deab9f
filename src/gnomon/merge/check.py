"""Will this merge make sense? What to know before: network, vocabulary, ties, types, template, distances, signs.

An error is what makes the merge impossible; a warning is what makes it doubtful; a note is worth knowing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from gnomon.errors import GnomonError
from gnomon.merge.build import MergeRun, Source, open_merge, open_models
from gnomon.merge.geometry import cosines, geometry, summed
from gnomon.merge.merged import MergedCheckpoint
from gnomon.models.checkpoint import Checkpoint

FAR = 0.5
"""Relative distance to the base beyond which a model is hardly a fine-tune of it (fine-tunes: 0.001 to 0.1)."""
GLIMPSED, GLIMPSE = 12, 1 << 15
"""Tensors that are looked at before a merge begins, and the elements of each."""
MANY_CONFLICTS = 0.45
"""Share of opposite signs that unrelated task vectors show (two independent ones: 0.5)."""


@dataclass(frozen=True)
class Finding:
    """level: error | warning | note."""

    level: str
    what: str
    advice: str | None = None


@dataclass
class Checked:
    """All findings, and the measured distances. ok: nothing makes the merge impossible."""

    findings: list[Finding] = field(default_factory=list)
    distances: dict[str, float] = field(default_factory=dict)
    cosines: dict[str, float] = field(default_factory=dict)
    sign_conflicts: float | None = None

    @property
    def ok(self) -> bool:
        return not any(finding.level == "error" for finding in self.findings)

    def add(self, level: str, what: str, advice: str | None = None) -> None:
        self.findings.append(Finding(level, what, advice))


def check(config: Source, run: MergeRun | None = None) -> Checked:
    """Look at a merge file and its models. Raises GnomonError only where not even the models can be opened."""
    run = run or MergeRun()
    checked = Checked()
    options, models = open_models(config, run)
    merged_models = options.merged_references()
    facts: list[tuple[str, Callable[[Checkpoint], Any], str, str | None]] = [
        ("network", lambda c: c.config.get("architectures", [c.config.get("model_type")])[0], "error", None),
        ("hidden size", lambda c: c.config.get("hidden_size"), "error", None),
        ("vocabulary size", lambda c: c.config.get("vocab_size"), "warning", "Set tokenizer_source."),
        ("tied embeddings", lambda c: bool(c.config.get("tie_word_embeddings", False)), "warning", None),
        ("rope_theta", lambda c: c.config.get("rope_theta"), "warning", "They see positions differently."),
        ("end tokens", lambda c: c.config.get("eos_token_id"), "note", None),
        ("chat template", lambda c: bool(c.chat_template) and hash(c.chat_template), "note", "The donor's is used."),
        ("stored type", lambda c: next(c.info(name).dtype for name in c), "note", "Set dtype to choose one."),
    ]
    chosen = {reference: models[reference] for reference in merged_models}
    for what, fact, level, advice in facts:
        _compare(checked, chosen, what, fact, level, advice)
    _tokenizers(checked, chosen, joined=options.tokenizer is not None or options.tokenizer_source is not None)
    try:
        merged = open_merge(config, run)
    except GnomonError as error:
        checked.add("error", error.message, error.hint)
        return checked
    for warning in merged.plan.warnings:
        checked.add("warning", warning)
    base = models[options.base_model] if options.base_model else None
    others = {reference: model for reference, model in chosen.items() if reference != options.base_model}
    if not options.slices:
        _distances(checked, others, base, merged.threads)
    return checked


def strangers(merged: MergedCheckpoint) -> list[str]:
    """A warning for each model that is hardly a fine-tune of the base; a glimpse that costs next to nothing.

    Without a base the first model of the document stands for it: what shares a base lies near that too.
    """
    together = [tensor for tensor in merged.plan.tensors if len(tensor.inputs) > 1]
    bases = {tensor.base.model for tensor in together if tensor.base is not None}
    if not together or len(bases) > 1:
        return []
    reference = bases.pop() if bases else together[0].sources[0].model
    first, found = merged.models[reference], list[str]()
    tables = [name for name in first if len(first.info(name).shape) == 2]
    for other in {s.model: None for tensor in together for s in tensor.sources if s.model != reference}:
        model = merged.models[other]
        names = [n for n in tables if n in model and model.info(n).shape == first.info(n).shape]
        far = _glimpsed(model, first, names[:: max(1, len(names) // GLIMPSED)])
        if far > FAR:
            found.append(_stranger(other, far) if together[0].base is not None else _apart(other, reference, far))
    return found


def _glimpsed(model: Checkpoint, base: Checkpoint, names: Sequence[str]) -> float:
    """The distance over the base's norm, of the first elements of these tensors."""
    square = delta = 0.0
    for name in names:
        count = min(GLIMPSE, math.prod(base.info(name).shape), math.prod(model.info(name).shape))
        own, other = (checkpoint.reader(name)(0, count).float() for checkpoint in (base, model))
        square += float(own.square().sum())
        delta += float((other - own).square().sum())
    return math.sqrt(delta / square) if square and math.isfinite(delta) else 0.0


def _stranger(name: str, far: float) -> str:
    return f"{name} lies {far:.2f} of the base's norm away from it: hardly a fine-tune of this base."


def _apart(name: str, first: str, far: float) -> str:
    return f"{name} lies {far:.2f} of {first}'s norm away from it: the two hardly share a base."


def _compare(
    checked: Checked,
    models: Mapping[str, Checkpoint],
    what: str,
    fact: Callable[[Checkpoint], Any],
    level: str,
    advice: str | None,
) -> None:
    values = {reference: fact(model) for reference, model in models.items()}
    if len({str(value) for value in values.values()}) > 1:
        shown = "" if what == "chat template" else ": " + ", ".join(f"{r} {v}" for r, v in values.items())
        checked.add(level, f"The models differ in {what}{shown}.", advice)


def _tokenizers(checked: Checked, models: Mapping[str, Checkpoint], *, joined: bool) -> None:
    vocabularies = {}
    for reference, model in models.items():
        try:
            vocabularies[reference] = model.tokenizer().backend.get_vocab(with_added_tokens=True)
        except GnomonError:
            checked.add("note", f"{reference} has no tokenizer; its vocabulary cannot be compared.")
    if not vocabularies:
        return
    first, own = next(iter(vocabularies.items()))
    for reference, vocabulary in vocabularies.items():
        moved = sum(1 for token, i in vocabulary.items() if token in own and own[token] != i)
        extra = sum(1 for token in vocabulary if token not in own)
        if moved:
            checked.add(
                "note" if joined else "warning",
                f"{moved} tokens stand at another id in {reference} than in {first}.",
                None if joined else "Without tokenizer_source, rows of different tokens are merged.",
            )
        if extra and not joined:
            checked.add("warning", f"{extra} tokens of {reference} are unknown to {first}.", "Set tokenizer_source.")


def _distances(checked: Checked, models: Mapping[str, Checkpoint], base: Checkpoint | None, threads: int) -> None:
    measured = geometry(models, base, threads=threads)
    if not measured or not models:
        return
    square, products = summed(measured)
    names, cosine = list(models), cosines(products)
    bad = {name: sum(part.nonfinite[i] for part in measured) for i, name in enumerate(names)}
    for name, count in bad.items():
        if count:
            checked.add("error", f"{name} holds {count} NaN or infinite numbers.", "Repair it, or --allow-nonfinite.")
    for first, second in combinations(range(len(names)), 2):
        checked.cosines[f"{names[first]} {names[second]}"] = float(cosine[first, second])
    if base is not None:
        for i, name in enumerate(names):
            far = (float(products[i, i]) / square) ** 0.5 if square else 0.0
            checked.distances[name] = far
            if far > FAR:
                checked.add(
                    "warning",
                    _stranger(name, far),
                    "Models of different bases seldom merge; an ensemble combines them instead.",
                )
            elif far == 0:
                checked.add("note", f"{name} equals the base.")
    elif len(names) > 1 and float(cosine.min()) < 1 - FAR:
        checked.add(
            "warning",
            f"Two of the models have a cosine of {float(cosine.min()):.2f}: they hardly share a base.",
            "Models of different bases seldom merge; an ensemble combines them instead.",
        )
    compared = sum(part.compared for part in measured)
    if base is not None and compared:
        checked.sign_conflicts = sum(part.conflicts for part in measured) / compared
        if len(names) == 2 and checked.sign_conflicts > MANY_CONFLICTS:
            checked.add(
                "note",
                f"{checked.sign_conflicts:.0%} of the parameters change in opposite directions.",
                "Methods that elect signs (ties, dare_ties, della) are made for that.",
            )
