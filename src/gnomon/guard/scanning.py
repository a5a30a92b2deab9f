"""Scanners: functions that judge a whole text with a score between 0 and 1. One file each, registered by `@scanner`.

    @scanner("shouting", about="Mostly capitals.")
    def shouting(text: str, *, prompt: str = "") -> Judgement:
        return Judgement(sum(c.isupper() for c in text) / max(len(text), 1))

`get("shouting").scan(text)` gives (sanitized text, valid, risk), as llm-guard's scanners do. What has been measured on
labelled data says so with its figures (`measured`), all else that is not exact is `unvalidated`. Third parties register
under the entry-point group `gnomon.scanners`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import entry_points
from inspect import signature
from typing import Any, Literal

from gnomon.errors import ConfigError
from gnomon.registry import nearest

GROUP = "gnomon.scanners"
State = Literal["exact", "measured", "unvalidated"]
Judge = Callable[..., "Judgement"]


@dataclass(frozen=True)
class Judgement:
    """score: 0 clean to 1 certain. note: why, without the text. text: the text put right, where a scanner can."""

    score: float
    note: str = ""
    text: str | None = None


@dataclass(frozen=True)
class Scanner:
    """A judge with its settings. A text is invalid from `threshold` on.

    needs: `needs(**options)` is called when a policy is compiled: it fetches and loads what the judge needs, in
    no text's time, and raises what is wrong with the options.
    opens: for one text, `opens(**options)` gives a judge that is always called with the whole text so far, and so may
    remember what it has read; what it says depends on that text alone.
    """

    name: str
    judge: Judge
    about: str
    directions: tuple[str, ...] = ("input", "output")
    threshold: float = 0.5
    state: State = "unvalidated"
    options: Mapping[str, Any] = field(default_factory=dict)
    opens: Callable[..., Callable[[str, str], Judgement]] | None = None
    needs: Callable[..., Any] | None = None

    def prepare(self) -> None:
        """All is there that the judge needs, or an error says what is not."""
        if self.needs is not None:
            self.needs(**self.options)

    def opened(self) -> Callable[[str, str], Judgement]:
        """The judge of one text."""
        return self if self.opens is None else self.opens(**self.options)

    def __call__(self, text: str, prompt: str = "") -> Judgement:
        return self.judge(text, prompt=prompt, **self.options)

    def scan(self, prompt: str, output: str | None = None) -> tuple[str, bool, float]:
        """llm-guard's shape: of an input the prompt, of an output both -> (sanitized, valid, risk -1..1)."""
        text = prompt if output is None else output
        if not text.strip():
            return text, True, -1.0
        found = self(text, "" if output is None else prompt)
        shown = text if found.text is None else found.text
        return shown, found.score < self.threshold, risk(found.score, self.threshold)


def risk(score: float, threshold: float) -> float:
    """llm-guard's risk: -1 for nothing, 0 at the threshold, 1 for certain."""
    if score <= 0:
        return -1.0
    span = (1 - threshold) if score > threshold else threshold
    return max(-1.0, min(1.0, round((score - threshold) / span, 1))) if span else 1.0


_known: dict[str, Scanner] = {}


def scanner(
    name: str,
    *,
    about: str,
    directions: tuple[str, ...] = ("input", "output"),
    threshold: float = 0.5,
    state: State = "unvalidated",
    opens: Callable[..., Callable[[str, str], Judgement]] | None = None,
    needs: Callable[..., Any] | None = None,
) -> Callable[[Judge], Judge]:
    """Register a judge under a name. It is called as judge(text, prompt=..., **options); see Scanner."""

    def register(judge: Judge) -> Judge:
        _known[name] = Scanner(name, judge, about, directions, threshold, state, opens=opens, needs=needs)
        return judge

    return register


@cache
def _load() -> None:
    from gnomon.guard import scanners

    for module in pkgutil.iter_modules(scanners.__path__):
        importlib.import_module(f"{scanners.__name__}.{module.name}")
    for point in entry_points(group=GROUP):
        point.load()


def names() -> list[str]:
    _load()
    return sorted(_known)


def get(name: str, /, *, threshold: float | None = None, **options: Any) -> Scanner:
    """A scanner by name with its settings; packs of rules, `words`, `regex` and `rules` are scanners too.

    Raises ConfigError naming the nearest scanner or option.
    """
    from gnomon.guard.rules import KINDS, pack_names

    _load()
    if name in (*pack_names(), *KINDS):
        return Scanner(name, _by_rules(name, options), "Rules.", threshold=0.5, state="exact")
    if name not in _known:
        raise ConfigError(f"No scanner `{name}`.", hint=nearest(name, [*_known, *pack_names(), *KINDS]), param="use")
    found = _known[name]
    known = signature(found.opens or found.judge).parameters.values()
    takes = [one.name for one in known if one.kind is one.KEYWORD_ONLY and one.name != "prompt"]
    for option in options:
        if option not in takes and all(one.kind is not one.VAR_KEYWORD for one in known):
            hint = nearest(option, takes) if takes else "It has none."
            raise ConfigError(f"The scanner `{name}` has no option `{option}`.", hint=hint, param=f"options.{option}")
    return replace(found, options=options, threshold=found.threshold if threshold is None else threshold)


def _by_rules(name: str, options: Mapping[str, Any]) -> Judge:
    """A rule pack as a judge: certain when a rule matches, with the text as the rules leave it."""
    from gnomon.guard.guard import Guard

    guard = Guard({"output": [{"use": name, **options}]})

    def judge(text: str, *, prompt: str = "") -> Judgement:
        result = guard.scan(text)
        rules = ", ".join(sorted({finding.rule for finding in result.findings}))
        return Judgement(float(bool(result.findings)), rules, result.text if result.findings else None)

    return judge
