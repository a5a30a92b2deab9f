"""One walk through a grammar: which tokens may come next, and what is forced. A thin, checked hold of llguidance.

Never allows a control token that is not an end, nor a row of the logits that the tokenizer does not name. Knows masks,
not logits, and nothing of JSON. Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher, LLParserLimits
from numpy.typing import NDArray

from gnomon.errors import EngineFailure, GrammarError
from gnomon.grammar.vocabulary import Vocabulary

LIMITS = LLParserLimits(
    max_grammar_size=500_000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    max_lexer_states=50_000,
    max_items_in_row=20_000,
    verbose_errors=False,
)


class Matcher:
    """The state after some tokens. Raises GrammarError when the engine refuses the grammar."""

    def __init__(self, vocabulary: Vocabulary, grammar: str, _state: LLMatcher | None = None) -> None:
        self.vocabulary = vocabulary
        self.grammar = grammar
        self._state = _state or LLMatcher(vocabulary.engine, grammar, log_level=0, limits=LIMITS)
        if self._state.is_error():
            raise GrammarError(first_line(self._state.get_error()))
        self._bits = np.zeros((vocabulary.size + 31) // 32, dtype=np.int32)

    def copy(self) -> Matcher:
        return Matcher(self.vocabulary, self.grammar, self._state.deep_copy())

    def allowed(self) -> NDArray[np.bool_]:
        """[V]: the tokens that may come next."""
        self._state.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        allowed_V = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: self.vocabulary.size].view(np.bool_)
        allowed_V &= self.vocabulary.writable_V
        return allowed_V

    def forced(self) -> list[int]:
        """Tokens that come next whatever the model says, in their canonical spelling; may be empty."""
        return list(self._state.compute_ff_tokens())

    def forced_bytes(self) -> bytes:
        return bytes(self._state.compute_ff_bytes())

    def accept(self, token_id: int) -> bool:
        """Go on by one token; False (and no change) when the grammar does not allow it."""
        if self._state.validate_tokens([token_id]) != 1:
            return False
        return bool(self._state.consume_token(token_id)) and not self._state.is_error()

    def advance(self, tokens: Sequence[int]) -> int:
        """Go on by as many of the tokens as the grammar allows -> how many."""
        return int(self._state.try_consume_tokens(list(tokens)))

    def rollback(self, count: int) -> None:
        if count and not self._state.rollback(count):
            raise EngineFailure(f"The grammar cannot go back {count} tokens.")

    @property
    def accepting(self) -> bool:
        """Whether the text may end here."""
        return bool(self._state.is_accepting())

    @property
    def stopped(self) -> bool:
        """Whether nothing but an end may follow."""
        return bool(self._state.is_stopped())

    def _check(self) -> None:
        if self._state.is_error():
            raise GrammarError(f"The grammar became too complex here: {first_line(self._state.get_error())}")


def first_line(message: str) -> str:
    """The engine's own words, without the dump behind them."""
    text = message.strip().splitlines()[0] if message.strip() else "unknown error"
    return text if len(text) < 300 else text[:297] + "..."
