"""A scanner that thinks until it may say no, for tests of what a late verdict does to text that was shown."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from gnomon.guard import Judgement, scanner
from gnomon.guard import scanning as registry


class Late(NamedTuple):
    """looked: it has seen the word. go: it may say so."""

    name: str
    looked: threading.Event
    go: threading.Event


@contextmanager
def late_scanner(word: str, score: float = 1.0) -> Iterator[Late]:
    """Registered as `t_late` within the block: it gives text with this word this score, once `go` is set."""
    late = Late("t_late", threading.Event(), threading.Event())

    @scanner(late.name, about="Thinks until it may say.")
    def judge(text: str, *, prompt: str = "") -> Judgement:
        if word not in text:
            return Judgement(0.0)
        late.looked.set()
        late.go.wait(60)
        return Judgement(score)

    try:
        yield late
    finally:
        late.go.set()
        del registry._known[late.name]
