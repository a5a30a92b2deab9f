"""Stop strings: nothing of them leaves, whatever the split."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gnomon.capability import Origin
from gnomon.errors import UsageError
from gnomon.registry import Registry
from gnomon.sampling.stop import StopStage

texts = st.text(alphabet="ab\n", max_size=30)
stops = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=3)


def feed(pieces: list[str], stop_strings: list[str]) -> tuple[str, int | None]:
    stage, out = StopStage(stop_strings), ""
    for piece in pieces:
        released = stage.push(piece)
        out += released.text
        if released.cut is not None:
            return out, released.cut
    return out + stage.finish().text, None


def by_definition(text: str, stop_strings: list[str]) -> tuple[str, int | None]:
    """Read character by character; the first completed stop string cuts where it began, the longest if several."""
    for end in range(len(text) + 1):
        hits = [end - len(stop) for stop in stop_strings if text[:end].endswith(stop)]
        if hits:
            return text[: min(hits)], min(hits)
    return text, None


@given(texts, stops, st.lists(st.integers(0, 30), max_size=6))
def test_any_split_gives_what_the_definition_gives(text: str, stop_strings: list[str], cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[a:b] for a, b in pairwise(edges)]
    assert feed(pieces, stop_strings) == by_definition(text, stop_strings)
    assert feed(list(text), stop_strings) == by_definition(text, stop_strings)


def test_only_what_may_begin_a_stop_string_is_held() -> None:
    stage = StopStage(["STOP"])
    assert stage.push("go on ST").text == "go on "
    assert stage.push("ILL").text == "STILL"


@pytest.mark.parametrize(
    ("value", "says"), [([""], "empty"), (["x"] * 17, "at most 16"), (["y" * 2000], "1000"), (5, "stop")]
)
def test_unusable_stop_strings_are_refused(value: object, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Registry.installed().parse({"stop": value}, Origin.PYTHON)
