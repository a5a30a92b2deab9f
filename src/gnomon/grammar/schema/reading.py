"""Reads JSON as it grows, and checks each value when it closes against what certainly speaks about it.

A `Reading` never changes: `push` gives the next one, so that a rollback is an assignment. The text is well-formed
already (the mask sees to that); this only follows brackets and strings. Knows bytes, not tokens.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from typing import Any

import jsonschema_rs

from gnomon.grammar.schema.validators import Validators

_UNIQUE = jsonschema_rs.validator_for({"uniqueItems": True}, offline=True)
_SPACE = b" \t\r\n"
_ENDS_SCALAR = b",]} \t\r\n"


@dataclass(frozen=True, slots=True)
class _Frame:
    """An open object or array. here: certain schemas; step: the key or place of the member being read; names: keys
    read so far."""

    parent: _Frame | None
    is_array: bool
    start: int
    here: frozenset[str]
    step: str | int
    names: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read up to `length`.

    mode: "value" or "name" (one is due), "scalar", "string", "key" ("... escape" after a backslash), "after".
    start: of the scalar, string or key being read. fault: why what was read is wrong.
    """

    validators: Validators
    length: int = 0
    mode: str = "value"
    frame: _Frame | None = None
    start: int = 0
    fault: str = ""

    def push(self, text: bytes) -> Reading:
        """text: all of it, of which `length` bytes were read before. Stops at the first fault."""
        reading = self
        while reading.length < len(text) and not reading.fault:
            reading = reading._byte(text, text[reading.length])
        return reading

    def _byte(self, text: bytes, byte: int) -> Reading:
        at = self.length
        on = at + 1
        mode = self.mode
        if mode in ("string", "key"):
            if byte == 0x5C:
                return replace(self, length=on, mode=mode + " escape")
            if byte != 0x22:
                return replace(self, length=on)
            if mode == "string":
                return self._closed(text, self.start, on)
            return self._named(text[self.start : on], on)
        if mode in ("string escape", "key escape"):
            return replace(self, length=on, mode=mode.split()[0])
        if mode == "scalar":
            if byte not in _ENDS_SCALAR:
                return replace(self, length=on)
            closed = self._closed(text, self.start, at)
            return closed if closed.fault else closed._byte(text, byte)
        if byte in _SPACE or byte == 0x3A:
            return replace(self, length=on)
        if byte == 0x2C:
            return self._next_member(on)
        if byte in b"]}":
            return self._leave(text, on)
        if byte in b"[{":
            frame = _Frame(self.frame, byte == 0x5B, at, self.due(), 0)
            return replace(self, length=on, mode="value" if frame.is_array else "name", frame=frame)
        if byte == 0x22:
            return replace(self, length=on, mode="key" if mode == "name" else "string", start=at)
        return replace(self, length=on, mode="scalar", start=at)

    def due(self) -> frozenset[str]:
        """The certain schemas of the value that is due."""
        if self.frame is None:
            return self.validators.root
        return self.validators.below(self.frame.here, self.frame.step)

    def _named(self, raw: bytes, on: int) -> Reading:
        assert self.frame is not None
        name = json.loads(raw)
        fault = self.validators.name_fault(self.frame.here, name)
        fault = "a key comes twice" if name in self.frame.names else fault
        frame = replace(self.frame, step=name, names=self.frame.names | {name})
        return replace(self, length=on, mode="value", frame=frame, fault=fault)

    def _next_member(self, on: int) -> Reading:
        frame = self.frame
        if frame is None or not frame.is_array:
            return replace(self, length=on, mode="name")
        assert isinstance(frame.step, int)
        return replace(self, length=on, mode="value", frame=replace(frame, step=frame.step + 1))

    def _leave(self, text: bytes, on: int) -> Reading:
        frame = self.frame
        if frame is None:
            return replace(self, length=on, fault="a bracket closes nothing")
        return replace(self, frame=frame.parent)._closed(text, frame.start, on)

    def _closed(self, text: bytes, start: int, end: int) -> Reading:
        """The value at [start, end) is complete."""
        fault = ""
        checks = self.due() & self.validators.watched if self.frame is not None else frozenset()
        if checks:
            value = load(text[start:end])
            for pointer in checks:
                validator = self.validators.validator(pointer)
                if validator is not None and not validator.is_valid(value):
                    fault = f"the value at {pointer} is not valid"
        frame = self.frame
        unique = frame is not None and frame.is_array and bool(frame.here & self.validators.monotone)
        if unique and frame is not None and not _UNIQUE.is_valid(load(text[frame.start : end] + b"]")):
            fault = "an item comes twice"
        return replace(self, length=end, mode="after", fault=fault)


def load(raw: bytes | str) -> Any:
    """A JSON value, with numbers beyond floating point kept exact. Raises ValueError, also for a repeated key."""
    return json.loads(raw, object_pairs_hook=_unique, parse_float=_number, parse_constant=_refuse)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key comes twice")
    return made


def _number(text: str) -> float | Decimal:
    value = float(text)
    if math.isfinite(value):
        return value
    try:
        return Decimal(text)
    except InvalidOperation:
        raise ValueError(f"the number {text[:40]} is beyond reach") from None


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
