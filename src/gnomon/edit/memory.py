"""Memory: facts that are kept beside a model and not in its weights, as a value and a small file.

The other way to change what a model says: nothing is trained; a method (`memories/`) looks the question up and puts
what it finds into the prompt. A Memory is JSON of the form that the option `remember` takes. Knows no model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gnomon.edit.facts import Fact
from gnomon.errors import UsageError
from gnomon.models.cache import atomic_write

SUFFIX = ".memory.json"
SCHEMA = "gnomon.memory/1"


@dataclass(frozen=True)
class Memory:
    """facts; method and its options; report: what the model said before and says now."""

    facts: tuple[Fact, ...]
    method: str = "ike"
    options: Mapping[str, Any] = field(default_factory=dict)
    embedder: str = "self"
    report: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def identity(self) -> str:
        """sha256 of what it remembers and how; the report is not part of it."""
        return hashlib.sha256(json.dumps(self.as_options(), sort_keys=True).encode()).hexdigest()

    @property
    def bytes(self) -> int:
        return len(json.dumps(self.as_options()).encode())

    def as_options(self) -> dict[str, Any]:
        """The value of the option `remember`."""
        return {
            "facts": [fact.as_dict() for fact in self.facts],
            "method": self.method,
            "options": dict(self.options),
            "embedder": self.embedder,
        }

    def __add__(self, other: Memory) -> Memory:
        """Both memories' facts, the later ones replacing earlier ones of the same prompt."""
        if (self.method, self.options, self.embedder) != (other.method, other.options, other.embedder):
            raise UsageError("Two memories of different methods or options cannot become one.")
        facts = {fact.prompt: fact for fact in (*self.facts, *other.facts)}
        return Memory(tuple(facts.values()), self.method, self.options, self.embedder)

    def without(self, prompt: str) -> Memory:
        """The memory without the fact of this prompt. Raises UsageError when there is none."""
        left = tuple(fact for fact in self.facts if fact.prompt != prompt)
        if len(left) == len(self.facts):
            raise UsageError(f"Nothing is remembered of `{prompt}`.", param="prompt")
        return Memory(left, self.method, self.options, self.embedder)

    def save(self, path: str | Path) -> Path:
        """Written whole or not at all."""
        path = Path(path)
        content = {"schema": SCHEMA, **self.as_options(), "report": dict(self.report)}
        with atomic_write(path) as out:
            out.write(json.dumps(content, indent=1, ensure_ascii=False).encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> Memory:
        """Raises UsageError for a file that is none."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            schema = content.get("schema")
        except (OSError, UnicodeDecodeError, ValueError, AttributeError) as error:
            raise UsageError(f"{path} cannot be read as a memory: {error}") from None
        if schema != SCHEMA:
            raise UsageError(f"{path} is no memory file: its schema is `{schema}`, not `{SCHEMA}`.")
        facts = remembered_facts(content["facts"])
        return cls(facts, content["method"], content["options"], content["embedder"], content.get("report", {}))


def remembered_facts(given: Sequence[Any]) -> tuple[Fact, ...]:
    """Strings, records or Facts as Facts, checked together."""
    from gnomon.edit.api import as_facts
    from gnomon.edit.facts import check_batch

    facts = as_facts(list(given))
    check_batch(facts)
    return tuple(facts)
