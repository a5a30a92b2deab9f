"""Probing: where a model without a shipped profile is best edited, found once by editing and looking at the text.

A few well-known facts are changed at a few depths; the depth whose edits hold best in the prompt, in other words and
beside neighbours, is kept by the weights' identity. Causal tracing would be cheaper and does not predict it
(arXiv 2301.04213). Nothing is left changed: every probe is a patch that is thrown away.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gnomon.edit.facts import Fact
from gnomon.edit.profiles import SPREAD, Profile
from gnomon.errors import EditError, UsageError
from gnomon.models.cache import atomic_write, cache_dir
from gnomon.progress import progress

if TYPE_CHECKING:
    from gnomon.edit.editor import Editor

log = logging.getLogger("gnomon.edit")
VERSION = 1
DEPTHS = (0.35, 0.5, 0.65)
PROBES = (
    Fact(
        "The Eiffel Tower is located in the city of",
        "Eiffel Tower",
        "Rome",
        paraphrases=("To visit the Eiffel Tower one travels to",),
        neighbours=(("Big Ben is located in the city of", "London"), "The Colosseum is located in the city of"),
    ),
    Fact(
        "The native language of Molière was",
        "Molière",
        "English",
        paraphrases=("At home Molière spoke",),
        neighbours=(("The native language of Goethe was", "German"), "The native language of Balzac was"),
    ),
    Fact(
        "The iPhone is made by",
        "iPhone",
        "Nokia",
        paraphrases=("The company behind the iPhone is",),
        neighbours=(("The Galaxy is made by", "Samsung"), "The MacBook is made by"),
    ),
)
"""Facts that most models know, with one paraphrase and two neighbours each."""


def probed(editor: Editor) -> Profile:
    """The profile of this model: from the cache, or probed now. What cannot be probed keeps the guess by depth."""
    path = cache_dir() / "edit" / "profiles" / f"{editor.model.checkpoint.identity}-{VERSION}.json"
    try:
        layer = int(json.loads(path.read_text())["layer"])
    except (OSError, ValueError, KeyError):
        scores = scored(editor, DEPTHS, PROBES)
        if not scores:
            log.warning("No probe edit worked on %s: it is edited by depth alone.", editor.model.name)
            return editor.profile
        layer = max(scores, key=lambda one: scores[one])
        with atomic_write(path) as out:
            out.write(json.dumps({"layer": layer, "scores": {str(k): v for k, v in scores.items()}}).encode())
    several = tuple(range(max(0, layer - SPREAD + 1), layer + 1))
    return Profile(editor.profile.name, layer, several, True, {})


def scored(editor: Editor, depths: Sequence[float], facts: Sequence[Fact]) -> dict[int, float]:
    """Layer -> mean of reliability, generalization and locality over the facts; without layers where nothing worked."""
    from gnomon.edit.api import edit
    from gnomon.edit.evaluation import evaluate

    count = len(editor.anatomy.layers)
    tokens = None if editor.tokens == editor.profile.tokens else editor.tokens
    layers = sorted({min(round(depth * count), count - 1) for depth in depths})
    found: dict[int, list[float]] = {}
    with progress("probing where to edit", len(layers) * len(facts)) as bar:
        for layer in layers:
            for fact in facts:
                try:
                    patch = edit(
                        editor.model, fact, layers=layer, moments=editor.corpus, tokens=tokens, seed=editor.seed,
                        report=False,
                    )  # fmt: skip
                except (EditError, UsageError) as error:
                    log.info("probe at layer %s: %s", layer, error)
                else:
                    row = evaluate(editor.model, patch, [fact]).rows[0]
                    three = [row[name] for name in ("reliability", "generalization", "locality")]
                    found.setdefault(layer, []).append(sum(three) / 3)
                bar.advance()
    return {layer: sum(values) / len(facts) for layer, values in found.items()}
