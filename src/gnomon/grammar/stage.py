"""GrammarStage: the mask at each token, the checks behind it, and an end in time. One per request and choice.

It judges each drawn token before it becomes text: a token whose value fails a check is taken back and forbidden at this
place (and the token before it, when nothing else is left there), so a failed text never comes again. It always knows a
way to a complete text that fits the rest of the budget; when the budget is just as long, that way is taken.
Legend: V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gnomon.engine.request import TokenEvent
from gnomon.errors import GrammarError
from gnomon.generation import Outcome, Trace
from gnomon.grammar.closing import NoChecks, complete
from gnomon.grammar.cost import kept_mass
from gnomon.grammar.faithful import MOST_ATTEMPTS, Attempts
from gnomon.grammar.grammar import Grammar, spell
from gnomon.grammar.options import GrammarOptions
from gnomon.grammar.vocabulary import Vocabulary
from gnomon.stages import Ruling, StageContext

if TYPE_CHECKING:
    from torch import Tensor

MOST_FAILURES = 100
"""Failed checks after which the shortest known text is written instead."""
MOST_SEARCH = 4_000
"""States that failing searches for an end may visit for one text; then the way that is known is taken."""
ENDLESS = 1 << 60


class GrammarStage:
    """The state of one text. shortest: a complete text as tokens; None where none is known beforehand."""

    def __init__(
        self,
        grammar: Grammar,
        vocabulary: Vocabulary,
        options: GrammarOptions,
        *,
        max_tokens: int,
        temperature: float,
        shortest: list[int] | None,
    ) -> None:
        self.grammar = grammar
        self.vocabulary = vocabulary
        self.shown = vocabulary.shown
        self.options = options
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.shortest = shortest
        self.matcher = grammar.matcher(vocabulary)
        self.bytes = grammar.byte_matcher()
        self.tokens: list[int] = []
        self.text = b""
        self.lengths: list[int] = []
        self.places: list[Any] = [grammar.checks.begin()]
        self.forbidden: dict[int, set[int]] = {}
        self.mass: list[float] = []
        self.kinds: list[str] = []
        self.way: list[int] | None = shortest
        """Tokens that complete the text from the present place; None: not known here."""
        self.safe = 0
        """Tokens of the text at the last place whose way was known to fit, and that way."""
        self.safe_way: list[int] | None = shortest
        self.following = options.on_length == "close" and shortest is not None and len(shortest) >= max_tokens
        self.looks_ahead = options.on_length == "close" or not isinstance(grammar.checks, NoChecks)
        self.searched = 0
        self.ended = False
        self.cut = False
        self.failures = 0
        self.attempts = Attempts(temperature) if options.faithful else None
        self._allowed_V = np.zeros(0, dtype=np.bool_)
        self.rejected = False
        """Whether the latest token is one that the mask forbids, drawn in an attempt."""
        self.unfaithful = False
        self._cost = (1.0, "free")

    # -- LogitsStage --------------------------------------------------------------------------------------------

    def process(self, logits_V: Tensor, generated: Sequence[int]) -> Tensor:
        """Only what may come next keeps its logit."""
        allowed_V = self._allowed()
        row_V = logits_V.numpy()
        self._cost = self._measure(row_V, allowed_V)
        if self.attempts is None:
            row_V[~allowed_V] = -np.inf
        else:
            self._allowed_V = allowed_V
            self.attempts.weigh(row_V, allowed_V)
        return logits_V

    def accept(self, token_id: int) -> None:
        if self.attempts is not None:
            self.attempts.took(token_id)
            self.rejected = not self._allowed_V[token_id]
        if token_id in self.vocabulary.ends:
            self.ended = True
        elif not self.rejected:
            self.matcher.advance([token_id])
        spelled = b"" if self.ended or self.rejected else bytes(self.vocabulary.engine.decode_bytes([token_id]))
        self.tokens.append(token_id)
        self.lengths.append(len(spelled))
        self.text += spelled
        self.bytes.advance(list(spelled))
        place = self.places[-1]
        self.places.append(None if place is None else self.grammar.checks.read(place, self.text))
        self.mass.append(self._cost[0])
        self.kinds.append(self._cost[1])
        if self.way:
            self.way = self.way[1:] if self.way[0] == token_id else None
        else:
            self.way = None

    def rollback(self, count: int) -> None:
        ends = sum(token in self.vocabulary.ends for token in self.tokens[-count:])
        lost = sum(self.lengths[-count:])
        rejected = self.rejected and not self.ended
        self.matcher.rollback(count - ends - rejected)
        self.rejected = False
        self.bytes.rollback(lost)
        self.text = self.text[: len(self.text) - lost]
        self.ended = False
        for kept in (self.tokens, self.lengths, self.places, self.mass, self.kinds):
            del kept[-count:]
        self.way = self.safe_way if len(self.tokens) == self.safe else None

    def copy(self) -> GrammarStage:
        twin = GrammarStage.__new__(GrammarStage)
        twin.__dict__.update(self.__dict__)
        twin.matcher, twin.bytes = self.matcher.copy(), self.bytes.copy()
        for name in ("tokens", "lengths", "places", "mass", "kinds"):
            setattr(twin, name, list(getattr(self, name)))
        twin.attempts = copy.deepcopy(self.attempts)
        twin.forbidden = {place: set(tokens) for place, tokens in self.forbidden.items()}
        return twin

    def forced(self) -> list[int]:
        """Tokens that come next whatever the model says; the engine computes them in one step."""
        if self.following and self.way:
            return list(self.way)
        if self.ended or self.attempts is not None or self.forbidden.get(len(self.tokens)):
            return []
        return self.matcher.forced()

    # -- TokenGate ----------------------------------------------------------------------------------------------

    def judge(self, event: TokenEvent) -> Ruling:
        """Is what was drawn right, and can it still be completed in time?"""
        if self.attempts is not None:
            return self._attempted(self.attempts, event)
        if event.ends == "stop" and not self.ended:
            self.cut = True  # a stop token of the request's own, wherever the grammar stood
            return Ruling()
        if self._wrong():
            return self._take_back()
        if self.ended:
            return Ruling() if event.ends == "stop" else Ruling(finish="stop")
        if self.matcher.stopped and self._complete():
            return Ruling(finish="length" if self.following else "stop")
        return self._in_time() if self.looks_ahead else Ruling()

    def note(self) -> dict[str, Any]:
        return {"grammar": {"kind": self.kinds[-1], "kept_mass": self.mass[-1]}}

    def outcome(self, text: str, tokens: int, *, cut: bool) -> Outcome:
        """The value of the text as it left (a guard may have changed it), whether it is whole, and what it cost."""
        whole = not cut and not self.cut and self._complete()
        trace = Trace(self.mass[:tokens], self.kinds[:tokens], self.failures)
        unchanged = text == self.text.decode("utf-8", "replace")
        value = self.grammar.parse(text) if whole and (unchanged or self.grammar.accepts(text)) else None
        return Outcome(value, whole, trace, self._warnings(trace))

    def _warnings(self, trace: Trace) -> tuple[str, ...]:
        limit = self.options.warn_below
        low = sum(mass < limit for mass in trace.kept_mass)
        unsure = self.shortest is None and self.options.on_length == "close"
        said: tuple[str, ...] = (
            ("No text of this grammar was known beforehand: that it would be complete in time was not certain.",)
            if unsure
            else ()
        )
        if self.unfaithful:
            said += (f"Not drawn from the model's own distribution: {MOST_ATTEMPTS} attempts gave no valid text.",)
        if not low:
            return said
        return (
            *said,
            f"At {low} of {len(trace.kept_mass)} tokens the grammar kept less than {limit:g} of the model's own "
            "probability: the model wanted to say something else.",
        )

    # -- the mask -----------------------------------------------------------------------------------------------

    def _allowed(self) -> NDArray[np.bool_]:
        """[V]: what may come next, after what has failed and while a way is followed."""
        if self.following and self.way:
            only_V = np.zeros(self.vocabulary.size, dtype=np.bool_)
            only_V[self.way[0]] = True
            return only_V
        allowed_V = self.matcher.allowed()
        for token in self.forbidden.get(len(self.tokens), ()):
            allowed_V[token] = False
        return allowed_V

    def _measure(self, row_V: NDArray[np.float32], allowed_V: NDArray[np.bool_]) -> tuple[float, str]:
        if self.following:
            return kept_mass(row_V, self.matcher.allowed(), self.temperature), "closed"
        kind = "free" if allowed_V[int(row_V.argmax())] else "masked"
        if np.count_nonzero(allowed_V) == 1:
            kind = "forced"
        return kept_mass(row_V, allowed_V, self.temperature), kind

    # -- the checks ---------------------------------------------------------------------------------------------

    def _wrong(self) -> bool:
        return self.places[-1] is None or (self.ended and not self._complete())

    def _complete(self) -> bool:
        place = self.places[-1]
        return self.matcher.accepting and place is not None and self.grammar.checks.may_end(place, self.text)

    def _take_back(self) -> Ruling:
        """The latest token failed: forbid it here; where nothing else is left, the one before, and so on."""
        self.failures += 1
        if self.failures > MOST_FAILURES:
            return self._follow(self.safe, self.safe_way)
        depth = len(self.tokens) - 1
        walk = self.matcher.copy()
        walk.rollback(depth + 1 - self.ended)
        walk.advance(self.tokens[:depth])
        while True:
            forbidden = self.forbidden.setdefault(depth, set())
            forbidden.add(self.tokens[depth])
            allowed_V = walk.allowed()
            allowed_V[list(forbidden)] = False
            if allowed_V.any():
                break
            if depth <= self.safe:
                return self._follow(self.safe, self.safe_way)
            del self.forbidden[depth]
            depth -= 1
            walk.rollback(1)
        self._forget_beyond(depth)
        return Ruling(rollback=len(self.tokens) - depth)

    def _forget_beyond(self, depth: int) -> None:
        for place in [place for place in self.forbidden if place > depth]:
            del self.forbidden[place]

    # -- the model's own distribution ---------------------------------------------------------------------------

    def _attempted(self, attempts: Attempts, event: TokenEvent) -> Ruling:
        """A text that ends, valid, within the limit is taken; whatever else comes begins anew."""
        if event.ends == "stop" and not self.ended:
            self.cut = True
            return Ruling()
        if not self.rejected and not self._wrong():
            if self.ended:
                return Ruling() if event.ends == "stop" else Ruling(finish="stop")
            if len(self.tokens) < self.max_tokens:
                return Ruling(hold=len(self.tokens))
        attempts.fail(dead=not self.rejected)
        self.failures += 1
        if attempts.hopeless:
            self.attempts, self.unfaithful = None, True
        return Ruling(rollback=len(self.tokens))

    # -- an end in time -----------------------------------------------------------------------------------------

    def _in_time(self) -> Ruling:
        """Keep the invariant: at every token of the text a way to a complete one is known that fits what is left."""
        count = len(self.tokens)
        left = self.max_tokens - count if self.options.on_length == "close" else ENDLESS
        if self.way is None:
            self.way = self._look()
        if self.way is None or len(self.way) > left:
            if self.safe_way is None and left:
                return Ruling(hold=count)  # no end was ever known: this place is no worse than the start
            if self.searched > MOST_SEARCH:
                return self._follow(self.safe, self.safe_way)
            return self._take_back()  # from here no end fits: the model may say something else
        self.safe, self.safe_way = count, self.way
        self.following = self.following or len(self.way) == left
        return Ruling(finish="length") if self.following and not self.way else Ruling()

    def _look(self) -> list[int] | None:
        if self.matcher.accepting and self._complete():
            return []
        if self.safe_way is None and self.searched > MOST_SEARCH:
            return None
        found, states = complete(self.bytes, self.text, self.grammar.checks, self.places[-1])
        self.searched += states if found is None else 0
        return None if found is None else spell(self.matcher, found)

    def _follow(self, depth: int, way: list[int] | None) -> Ruling:
        """Go back to a place, and from there straight to the end; where none is known, give up."""
        if way is None:
            self.cut = True
            return Ruling(finish="length")
        self.following, self.safe, self.safe_way = True, depth, way
        self.forbidden.clear()
        back = len(self.tokens) - depth
        if back == 0:
            self.way = way
        return Ruling(rollback=back)


def build(options: GrammarOptions, context: StageContext) -> GrammarStage:
    """Raises GrammarError before any decoding: unsatisfiable, or no complete text fits the token limit."""
    if options.faithful and (context.temperature == 0 or context.filtered):
        raise GrammarError(
            "`faithful` draws from the model's whole distribution: it needs a temperature above 0 and no top_k, top_p "
            "or min_p.",
            param="faithful",
        )
    grammar = options.grammar(context.tokenizer)
    if grammar.unsatisfiable:
        grammar.shortest()  # says why
    shortest = grammar.shortest_tokens(context.tokenizer) if grammar.known_shortest() is not None else None
    if options.on_length == "close" and shortest is not None and context.max_tokens < len(shortest):
        raise GrammarError(
            f"max_tokens is {context.max_tokens}; the shortest text of this grammar has {len(shortest)} tokens: "
            f"{grammar.shortest()[:60]!r}.",
            hint='Raise max_tokens, or say on_length: "cut" to accept an incomplete text.',
            param="max_tokens",
        )
    return GrammarStage(
        grammar,
        grammar.vocabulary(context.tokenizer),
        options,
        max_tokens=context.max_tokens,
        temperature=context.temperature,
        shortest=shortest,
    )
