"""The byte core's lattice against brute force on a toy vocabulary: every cover enumerated."""

from __future__ import annotations

import hashlib
import itertools
import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gnomon.ensemble.lattice import STOP, Lattice
from gnomon.ensemble.scoring import bits, fitting_weights, mixed, tuned_weights
from gnomon.ensemble.trie import ByteTrie

WORDS = ["a", "b", "c", "ab", "bc", "abc", "ca", " ", " a", " ab", "é", "aa", "ba", "bab"]
TEXTS = [b"", *(word.encode() for word in WORDS), b"\xc3", b"\xa9", b"\xc3\xa9a", b"ab", b"cc"]
"""Id 0 is the end; bytes of "é" apart and together; "ab" twice."""
TOKENS = [i for i, text in enumerate(TEXTS) if text]


@cache
def logits(tokens: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A toy language model: any tokens -> logits, by hash."""
    digest = hashlib.sha256(repr((tokens, seed)).encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    return generator.normal(size=len(TEXTS)).astype(np.float32) * 2


@cache
def probability(tokens: tuple[int, ...], seed: int = 0) -> float:
    """Of a whole token sequence, its end not included."""
    p = 1.0
    for place, token in enumerate(tokens):
        row = logits(tokens[:place], seed).astype(np.float64)
        p *= math.exp(row[token]) / np.exp(row).sum()
    return p


def tokenize(data: bytes) -> list[int]:
    """The tokeniser's own way: the longest token first, the lower id among equals."""
    ids: list[int] = []
    while data:
        best = max((t for t in TOKENS if data.startswith(TEXTS[t])), key=lambda t: (len(TEXTS[t]), -t))
        ids.append(best)
        data = data[len(TEXTS[best]) :]
    return ids


def covers(text: bytes, canonical: bool) -> dict[tuple[int, ...], bytes]:
    """All token sequences that cover a text: finished tokens and one open token -> the open token's known bytes."""
    found: dict[tuple[int, ...], bytes] = {}

    def grow(done: tuple[int, ...], rest: bytes) -> None:
        for token in TOKENS:
            piece = TEXTS[token]
            if piece.startswith(rest) and piece != rest and rest:
                found[(*done, token)] = rest
            elif rest.startswith(piece):
                finished = (*done, token)
                spelt = b"".join(TEXTS[t] for t in finished)
                try:
                    spelt.decode()
                    admissible = not canonical or list(finished) == tokenize(spelt)
                except UnicodeDecodeError:
                    admissible = True
                if admissible:
                    if rest == piece:
                        found[finished] = b""
                    grow(finished, rest[len(piece) :])

    grow((), text)
    if not text:
        found[()] = b""
    return found


def brute(text: bytes, canonical: bool, seed: int = 0) -> np.ndarray:
    """[257] by enumeration: "x then b" has the mass of the covers of xb; STOP follows covers with no open token."""
    mass = np.zeros(257)
    for byte in sorted({piece[i] for piece in TEXTS for i in range(len(piece))}):
        # A token that ends with this byte counts whether or not its end is admissible: it was not finished before.
        for cover, rest in covers(text, canonical).items():
            if rest:
                if TEXTS[cover[-1]][len(rest)] == byte:
                    mass[byte] += probability(cover, seed)
            else:
                starts = [t for t in TOKENS if TEXTS[t][0] == byte]
                mass[byte] += sum(probability((*cover, t), seed) for t in starts)
    for cover, rest in covers(text, canonical).items():
        if not rest:
            row = logits(cover, seed).astype(np.float64)
            mass[STOP] += probability(cover, seed) * math.exp(row[0]) / np.exp(row).sum()
    return mass / mass.sum()


def lattice(text: bytes, canonical: bool, seed: int = 0, **limits: float) -> Lattice:
    made = Lattice(ByteTrie(TEXTS, {0}), tokenize, canonical, **{"width": 0, "prune": 0.0} | limits)  # type: ignore[arg-type]
    feed(made, seed)
    for byte in text:
        made.push(byte)
        feed(made, seed)
    return made


def feed(made: Lattice, seed: int) -> None:
    while (wanted := made.wanted()) is not None:
        made.give(logits(wanted, seed))


TEXT = st.text(alphabet="abc é", max_size=6).map(str.encode)


@settings(max_examples=60, deadline=None)
@given(TEXT, st.booleans())
def test_it_equals_brute_force_over_all_covers(text: bytes, canonical: bool) -> None:
    np.testing.assert_allclose(lattice(text, canonical).distribution(), brute(text, canonical), atol=1e-6)


def test_brute_force_itself_sees_a_wrong_cover() -> None:
    """The oracle is sharp: leaving one spelling out is seen."""
    text = b"abab"
    full = brute(text, canonical=False)
    assert np.abs(full - brute(text, canonical=True)).max() > 1e-3


@settings(max_examples=40, deadline=None)
@given(TEXT, st.booleans(), st.integers(0, 3), st.sampled_from([0.0, 1e-3, 0.05]))
def test_the_next_bytes_sum_to_one(text: bytes, canonical: bool, width: int, prune: float) -> None:
    made = lattice(text, canonical, width=width, prune=prune)
    assert abs(made.distribution().sum() - 1) < 1e-9


@settings(max_examples=30, deadline=None)
@given(TEXT)
def test_with_all_covers_the_next_bytes_multiply_to_the_sum_over_covers(text: bytes) -> None:
    if not text:
        return
    made, product = lattice(b"", canonical=False), 1.0
    for byte in text:
        product *= made.distribution()[byte]
        made.push(byte)
        feed(made, 0)
    expected = sum(probability(cover) for cover in covers(text, canonical=False))
    assert math.isclose(product, expected, rel_tol=1e-5)


@settings(max_examples=30, deadline=None)
@given(TEXT.filter(bool), st.floats(0.05, 0.95))
def test_jensen_holds_for_every_text_and_weight(text: bytes, weight: float) -> None:
    members = []
    for seed in (1, 2):
        made = lattice(b"", True, seed)
        found = []
        for byte in text:
            found.append(made.distribution()[byte])
            made.push(byte)
            feed(made, seed)
        members.append(np.array(found))
    weights = [weight, 1 - weight]
    mean = sum(w * bits(p) for w, p in zip(weights, members, strict=True))
    assert bits(mixed(members, weights)) <= mean + 1e-9
    assert bits(mixed(members, tuned_weights(members))) <= min(map(bits, members)) + 2e-3
    fitting = fitting_weights([bits(p) for p in members], 1.0)
    assert abs(sum(fitting) - 1) < 1e-9 and (fitting[0] > fitting[1]) == (bits(members[0]) < bits(members[1]))


def test_pruning_reports_what_it_dropped_and_stays_near_the_exact_answer() -> None:
    exact = lattice(b"abc ab", canonical=True)
    pruned = lattice(b"abc ab", canonical=True, prune=0.02)
    assert exact.pruned == 0.0 and 0 < pruned.pruned < 0.5
    assert np.abs(exact.distribution() - pruned.distribution()).max() < 0.1


@settings(max_examples=40, deadline=None)
@given(TEXT.filter(bool))
def test_no_byte_is_impossible_because_its_cover_was_dropped(text: bytes) -> None:
    made = lattice(b"", True, prune=0.3)
    for byte in text:
        chance = made.distribution()[byte]
        assert chance > 0 or not made.pruned
        made.push(byte)
        feed(made, 0)


def test_a_text_that_the_model_gave_no_chance_is_gone_on_with() -> None:
    made = Lattice(ByteTrie(TEXTS, {0}), tokenize, True, 0, 0.0)
    row = np.full(len(TEXTS), -np.inf, dtype=np.float32)
    row[[0, 1]] = 0.0  # only the end and "a"
    made.give(row)
    made.push(ord("b"))
    assert made.healed == 1 and made.wanted() == ()
    made.give(row)
    assert made.wanted() == (2,)
    made.give(logits((2,)))
    assert abs(made.distribution().sum() - 1) < 1e-9


@pytest.mark.parametrize("text", [b"ab", b"\xc3", b"\xc3\xa9"])
def test_the_trie_finds_every_token_below_a_prefix(text: bytes) -> None:
    trie = ByteTrie(TEXTS, {0})
    low, high, depth = *trie.whole, 0
    for byte in text:
        low, high = trie.child(low, high, depth, byte)
        depth += 1
    assert {TEXTS[i] for i in trie.ids_V[low:high]} == {t for t in TEXTS if t.startswith(text)}
    row = logits(())
    masses = trie.masses(row)
    p = np.exp(row.astype(np.float64)) / np.exp(row.astype(np.float64)).sum()
    following = trie.next_bytes(masses, low, high, depth)
    for byte in range(256):
        wanted = sum(p[i] for i, t in enumerate(TEXTS) if len(t) > len(text) and t.startswith(text + bytes([byte])))
        assert math.isclose(following[byte], wanted, abs_tol=1e-6)


def test_every_pair_of_toy_texts_is_covered_by_the_oracle() -> None:
    for a, b in itertools.product(WORDS, repeat=2):
        assert covers((a + b).encode(), canonical=True)
