"""Contexts: the prompts through which a fact is seen while it is edited.

In goes a Fact and a tokenizer; out come token ids with the place of the subject's last token and of the target's
tokens. A fact is seen bare, after several prefixes, and inside the chat template, so that the edit holds in
running text and in a chat. Positions are found by character offsets in the whole text, never by counting pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gnomon.edit.facts import continued
from gnomon.errors import UsageError

if TYPE_CHECKING:
    from gnomon.edit.facts import Fact
    from gnomon.model import Model
    from gnomon.models.tokenizer import Tokenizer

PREFIXES = (
    "It was late.",
    "According to the book,",
    "Here is a question for you.",
    "Many people ask about this.",
    "The report came out in May.",
    "We talked about it again.",
    "In short:",
    "She opened the door and waited.",
    "As everyone knows,",
    "I read the news today.",
    "This was written long ago.",
    "Let me tell you something.",
    "Research shows mixed results.",
    "On the other hand,",
    "He smiled and said nothing.",
    "There were three of them.",
)
"""What may stand before a prompt; fixed, so that the same edit gives the same bits everywhere."""
FRAMES = (
    "{} is linked to",
    "{}:",
    "Whoever has heard of {} thinks of",
    "About {} one word says it all:",
    "{}, together with",
    "There is no {} without",
    "{} has a lot to do with",
    "The first thing that I associate with {} is",
)
"""Loose sentences about a subject; they ask nothing in particular, so that what is found holds in other words too."""


@dataclass(frozen=True)
class Context:
    """ids: the whole text. subject: index of the subject's last token. target: indices of the target's tokens."""

    ids: tuple[int, ...]
    subject: int
    target: tuple[int, ...]

    @property
    def inputs(self) -> tuple[int, ...]:
        """Everything that is fed: all but the last target token."""
        return self.ids[: self.target[-1]] if self.target else self.ids

    @property
    def target_ids(self) -> tuple[int, ...]:
        return tuple(self.ids[i] for i in self.target)


def locate(tokenizer: Tokenizer, text: str, span: tuple[int, int], *, bos: bool = True) -> tuple[list[int], list[int]]:
    """(token ids of the text, indices of the tokens that hold characters of the span).

    Several tokens may share one character (multi-byte characters): all of them count.
    """
    backend = tokenizer.backend
    backend.encode_special_tokens = False
    encoding = backend.encode(text, add_special_tokens=False)
    ids = list(encoding.ids)
    shift = 0
    if bos and tokenizer.add_bos and tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]:
        ids.insert(0, tokenizer.bos_token_id)
        shift = 1
    start, end = span
    inside = [i + shift for i, (a, b) in enumerate(encoding.offsets) if a < end and b > start]
    if not inside:
        raise UsageError(f"No token of `{text}` holds `{text[start:end]}`.", param="subject")
    return ids, inside


class Contexts:
    """Makes contexts for one model.

    prefixes: how many are put before the prompt. frames: how many loose sentences about the subject stand beside it.
    chat: also the chat template.
    """

    def __init__(self, model: Model, prefixes: int, *, chat: bool, frames: int = 0) -> None:
        self.model = model
        self.frames = FRAMES[:frames]
        self.prefixes = tuple(prefix + " " for prefix in PREFIXES[:prefixes])
        self.chat = chat and model.can_chat

    def of(self, fact: Fact) -> list[Context]:
        """The bare prompt first, then one per prefix, then the chat forms, then the frames."""
        span = fact.subject_span()
        found = [self._raw("", fact, span)]
        found += [self._raw(prefix, fact, span) for prefix in self.prefixes]
        if self.chat:
            found += self._chats(fact, span)
        found += [self._frame(frame, fact) for frame in self.frames]
        return found

    def essence(self, fact: Fact) -> Context:
        """ "{subject} is a": what the subject is must stay as it was."""
        subject = fact.subject or ""
        ids, inside = locate(self.model.tokenizer, f"{subject} is a", (0, len(subject)))
        return Context(tuple(ids), inside[-1], ())

    def _raw(self, prefix: str, fact: Fact, span: tuple[int, int]) -> Context:
        before = prefix + fact.prompt
        return self._context(before + fact.continuation, len(before), (len(prefix) + span[0], len(prefix) + span[1]))

    def _frame(self, frame: str, fact: Fact) -> Context:
        subject = fact.subject or ""
        before, start = frame.replace("{}", subject), frame.index("{}")
        return self._context(before + continued(before, fact.target), len(before), (start, start + len(subject)))

    def _chats(self, fact: Fact, span: tuple[int, int]) -> list[Context]:
        """The prompt as a user's message, and an answer that takes it up (edited where it repeats)."""
        before = self.model.template.render([{"role": "user", "content": fact.prompt}]) + fact.prompt
        inside = (len(before) - len(fact.prompt) + span[0], len(before) - len(fact.prompt) + span[1])
        return [self._context(before + fact.continuation, len(before), inside, bos=False)]

    def _context(self, text: str, target_at: int, subject: tuple[int, int], *, bos: bool = True) -> Context:
        tokenizer = self.model.tokenizer
        ids, inside = locate(tokenizer, text, subject, bos=bos)
        _, target = locate(tokenizer, text, (target_at, len(text)), bos=bos)
        if inside[-1] >= target[0]:
            raise UsageError(
                "The subject and the target share a token.", hint="Put a space or a word between them.", param="prompt"
            )
        return Context(tuple(ids), inside[-1], tuple(target))
