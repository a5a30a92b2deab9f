"""One prompt, many times, at temperature 0, among strangers that come and go: how many different answers are there?"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import gnomon

PROMPT = "Tell me about Richard Feynman."
STRANGERS = [
    "Hi",
    "2 + 2 =",
    "The sundial",
    "List the planets of the solar system, one per line.",
    "Why is the sky blue?",
]


def waves(model: gnomon.Model, *, tokens: int, start: int = 0) -> Iterator[list[tuple[int, ...]]]:
    """Wave after wave of completions: one to thirty-two at once, with strangers of other lengths and temperatures."""
    prompt = model.render(PROMPT)
    wave = start
    while True:
        rng = random.Random(wave)
        company = [
            model.submit(
                rng.choice(STRANGERS) * rng.randint(1, 12),
                {
                    "max_tokens": rng.randint(1, tokens),
                    "temperature": rng.choice([0.0, 0.9]),
                    "seed": rng.randrange(99),
                },
            )
            for _ in range(rng.randint(0, 6))
        ]
        options = {"max_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
        own = [model.submit(prompt, options) for _ in range(rng.choice([1, 2, 3, 5, 8, 13, 21, 32]))]
        yield [tuple(one.collect()[0].token_ids) for one in own]
        for other in company:
            other.collect()
        wave += 1


def count_answers(model: gnomon.Model, *, completions: int, tokens: int) -> Counter[tuple[int, ...]]:
    """Different answers and how often each came, among at least so many completions."""
    found: Counter[tuple[int, ...]] = Counter()
    for answers in waves(model, tokens=tokens):
        found.update(answers)
        if found.total() >= completions:
            return found
    raise AssertionError("waves never end")
