"""Measures beside the protocols: what a change does to what follows, to its neighbours, and to the model's writing.

Each gives one Table for a change and its facts: `criteria` (RippleEdits' six, arXiv 2307.12976), `multi-hop` (MQuAKE's
three, 2305.14795), `magnitude` (CounterFact's EM, PM and NM), `plus` (CounterFact+, 2305.17553: neighbours with the
edit before them) and `writing` (ROME's fluency and consistency). The unedited model is always asked first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gnomon.edit import protocols as judge
from gnomon.edit.evaluation import RAW_TOKENS
from gnomon.edit.facts import Fact, Probe, normalised
from gnomon.edit.patched import Change, texts, wearing
from gnomon.edit.retriever import sentence
from gnomon.edit.table import Table, table
from gnomon.errors import UsageError

if TYPE_CHECKING:
    from gnomon.model import Model

WRITING_TOKENS = 100
CRITERIA = (
    "Logical_Generalization", "Compositionality_I", "Compositionality_II", "Subject_Aliasing", "Forgetfulness",
    "Relation_Specificity",
)  # fmt: skip


def measure(name: str, model: Model, change: Change | None, facts: Sequence[Fact]) -> Table:
    """One measure by name. Raises UsageError for a name that is none."""
    if name not in MEASURES:
        raise UsageError(f"There is no measure `{name}`.", hint=f"Known: {', '.join(MEASURES)}.", param="measure")
    return MEASURES[name](model, change, facts)


def criteria(model: Model, change: Change | None, facts: Sequence[Fact]) -> Table:
    """RippleEdits' criteria: shares of tests passed, each only where the unedited model passes its condition queries.

    A test of several queries is passed with any of them right, or with all, as the record says.
    """
    tests: dict[tuple[int, str, int], list[Probe]] = {}
    for n, fact in enumerate(facts):
        for place, probe in enumerate(fact.probes()):
            tests.setdefault((n, probe.group, probe.test or -1 - place), []).append(probe)
        for place, (prompt, right) in enumerate(fact.neighbour_prompts()):
            if right is not None:
                tests[n, "Relation_Specificity", -1 - place] = [Probe(prompt, (right,), "Relation_Specificity")]
    conditions = [c for probes in tests.values() for probe in probes for c in probe.conditions]
    known = dict(zip(conditions, _right(model, conditions), strict=True))
    kept = {key: p for key, p in tests.items() if all(known[c] for probe in p for c in probe.conditions)}
    asked = [(probe.prompt, probe.answers) for probes in kept.values() for probe in probes]
    with wearing(model, change) as edited:
        answered = iter(_right(edited, asked))
    passed: dict[str, list[bool]] = {}
    for (_, group, _), probes in kept.items():
        verdicts = [next(answered) for _ in probes]
        passed.setdefault(group, []).append(any(verdicts) if probes[0].any_of else all(verdicts))
    groups = sorted(passed, key=lambda g: (CRITERIA.index(g) if g in CRITERIA else len(CRITERIA), g))
    return table(
        [
            {
                "criterion": group or "-",
                "tests": len(passed[group]),
                "left_out": sum(key[1] == group for key in tests) - len(passed[group]),
                "passed": sum(passed[group]) / len(passed[group]),
            }
            for group in groups
        ]
    )


def multi_hop(model: Model, change: Change | None, facts: Sequence[Fact]) -> Table:
    """MQuAKE: edit-wise success, instance-wise success (all single hops), multi-hop accuracy (any question right)."""
    cases: dict[str, list[Fact]] = {}
    for n, fact in enumerate(facts):
        cases.setdefault(fact.id.rpartition(".")[0] or str(n), []).append(fact)
    groups = ("multi-hop", "single-hop")
    probes = {
        (case, group): [p for fact in own for p in fact.probes() if p.group == group]
        for case, own in cases.items()
        for group in groups
    }
    asked: list[tuple[str, tuple[str, ...]]] = [(fact.prompt, (fact.target,)) for own in cases.values() for fact in own]
    asked += [(probe.prompt, probe.answers) for own in probes.values() for probe in own]
    with wearing(model, change) as edited:
        right = iter(_right(edited, asked))
    edits = [next(right) for own in cases.values() for _ in own]
    verdicts = {key: [next(right) for _ in own] for key, own in probes.items()}
    hops = [all(v) for (_, group), v in verdicts.items() if group == "single-hop" and v]
    questions = [any(v) for (_, group), v in verdicts.items() if group == "multi-hop" and v]
    row = {"cases": len(cases), "edit_wise": _mean(edits), "instance_wise": _mean(hops), "multi_hop": _mean(questions)}
    return table([row])


def magnitude(model: Model, change: Change | None, facts: Sequence[Fact]) -> Table:
    """CounterFact's magnitudes: mean p(new) - p(old) at the prompt (EM) and paraphrases (PM), p(old) - p(new) at
    neighbours (NM); probabilities are means per token, as e^(mean log p).
    """
    with wearing(model, change) as edited:

        def apart(prompt: str, one: str, other: str) -> float:
            return _probability(edited, prompt, one) - _probability(edited, prompt, other)

        with_old = [fact for fact in facts if fact.old is not None]
        row = {
            "facts": len(with_old),
            "EM": _mean(apart(f.prompt, f.target, f.old or "") for f in with_old),
            "PM": _mean(apart(p, f.target, f.old or "") for f in with_old for p in f.paraphrases),
            "NM": _mean(apart(p, right, f.target) for f in facts for p, right in f.neighbour_prompts() if right),
        }
    return table([row])


def plus(model: Model, change: Change | None, facts: Sequence[Fact]) -> Table:
    """CounterFact+: the new fact stands before each neighbour. NS+: its right answer stays likelier than the target.
    NKL: KL of the next token's distribution, unedited against edited, in millionths of a nat as the paper gives it.
    """
    asked = [
        (f"{sentence(fact)} {prompt}", fact, right) for fact in facts for prompt, right in fact.neighbour_prompts()
    ]
    before = [torch.log_softmax(_next(model, text), -1) for text, _, _ in asked]
    likelier, divergences = [], []
    with wearing(model, change) as edited:
        for (text, fact, right), old in zip(asked, before, strict=True):
            new = torch.log_softmax(_next(edited, text), -1)
            divergences.append(float((old.exp() * (old - new)).sum()))
            if right is not None:
                likelier.append(_probability(edited, text, right) > _probability(edited, text, fact.target))
    return table([{"neighbours": len(asked), "NS+": _mean(likelier), "NKL_1e-6": _mean(1e6 * d for d in divergences)}])


def writing(model: Model, change: Change | None, facts: Sequence[Fact]) -> Table:
    """Fluency: n-gram entropy of text continued from each prompt (low: it repeats itself), before and after.

    Consistency: cosine of word counts, weighted by rarity, between that text and the facts' references.
    """
    prompts = [fact.prompt for fact in facts]
    before = texts(model, prompts, WRITING_TOKENS)
    with wearing(model, change) as edited:
        after = texts(edited, prompts, WRITING_TOKENS)
    pairs = [(text, fact.references) for text, fact in zip(after, facts, strict=True) if fact.references]
    return table(
        [
            {
                "facts": len(facts),
                "fluency_before": _fluency(prompts, before),
                "fluency": _fluency(prompts, after),
                "consistency": _mean(consistency(text, references) for text, references in pairs),
            }
        ]
    )


def consistency(text: str, references: Sequence[str]) -> float:
    """Cosine of TF-IDF vectors of a text and its references together (ROME's RS). IDF: over text and references."""
    documents = [Counter(normalised(one).split()) for one in (text, *references)]
    count = len(documents)
    rarity = {
        word: 1 + math.log((1 + count) / (1 + sum(word in document for document in documents)))
        for document in documents
        for word in document
    }
    joined: Counter[str] = sum(documents[1:], Counter())

    def weight(document: Mapping[str, int]) -> dict[str, float]:
        return {word: n * rarity[word] for word, n in document.items()}

    one, other = weight(documents[0]), weight(joined)
    size = math.sqrt(sum(v * v for v in one.values())) * math.sqrt(sum(v * v for v in other.values()))
    return sum(value * other.get(word, 0.0) for word, value in one.items()) / size if size else 0.0


MEASURES: dict[str, Callable[[Any, Any, Sequence[Fact]], Table]] = {
    "criteria": criteria,
    "multi-hop": multi_hop,
    "magnitude": magnitude,
    "plus": plus,
    "writing": writing,
}


def _right(model: Model, asked: Sequence[tuple[str, tuple[str, ...]]]) -> list[bool]:
    """Whether the model's own continuation holds an answer, in one batch."""
    said = texts(model, [prompt for prompt, _ in asked], RAW_TOKENS)
    return [judge.says(text, answers) for text, (_, answers) in zip(said, asked, strict=True)]


def _probability(model: Model, prompt: str, answer: str) -> float:
    from gnomon.edit.facts import continued

    ids = model.admit(prompt, {}).ids
    wanted = model.tokenizer.encode(continued(prompt, answer), add_special_tokens=False)
    logp = torch.log_softmax(model.logits(ids + wanted)[len(ids) - 1 : -1], -1)
    return math.exp(float(logp.gather(1, torch.tensor(wanted)[:, None]).mean()))


def _next(model: Model, prompt: str) -> torch.Tensor:
    return model.logits(model.admit(prompt, {}).ids)[-1]


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def _fluency(prompts: Sequence[str], said: Sequence[str]) -> float | None:
    return _mean(judge.ngram_entropy(prompt + text) for prompt, text in zip(prompts, said, strict=True))
