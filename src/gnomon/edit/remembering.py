"""How memories join generation: the option `remember`, a prompt stage that looks each question up before it is asked.

Only what a user says is rewritten (a raw prompt, a user's message). Methods are registered here by name, one file each
under `memories/`; their options are pydantic models. Embeddings come from a sentence-embedding model, or from the model
itself (`embedder: self`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gnomon.capability import OPERATOR_ONLY
from gnomon.edit.memory import Memory, remembered_facts
from gnomon.edit.named import Named, NamedTable, first_line
from gnomon.stages import StageContext

if TYPE_CHECKING:
    from gnomon.edit.facts import Fact
    from gnomon.edit.retriever import Embed

BUILT_IN = ("ike", "serac", "retrieve", "memprompt")
EMBEDDER = "minilm-l6-v2"
MOST_FACTS = 10_000
KEPT = 16
"""Memories whose vectors are kept."""


class Rewriter(Protocol):
    """What a memory method makes of a question."""

    def rewrite(self, text: str) -> str: ...


@dataclass(frozen=True)
class MemoryMethod(Named):
    """One registered way of remembering. make(facts, options, embed) -> Rewriter."""

    make: Callable[[Sequence[Fact], Any, Embed], Rewriter]


_TABLE = NamedTable[MemoryMethod](
    "way of remembering",
    [f"gnomon.edit.memories.{name}" for name in BUILT_IN],
    group="gnomon.edit_memories",
    param="remember.method",
)


def memory_method(
    name: str, options: type[BaseModel], *, paper: str, experimental: bool = False
) -> Callable[[type[Any]], type[Any]]:
    """Register a class `Method(facts, options, embed)` with `rewrite(text)`; its docstring's first line is the help."""

    def register(cls: type[Any]) -> type[Any]:
        _TABLE.add(MemoryMethod(name, first_line(cls), paper, options, experimental, cls))
        return cls

    return register


def memory_methods() -> dict[str, MemoryMethod]:
    """All ways of remembering, by name; imports their files."""
    return _TABLE.all()


def method_of_memory(name: str) -> MemoryMethod:
    """Raises UsageError with the nearest name."""
    return _TABLE.named(name)


class RememberOptions(BaseModel):
    """Facts to remember, and how; a memory file holds the same."""

    model_config = ConfigDict(extra="forbid")

    facts: Annotated[
        list[str | dict[str, Any]],
        Field(min_length=1, max_length=MOST_FACTS, description='"PROMPT -> TARGET", or records.'),
    ]
    method: Annotated[str, Field(description="ike, serac, retrieve or memprompt.")] = "ike"
    options: Annotated[dict[str, Any], Field(description="Options of the method.")] = {}
    embedder: Annotated[
        str, OPERATOR_ONLY, Field(description="Embedding model that looks facts up; `self`: the model itself.")
    ] = EMBEDDER

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """A fact, or a list of them, stands for {facts: [...]}; a memory file's own marks are left out."""
        if isinstance(value, str):
            return {"facts": [value]}
        if isinstance(value, Mapping):
            return {key: item for key, item in value.items() if key not in ("schema", "report")}
        return {"facts": value} if isinstance(value, list) else value


class RememberStage:
    """Rewrites what the user says."""

    roles = frozenset({"user"})

    def __init__(self, rewriter: Rewriter) -> None:
        self.rewriter = rewriter

    def check(self, text: str) -> str:
        return self.rewriter.rewrite(text) if text.strip() else text


_BUILDING = threading.Lock()
_REWRITERS: weakref.WeakKeyDictionary[Any, dict[str, Rewriter]] = weakref.WeakKeyDictionary()
"""By model, then by memory."""


def build(options: RememberOptions, context: StageContext) -> RememberStage:
    """The prompt stage. The facts' vectors are made once per memory and model."""
    chosen = method_of_memory(options.method)
    parsed = chosen.parse(options.options)
    facts = remembered_facts(options.facts)
    model = context.host
    memory = Memory(facts, options.method, options.options, options.embedder)
    with _BUILDING:
        known = _REWRITERS.setdefault(model.unpatched, {})
        if memory.identity not in known:
            while len(known) >= KEPT:
                known.pop(next(iter(known)))
            known[memory.identity] = chosen.make(facts, parsed, _embedder(options.embedder, context))
        return RememberStage(known[memory.identity])


def _embedder(name: str, context: StageContext) -> Embed:
    model = context.host.unpatched if name == "self" else context.open_model(name)

    def embed(texts: Sequence[str]) -> Any:
        return model.embed(list(texts))

    return embed
