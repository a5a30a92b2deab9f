"""Subject: what a fact is about, found in its prompt.

Names written with capitals come first; where there are several, or none (other scripts, lower case), the model itself
decides: the span without which its next word changes most. In goes a prompt; out comes a part of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from gnomon.errors import UsageError

if TYPE_CHECKING:
    from gnomon.edit.facts import Fact
    from gnomon.model import Model

JOINING = {
    *("of", "the", "and", "de", "da", "del", "der", "den", "des", "di", "du", "la", "le", "van", "von", "for", "in"),
    *("to", "no", "y", "e", "et", "und", "a", "on", "at", "el", "al", "ibn", "bin", "'s"),
}
"""Small words that may stand inside a name."""
OPENING = {
    *("the", "a", "an", "what", "which", "where", "who", "when", "whose", "how", "in", "on", "at", "of", "by", "is"),
    *("was", "are", "does", "did", "do", "it", "its", "he", "she", "they", "his", "her", "their", "that", "this"),
    *("from", "as", "with", "for", "to", "i", "you", "we", "there", "originally", "currently"),
}
"""Words that are capitalised because a sentence begins with them."""
MOST_CANDIDATES = 12


def find_subject(model: Model, prompt: str) -> str:
    """The subject of a prompt. Raises UsageError when nothing can be one."""
    named = names(prompt)
    if len(named) == 1:
        return named[0]
    candidates = named or spans(prompt)
    candidates = [c for c in candidates if prompt.count(c) == 1][:MOST_CANDIDATES]
    if not candidates:
        raise UsageError(
            f"No subject can be found in `{prompt}`.", hint="Give it: `PROMPT -> TARGET | SUBJECT`.", param="subject"
        )
    return most_telling(candidates, lambda text: _next_word(model, text), prompt)


def with_subject(model: Model, fact: Fact) -> Fact:
    """The fact, its subject found where none was given."""
    return fact if fact.subject is not None else fact.with_subject(find_subject(model, fact.prompt))


def names(prompt: str) -> list[str]:
    """Maximal runs of capitalised words (and numbers after them), joined by small words between two of them."""
    words = [(m.group(), m.start(), m.end()) for m in re.finditer(r"[^\s,;:!?()\"]+", prompt)]
    found: list[str] = []
    run: list[tuple[str, int, int]] = []
    pending: list[tuple[str, int, int]] = []

    def close() -> None:
        if run:
            text = prompt[run[0][1] : run[-1][2]]
            found.append(re.sub(r"(?:'s|’s|\.)$", "", text))
        run.clear()
        pending.clear()

    for word, start, end in words:
        gap = prompt[run[-1][2] if run else start : start].strip() if not pending else ""
        if gap:
            close()
        is_name = word[0].isupper() or (bool(run) and word[0].isdigit())
        if is_name and not (not run and word.lower().rstrip("'s") in OPENING):
            run.extend(pending)
            pending.clear()
            run.append((word, start, end))
            if re.search(r"('s|’s|[.])$", word) and len(word) > 3:
                close()
        elif run and word.lower() in JOINING and len(pending) < 2:
            pending.append((word, start, end))
        else:
            close()
    close()
    return list(dict.fromkeys(found))


def spans(prompt: str) -> list[str]:
    """Candidate spans of a prompt without capitals: runs of words, or of characters in scripts without spaces."""
    words = [(m.start(), m.end()) for m in re.finditer(r"\S+", prompt)]
    if len(words) <= 2 and any(ord(c) > 0x2E80 for c in prompt):
        text = prompt.strip()
        return [text[:n] for n in range(2, max(3, len(text) - 1))]
    found = []
    for size in (3, 2, 1):
        for i in range(len(words) - size):
            span = prompt[words[i][0] : words[i + size - 1][1]].strip(",.;:!?")
            edge = span.split()
            if edge and edge[0].lower() not in OPENING | JOINING and edge[-1].lower() not in OPENING | JOINING:
                found.append(span)
    return list(dict.fromkeys(found))


def most_telling(candidates: list[str], next_word: Callable[[str], torch.Tensor], prompt: str) -> str:
    """The candidate without which the distribution of the next word changes most; of equals, the shorter one."""
    whole = next_word(prompt)

    def change(candidate: str) -> float:
        without = " ".join(prompt.replace(candidate, "it").split())
        return float((whole.exp() * (whole - next_word(without))).sum()) - 0.01 * len(candidate.split())

    return max(candidates, key=change)


def _next_word(model: Model, text: str) -> torch.Tensor:
    return torch.log_softmax(model.logits(text)[-1], -1)
