"""Stop strings as a StreamStage: text is released up to the earliest place where a stop string may still begin.

The result depends on the text alone, never on how it was split: reading character by character, the stop string that
completes first ends the text where it began; of two that complete at once, the longer. Knows nothing of tokens.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from gnomon.stages import Released, StageContext

MOST_STOPS = 16
LONGEST_STOP = 1000


class StopOptions(BaseModel):
    """Stop strings: one or a list."""

    model_config = ConfigDict(extra="forbid")

    stop: Annotated[list[str], Field(description="End the text before this string (may be given several times).")] = []

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _usable(cls, value: list[str]) -> list[str]:
        if len(value) > MOST_STOPS:
            raise ValueError(f"at most {MOST_STOPS} stop strings")
        if any(not text for text in value):
            raise ValueError("a stop string may not be empty")
        if any(len(text) > LONGEST_STOP for text in value):
            raise ValueError(f"a stop string may have at most {LONGEST_STOP} characters")
        return value


class StopStage:
    """Holds back only what could be the beginning of a stop string."""

    def __init__(self, stops: list[str]) -> None:
        self.stops = sorted(stops, key=len)
        self.held = ""
        self.released = 0

    def push(self, text: str) -> Released:
        self.held += text
        if matches := self._matches():
            place = min(matches)[1]
            out, self.held = self.held[:place], ""
            return Released(out, cut=self.released + place)
        keep = self._open_tail()
        out, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        self.released += len(out)
        return Released(out)

    def finish(self) -> Released:
        out, self.held = self.held, ""
        self.released += len(out)
        return Released(out)

    def _matches(self) -> list[tuple[int, int]]:
        """(end, begin) of each stop string's first occurrence in the held text."""
        return [(place + len(stop), place) for stop in self.stops if (place := self.held.find(stop)) >= 0]

    def _open_tail(self) -> int:
        """Length of the longest suffix of the held text that begins a stop string."""
        longest = 0
        for stop in self.stops:
            for size in range(min(len(stop) - 1, len(self.held)), longest, -1):
                if self.held.endswith(stop[:size]):
                    longest = size
                    break
        return longest


def build(options: StopOptions, context: StageContext) -> StopStage | None:
    return StopStage(options.stop) if options.stop else None
