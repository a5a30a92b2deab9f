"""select(): the model's probability of each of some texts, over every way in which tokens can spell it.

The probability of a text is the sum over all token sequences whose bytes begin with it, and in which no shorter
beginning does already. Each sequence costs a forward pass; those whose probability falls below `least` are left out,
and what they could add at most is reported. Knows no masks: these are the model's own probabilities.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from gnomon.errors import GrammarError

if TYPE_CHECKING:
    from torch import Tensor

    from gnomon.model import Model
    from gnomon.models.tokenizer import Tokenizer

MOST_OPTIONS = 1000


@dataclass(frozen=True)
class Selection:
    """text: the most probable option. probabilities: of each, their sum 1. mass: what the model itself gave each.

    unseen: at most so much mass could be missing in each.
    """

    text: str
    probabilities: Mapping[str, float]
    mass: Mapping[str, float]
    unseen: Mapping[str, float]

    def __str__(self) -> str:
        return self.text


def select(
    model: Model,
    prompt: str | Sequence[int] | Sequence[Mapping[str, Any]],
    options: Sequence[str],
    *,
    until: str | None = None,
    least: float = 1e-7,
) -> Selection:
    """Which of the options the model continues the prompt with, and how probable each is.

    prompt: text, token ids, or the messages of a conversation. until: what must follow an option for it to count, None:
    the end of the text; "": anything. least: probability below which a spelling is left out.
    Raises GrammarError for options that are no choice: none, repeated, or (with until="") one the beginning of another.
    """
    wanted = _checked(options, until)
    ids = model.render(prompt) if _is_chat(prompt) else model.encode(prompt)  # type: ignore[arg-type]
    summing = _Summing(model, list(ids), least)
    mass, unseen = {}, {}
    for option in options:
        mass[option], unseen[option] = summing.text(wanted[option], ended=until is None)
    total = math.fsum(mass.values())
    if total <= 0:
        raise GrammarError(f"The model gives each option less than {least:g}.", hint="Lower `least`.", param="least")
    probabilities = {option: value / total for option, value in mass.items()}
    return Selection(max(options, key=lambda option: mass[option]), probabilities, mass, unseen)


def _checked(options: Sequence[str], until: str | None) -> dict[str, bytes]:
    if isinstance(options, str) or not options or not all(isinstance(option, str) and option for option in options):
        raise GrammarError("`options` is a list of one or more texts, none of them empty.", param="options")
    if len(set(options)) != len(options) or len(options) > MOST_OPTIONS:
        raise GrammarError(f"`options` are different texts, at most {MOST_OPTIONS}.", param="options")
    wanted = {option: (option + (until or "")).encode() for option in options}
    if until is not None:
        ordered = sorted(wanted.items(), key=lambda item: item[1])
        for (first, start), (second, longer) in pairwise(ordered):
            if longer.startswith(start):
                raise GrammarError(
                    f"{first!r} is the beginning of {second!r}: they cannot be told apart.",
                    hint="Say what follows an option (until=), or until=None for the end of the text.",
                    param="options",
                )
    return wanted


def _is_chat(prompt: object) -> bool:
    return (
        isinstance(prompt, Sequence) and not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], Mapping)
    )


class _Summing:
    """One prompt; rows of probabilities are kept by the tokens that led there."""

    def __init__(self, model: Model, ids: list[int], least: float) -> None:
        self.model = model
        self.ids = ids
        self.least = least
        self.spelling = spelling_of(model.tokenizer)
        self.ends = sorted(model.tokenizer.eos_token_ids)
        self.rows: dict[tuple[int, ...], Tensor] = {}

    def text(self, wanted: bytes, *, ended: bool) -> tuple[float, float]:
        """(its probability, at most so much more)."""
        found, missed = [], []
        stack: list[tuple[tuple[int, ...], bytes, float]] = [((), wanted, 1.0)]
        while stack:
            path, left, probability = stack.pop()
            if probability < self.least:
                missed.append(probability)
            elif not left:
                found.append(probability * float(self._row(path, b"")[self.ends].sum()) if ended else probability)
            else:
                row = self._row(path, left)
                for token, size in self.spelling.beginnings(left):
                    stack.append(((*path, token), left[size:], probability * float(row[token])))
                if not ended:
                    beyond = self.spelling.beyond(left)
                    found.append(probability * float(row[beyond].sum()) if beyond else 0.0)
        return math.fsum(found), math.fsum(missed)

    def _row(self, path: tuple[int, ...], left: bytes) -> Tensor:
        """[V]: next-token probabilities after a path. Together with those of the likeliest spelling of what is left."""
        if path not in self.rows:
            ahead = [*path, *self.spelling.greedy(left)]
            logits_TV = self.model.logits(self.ids + ahead)[len(self.ids) - 1 + len(path) :]
            for place, row_V in enumerate(logits_TV.double().softmax(-1)):
                self.rows.setdefault(tuple(ahead[: len(path) + place]), row_V)
        return self.rows[path]


class Spelling:
    """A vocabulary's tokens by their bytes; control tokens spell nothing."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        control = tokenizer.special_ids | tokenizer.eos_token_ids
        pairs = [(tokenizer.token_bytes(i), i) for i in range(tokenizer.vocab_size) if i not in control]
        self.sorted = sorted(pair for pair in pairs if pair[0])
        self.by_bytes: dict[bytes, list[int]] = {}
        for spelled, token in self.sorted:
            self.by_bytes.setdefault(spelled, []).append(token)
        self._bytes = {token: spelled for spelled, token in self.sorted}
        self.longest = max(map(len, self.by_bytes), default=0)

    def bytes_of(self, token: int) -> bytes:
        return self._bytes.get(token, b"")

    def beginnings(self, text: bytes) -> list[tuple[int, int]]:
        """(token, its length) for each token that the text begins with, or is."""
        lengths = range(1, min(len(text), self.longest) + 1)
        return [(token, size) for size in lengths for token in self.by_bytes.get(text[:size], ())]

    def beyond(self, text: bytes) -> list[int]:
        """Tokens that begin with the whole text and go on."""
        found, place = [], bisect_left(self.sorted, (text, -1))
        while place < len(self.sorted) and self.sorted[place][0].startswith(text):
            if self.sorted[place][0] != text:
                found.append(self.sorted[place][1])
            place += 1
        return found

    def greedy(self, text: bytes) -> list[int]:
        tokens = []
        while text and (fitting := self.beginnings(text)):
            token, size = fitting[-1]
            tokens.append(token)
            text = text[size:]
        return tokens


@lru_cache(maxsize=4)
def _spelling(key: str, tokenizer: Tokenizer) -> Spelling:
    return Spelling(tokenizer)


def spelling_of(tokenizer: Tokenizer) -> Spelling:
    return _spelling(f"{tokenizer.sha256}/{tokenizer.vocab_size}", tokenizer)
