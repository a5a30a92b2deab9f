"""The checks behind a schema's mask, in the form that decoding and the search for an end share."""

from __future__ import annotations

from gnomon.grammar.schema.reading import Reading, load
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

    def may_end(self, place: Reading, text: bytes) -> bool:
        try:
            return self.validators.accepts(load(text))
        except (ValueError, RecursionError):
            return False
