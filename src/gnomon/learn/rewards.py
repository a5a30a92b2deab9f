"""Reward functions: trl's signature, some that come along, and those of a user's own file.

A reward is called as f(prompts=..., completions=..., completion_ids=..., **columns) and gives one number a completion.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gnomon.errors import UsageError

Reward = Callable[..., Sequence[float]]
Text = str | Sequence[dict[str, str]]
MAKERS: dict[str, Callable[[str], Reward]] = {}


def reward(name: str) -> Callable[[Callable[[str], Reward]], Callable[[str], Reward]]:
    """Register a maker: `name:ARGUMENT` on the command line calls it with the argument's text."""

    def register(maker: Callable[[str], Reward]) -> Callable[[str], Reward]:
        MAKERS[name] = maker
        return maker

    return register


def text_of(completion: Text) -> str:
    """A completion's words: a string, or the last message of a conversation."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _each(score: Callable[[str], float], name: str) -> Reward:
    def function(completions: Sequence[Text], **_: Any) -> list[float]:
        return [score(text_of(completion)) for completion in completions]

    function.__name__ = name
    return function


@reward("length")
def length(target: str) -> Reward:
    """1 at this many characters, falling evenly to 0 at none and at twice as many."""
    if not target.isdigit() or int(target) < 1:
        raise UsageError(f"The reward `length` takes a number of characters, not `{target}`.", param="reward")
    wanted = int(target)
    return _each(lambda text: max(0.0, 1 - abs(len(text) - wanted) / wanted), f"length:{target}")


@reward("share")
def share(characters: str) -> Reward:
    """The share of a completion's characters that are among these."""
    if not characters:
        raise UsageError("The reward `share` takes the characters to count.", param="reward")
    return _each(lambda text: sum(c in characters for c in text) / max(1, len(text)), f"share:{characters}")


@reward("regex")
def regex(pattern: str) -> Reward:
    """1 where the pattern is found."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(
            f"The reward's pattern `{pattern}` is no regular expression: {error}.", param="reward"
        ) from None
    return _each(lambda text: float(bool(compiled.search(text))), f"regex:{pattern}")


@reward("json")
def valid_json(_: str) -> Reward:
    """1 where the completion is valid JSON."""

    def score(text: str) -> float:
        try:
            json.loads(text)
        except ValueError:
            return 0.0
        return 1.0

    return _each(score, "json")


def open_reward(spec: str) -> Reward:
    """`NAME[:ARGUMENT]` of a registered reward, or `FILE.py:FUNCTION`. Runs the file's code."""
    name, _, argument = spec.partition(":")
    if name in MAKERS:
        return MAKERS[name](argument)
    if name.endswith(".py"):
        return _from_file(Path(name), argument)
    raise UsageError(
        f"Unknown reward `{name}`.", hint=f"Known: {', '.join(MAKERS)}; or FILE.py:FUNCTION.", param="reward"
    )


def _from_file(path: Path, function: str) -> Reward:
    if not path.is_file():
        raise UsageError(f"There is no file {path} with a reward.", param="reward")
    spec = importlib.util.spec_from_file_location(f"gnomon_reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Reward | None = getattr(module, function, None)
    if not callable(found):
        raise UsageError(f"{path} has no function `{function}`.", hint="Write FILE.py:FUNCTION.", param="reward")
    return found
