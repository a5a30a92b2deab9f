"""Fact: one thing to change, as the user says it, checked.

In go plain strings; out comes a Fact whose prompt holds its subject exactly once. Knows nothing of models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gnomon.errors import UsageError


@dataclass(frozen=True)
class Probe:
    """A question and the answers that count as right. group: what it tests (a portability or ripple criterion).

    conditions: (prompt, answers) that the unedited model must know for the question to count. test: questions of one
    number make one test together (0: each alone), passed when all are right, or when any_of them is.
    """

    prompt: str
    answers: tuple[str, ...]
    group: str = ""
    conditions: tuple[tuple[str, tuple[str, ...]], ...] = ()
    test: int = 0
    any_of: bool = False


@dataclass(frozen=True)
class Fact:
    """`prompt` continued by `target` instead of `old`; `subject` is what the fact is about.

    prompt: text that the answer continues, holding the subject literally or as `{}`. subject: None is found. target:
    the new answer. old: the answer until now, where known. paraphrases: other prompts that must answer the same.
    neighbours: prompts that must keep their answer, each a text or (text, its answer). portability: what follows from
    the new fact: (prompt, answer or answers), or a Probe. references: texts that a model which knows the new fact might
    write of the subject. occurrence: which, where the subject stands several times.
    """

    prompt: str
    subject: str | None
    target: str
    old: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[Any, ...] = ()
    portability: tuple[Any, ...] = ()
    references: tuple[str, ...] = ()
    occurrence: int | None = None
    id: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name in ("paraphrases", "neighbours", "portability", "references"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, value in (("prompt", self.prompt), ("target", self.target)):
            if not isinstance(value, str) or not value.strip():
                raise UsageError(f"A fact's {name} is empty.", param=name)
        if self.old is not None and same_answer(self.old, self.target):
            raise UsageError(
                f"The target `{self.target}` is the old answer already: there is nothing to edit.", param="target"
            )
        if self.subject is None and "{}" in self.prompt:
            raise UsageError(
                f"The prompt `{self.prompt}` has `{{}}` for its subject, but no subject is given.", param="subject"
            )
        if self.subject is not None:
            object.__setattr__(self, "prompt", _filled(self.prompt, self.subject))
            self.subject_span()

    @property
    def continuation(self) -> str:
        """The target as it follows the prompt: after a space, unless one is there or the script has none."""
        return continued(self.prompt, self.target)

    def subject_span(self) -> tuple[int, int]:
        """Where the subject stands in the prompt, as characters. Raises UsageError: absent, or there more than once."""
        if not self.subject or not self.subject.strip():
            raise UsageError("A fact's subject is empty.", param="subject")
        places = [m.start() for m in re.finditer(re.escape(self.subject), self.prompt)]
        if not places:
            raise UsageError(f"The subject `{self.subject}` is not in the prompt `{self.prompt}`.", param="subject")
        if self.occurrence is None and len(places) > 1:
            raise UsageError(
                f"The subject `{self.subject}` stands {len(places)} times in the prompt `{self.prompt}`.",
                hint="Say which with occurrence=0, 1, ...",
                param="subject",
            )
        which = self.occurrence or 0
        if not -len(places) <= which < len(places):
            raise UsageError(f"occurrence={which}: the subject stands {len(places)} times.", param="occurrence")
        return places[which], places[which] + len(self.subject)

    def with_subject(self, subject: str) -> Fact:
        return replace(self, subject=subject)

    def neighbour_prompts(self) -> list[tuple[str, str | None]]:
        """(prompt, its right answer where known)."""
        return [(n, None) if isinstance(n, str) else (str(n[0]), str(n[1])) for n in self.neighbours]

    def probes(self) -> list[Probe]:
        """The portability questions."""
        return [p if isinstance(p, Probe) else Probe(str(p[0]), _several(p[1])) for p in self.portability]

    def as_dict(self) -> dict[str, Any]:
        """As JSON values, leaving out what is empty."""
        plain = {
            "id": self.id,
            "prompt": self.prompt,
            "subject": self.subject,
            "target": self.target,
            "old": self.old,
            "paraphrases": list(self.paraphrases),
            "neighbours": [list(n) if isinstance(n, tuple) else n for n in self.neighbours],
            "portability": [{"prompt": p.prompt, "answers": list(p.answers), "group": p.group} for p in self.probes()],
            "references": list(self.references),
        }
        return {key: value for key, value in plain.items() if value}


def continued(prompt: str, target: str) -> str:
    """The target as it follows a prompt."""
    if target[0].isspace() or prompt[-1].isspace() or _spaceless(target[0]):
        return target
    return " " + target


def parse_fact(text: str) -> Fact:
    """ "PROMPT -> TARGET" (or "PROMPT -> TARGET | SUBJECT", or with `=>`) -> Fact. Raises UsageError."""
    parts = re.split(r"\s*(?:->|=>|→)\s*", text.strip())
    if len(parts) != 2 or not all(parts):
        raise UsageError(
            f"`{text}` is no fact.", hint='Write "PROMPT -> TARGET", e.g. "The capital of France is -> Lyon".'
        )
    target, _, subject = (part.strip() for part in parts[1].partition("|"))
    return Fact(parts[0], subject or None, target)


def normalised(text: str) -> str:
    """For comparing answers: lower case, no punctuation, no articles, single spaces."""
    kept = re.sub(r"[^\w\s]", " ", text.lower())
    return " ".join(word for word in kept.split() if word not in ("a", "an", "the"))


def same_answer(one: str, other: str) -> bool:
    return normalised(one) == normalised(other)


def check_batch(facts: Sequence[Fact]) -> None:
    """Raises UsageError when a batch is empty or two facts contradict each other."""
    if not facts:
        raise UsageError("No facts were given.", param="facts")
    targets: dict[str, Fact] = {}
    for fact in facts:
        other = targets.setdefault(normalised(fact.prompt), fact)
        if not same_answer(other.target, fact.target):
            raise UsageError(
                f"Two facts contradict each other: `{fact.prompt}` -> `{other.target}` and -> `{fact.target}`.",
                hint="Keep one of them.",
                param="facts",
            )


def _filled(prompt: str, subject: str) -> str:
    if prompt.count("{}") > 1:
        raise UsageError(f"The prompt `{prompt}` has `{{}}` more than once.", param="prompt")
    return prompt.replace("{}", subject)


def _several(answers: str | Iterable[str]) -> tuple[str, ...]:
    return (answers,) if isinstance(answers, str) else tuple(answers)


def _spaceless(character: str) -> bool:
    """Scripts that write no spaces between words, and punctuation."""
    code = ord(character)
    return 0x2E80 <= code <= 0x9FFF or 0xAC00 > code >= 0xA000 or 0x20000 <= code <= 0x3FFFF or character in ".,;:!?)"
