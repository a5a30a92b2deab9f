"""The checks behind a schema's mask, in the form that decoding and the search for an end share."""

from __future__ import annotations

from collections.abc import Iterable

from gnomon.grammar.schema.language import Automaton
from gnomon.grammar.schema.reading import Reading, load
from gnomon.grammar.schema.suggesting import rest_of, suggestions
from gnomon.grammar.schema.validators import Validators


class SchemaChecks:
    """Values are judged when they close, the whole when it ends."""

    def __init__(self, validators: Validators) -> None:
        self.validators = validators

    def begin(self) -> Reading:
        return Reading(self.validators)

    def read(self, place: Reading, text: bytes) -> Reading | None:
        after = place.push(text)
        return None if after.fault else after

    def suggest(self, place: Reading, text: bytes) -> Iterable[bytes]:
        return suggestions(place, text)

    def may_end(self, place: Reading, text: bytes) -> bool:
        try:
            return self.validators.accepts(load(text))
        except (ValueError, RecursionError):
            return False


class PatternHints:
    """A pattern that the mask says as a whole; its automaton shows the shortest way to an end."""

    def __init__(self, automaton: Automaton) -> None:
        self.automaton = automaton

    def begin(self) -> bool:
        return True

    def read(self, place: bool, text: bytes) -> bool | None:
        return place

    def suggest(self, place: bool, text: bytes) -> Iterable[bytes]:
        try:
            rest = rest_of(self.automaton, text.decode())
        except UnicodeDecodeError:
            return ()
        return (rest.encode(),) if rest else ()

    def may_end(self, place: bool, text: bytes) -> bool:
        return True
