"""Evaluate: what a patch changed, by several protocols side by side.

Reliability (the edited prompt), generalization (paraphrases), locality (neighbours keep their answers) and portability
(what follows). What the unedited model says is taken first, before any patch is on. Knows models as text in, text out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gnomon.edit import protocols as judge
from gnomon.edit.facts import Fact
from gnomon.edit.patched import Change, texts, wearing
from gnomon.edit.table import Table, table
from gnomon.errors import UsageError

if TYPE_CHECKING:
    from gnomon.model import Model

RAW_TOKENS = 16
"""Free generation after a raw prompt; its first sentence is judged."""
CHAT_TOKENS = 32
METRICS = ("reliability", "generalization", "locality", "portability")


def say(model: Model, patch: Change, facts: Sequence[Fact]) -> list[dict[str, str]]:
    """What the model says to each fact's prompt before and after, as running text and as an answer in a chat."""
    prompts: list[Any] = [fact.prompt for fact in facts]
    chats: list[Any] = [as_chat(fact.prompt) for fact in facts] if model.can_chat else []

    def both(one: Model) -> tuple[list[str], list[str]]:
        return texts(one, prompts, RAW_TOKENS), texts(one, chats, CHAT_TOKENS)

    before = both(model)
    with wearing(model, patch) as edited:
        after = both(edited)
    result = []
    for i in range(len(facts)):
        said = {"before": before[0][i], "after": after[0][i]}
        if chats:
            said |= {"chat_before": before[1][i], "chat_after": after[1][i]}
        result.append(said)
    return result


def as_chat(text: str) -> list[dict[str, str]]:
    """The text as one user's message."""
    return [{"role": "user", "content": text}]


def evaluate(model: Model, patch: Change | None, facts: Iterable[Fact], protocols: Sequence[str] = ("wild",)) -> Table:
    """One row per protocol: shares of facts for which each criterion holds, with 95 % intervals in the details.

    patch None evaluates the unedited model. details: every prompt with both texts and the verdict.
    """
    wanted = list(facts)
    for name in protocols:
        if name not in judge.PROTOCOLS:
            raise UsageError(
                f"There is no protocol `{name}`.", hint=f"Known: {', '.join(judge.PROTOCOLS)}.", param="protocols"
            )
    asked = [look for fact in wanted for look in looks(model, fact)]
    before = {name: _observe(model, asked, name) for name in protocols}
    with wearing(model, patch) as edited:
        after = {name: _observe(edited, asked, name) for name in protocols}
    rows, details = [], []
    for name in protocols:
        verdicts = [_verdict(name, *seen) for seen in zip(asked, before[name], after[name], strict=True)]
        rows.append(summary(name, asked, verdicts))
        for look, old, new, verdict in zip(asked, before[name], after[name], verdicts, strict=True):
            shown = {"before": old, "after": new} if name == "wild" else {}
            details.append({"protocol": name, "metric": look.metric, "prompt": look.shown, **shown, "score": verdict})
    return table(rows, details)


class Look:
    """One prompt to look at. metric: what it counts for. answers: what should be said; avoid: what should not."""

    def __init__(
        self, metric: str, prompt: Any, shown: str, answers: tuple[str, ...], *, fact: Fact, avoid: str | None = None
    ) -> None:
        self.metric, self.prompt, self.shown, self.answers = metric, prompt, shown, answers
        self.fact, self.avoid = fact, avoid

    @property
    def chat(self) -> bool:
        return not isinstance(self.prompt, str)


def looks(model: Model, fact: Fact) -> list[Look]:
    """Everything that is asked about one fact."""
    new = (fact.target,)
    found = [Look("reliability", fact.prompt, fact.prompt, new, fact=fact, avoid=fact.old)]
    found += [Look("generalization", p, p, new, fact=fact, avoid=fact.old) for p in fact.paraphrases]
    for prompt, right in fact.neighbour_prompts():
        found.append(Look("locality", prompt, prompt, (right,) if right else (), fact=fact, avoid=fact.target))
    found += [Look("portability", p.prompt, p.prompt, p.answers, fact=fact) for p in fact.probes()]
    if model.can_chat:
        found.append(Look("chat", as_chat(fact.prompt), fact.prompt, new, fact=fact, avoid=fact.old))
    return found


def summary(protocol: str, asked: Sequence[Look], verdicts: Sequence[float | None]) -> dict[str, Any]:
    """Means over facts; a fact's several prompts of one kind count as one."""
    row: dict[str, Any] = {"protocol": protocol, "facts": len({id(look.fact) for look in asked})}
    for metric in (*METRICS, "chat"):
        by_fact: dict[int, list[float]] = {}
        for look, verdict in zip(asked, verdicts, strict=True):
            if look.metric == metric and verdict is not None:
                by_fact.setdefault(id(look.fact), []).append(verdict)
        means = [sum(values) / len(values) for values in by_fact.values()]
        row[metric] = sum(means) / len(means) if means else None
    return row


def _observe(model: Model, asked: Sequence[Look], protocol: str) -> list[Any]:
    """What a protocol needs to see of every prompt."""
    if protocol == "wild":
        raw = texts(model, [look.prompt for look in asked if not look.chat], RAW_TOKENS)
        chats = texts(model, [look.prompt for look in asked if look.chat], CHAT_TOKENS)
        streams = {False: iter(raw), True: iter(chats)}
        return [next(streams[look.chat]) for look in asked]
    if protocol == "length":
        return [_at_length(model, look) for look in asked]
    return [_forced(model, look) for look in asked]


def _verdict(protocol: str, look: Look, before: Any, after: Any) -> float | None:
    """1 where the criterion holds, 0 where it does not (shares in between for token protocols)."""
    if protocol == "wild":
        if look.metric == "locality":
            return float(judge.kept(before, after, look.fact.target, look.answers[0] if look.answers else None))
        return float(judge.says(after, look.answers))
    if after is None or before is None:
        return None
    if protocol == "length":
        if look.metric == "locality":
            return _share(before["said"], after["said"])
        return _share(after["wanted"], after["said"])
    if protocol == "teacher":
        if look.metric == "locality":
            return _share(before["argmax"], after["argmax"])
        return _share(after["wanted"], after["argmax"])
    if after["other"] is None:
        return None
    return float(after["logp"] > after["other"])


def _share(wanted: Sequence[int], said: Sequence[int]) -> float:
    return sum(a == b for a, b in zip(wanted, said, strict=False)) / max(len(wanted), 1)


def _at_length(model: Model, look: Look) -> dict[str, Any] | None:
    """Greedy generation cut at the length of the answer."""
    if not look.answers:
        return None
    wanted = _answer_ids(model, look, look.answers[0])
    options = {"temperature": 0.0, "max_tokens": len(wanted), "ignore_eos": True}
    return {"wanted": wanted, "said": model.submit(look.prompt, options, chat=look.chat).collect()[0].token_ids}


def _forced(model: Model, look: Look) -> dict[str, Any] | None:
    """Teacher forcing along the answer: its argmax tokens, its mean log p, and that of the other answer."""
    if not look.answers:
        return None
    logp, argmax, wanted = _along(model, look, look.answers[0])
    other = _along(model, look, look.avoid)[0] if look.avoid else None
    return {"logp": logp, "other": other, "argmax": argmax, "wanted": wanted}


def _along(model: Model, look: Look, text: str) -> tuple[float, list[int], list[int]]:
    prompt = model.admit(look.prompt, {}).ids
    wanted = _answer_ids(model, look, text)
    rows = model.logits(prompt + wanted)[len(prompt) - 1 : -1]
    logp = torch.log_softmax(rows, -1).gather(1, torch.tensor(wanted)[:, None]).mean()
    return float(logp), rows.argmax(-1).tolist(), wanted


def _answer_ids(model: Model, look: Look, text: str) -> list[int]:
    """An answer's tokens after this prompt: with a space after running text, without one at a chat turn's start."""
    spaced = text if look.chat else Fact(look.shown, None, text.strip()).continuation
    return model.tokenizer.encode(spaced, add_special_tokens=False)


def means(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Several one-fact rows as one: means of the numbers and their 95 % intervals (`..._ci`)."""
    gathered = list(rows)
    result: dict[str, Any] = {"facts": len(gathered)}
    for metric in (*METRICS, "chat"):
        values = [row[metric] for row in gathered if row.get(metric) is not None]
        if values:
            result |= {metric: sum(values) / len(values), f"{metric}_ci": judge.interval(values)}
    return result
