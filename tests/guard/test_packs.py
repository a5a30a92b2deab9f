"""The built-in packs on the given cases: recall, leaks at every place of a stream, and clean prose untouched."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from gnomon.errors import UsageError
from gnomon.guard import Guard
from gnomon.guard.rules import make_rule, pack, pack_names, rule_of

ENTITIES = {
    "CREDIT_CARD": "CREDIT_CARD",
    "PHONE_NUMBER": "PHONE",
    "EMAIL_ADDRESS": "EMAIL",
    "IBAN_CODE": "IBAN",
    "US_SSN": "US_SSN",
    "IP_ADDRESS": "IP_ADDRESS",
}


@cache
def secrets() -> Guard:
    return Guard({"output": ["secrets"]})


def cases(data: Path) -> list[dict[str, Any]]:
    with gzip.open(data / "rails-streaming-ux" / "gitleaks_cases.sample.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line in lines]


def pieces_shown(secret: str, text: str) -> bool:
    return any(secret[i : i + 4] in text for i in range(len(secret) - 3))


def test_at_least_95_percent_of_the_given_secrets_are_found(data: Path) -> None:
    found: Counter[bool] = Counter()
    for case in cases(data):
        if case["kind"] == "tp":
            found[bool(secrets().scan(case["text"]).findings)] += 1
    assert found[True] / found.total() >= 0.99


def test_at_least_95_percent_of_the_given_personal_data_is_covered(data: Path) -> None:
    guard = Guard({"output": ["pii"]})
    covered: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for line in (data / "rails-streaming-ux" / "presidio_synth_v2.sample.jsonl").read_text().splitlines():
        case = json.loads(line)
        hidden = {i for f in guard.scan(case["full_text"]).findings for i in range(f.start, f.end)}
        for span in case["spans"]:
            if span["entity_type"] in ENTITIES:
                value = case["full_text"][span["start_position"] : span["end_position"]].rstrip(". ")
                total[span["entity_type"]] += 1
                covered[span["entity_type"]] += hidden.issuperset(
                    range(span["start_position"], span["start_position"] + len(value))
                )
    assert sum(covered.values()) / sum(total.values()) >= 0.95
    assert all(covered[entity] / count >= 0.95 for entity, count in total.items()), (covered, total)


def test_no_piece_of_a_given_secret_is_shown_at_any_split(data: Path) -> None:
    """One case of every rule that is fully covered, in prose, cut at every place; and character by character."""
    guard, seen = secrets(), set()
    for case in cases(data):
        if case["kind"] != "tp" or case["own_rule_regex"] is None or case["rule"] in seen or len(case["text"]) > 300:
            continue
        start, end = case["own_rule_regex"]["secret"]
        secret, text = case["text"][start:end], f"Sure, here it is: {case['text']}\nAnything else?"
        whole = guard.scan(text)
        if pieces_shown(secret, whole.text):
            continue  # the case's own span holds more than the secret (a whole command line)
        seen.add(case["rule"])
        for cut in range(0, len(text), 11):
            session = guard.session()
            first = session.push(text[:cut])
            assert not pieces_shown(secret, first), (case["rule"], cut)
            assert first + session.push(text[cut:]) + session.finish() == whole.text
        session = guard.session()
        out = ""
        for byte in text.encode():
            out += session.push(bytes([byte]))
            assert not pieces_shown(secret, out)
        assert out + session.finish() == whole.text and tuple(session.findings) == whole.findings
    assert len(seen) > 180


def test_clean_prose_leaves_byte_for_byte_and_hardly_waits() -> None:
    root = Path(__file__).parents[2]
    prose = "".join((root / "docs" / f"{name}.md").read_text() for name in ("engine", "models", "determinism"))
    session = Guard().session()
    held, out = [], ""
    for character in prose:
        out += session.push(character)
        held.append(session.held)
    assert out + session.finish() == prose and session.findings == []
    assert sorted(held)[int(len(held) * 0.99)] < 40 and sum(held) / len(held) < 8


@pytest.mark.parametrize("name", pack_names())
def test_every_rule_of_a_pack_compiles_and_says_how_wide_it_is(name: str) -> None:
    rules = pack(name)
    assert len({rule.id for rule in rules}) == len(rules) > 5
    assert all(rule.width[0] >= 1 for rule in rules)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("4012 8888 8888 1881", "credit-card"), ("4012 8888 8888 1882", None),
        ("DE89 3704 0044 0532 0130 00 from", "iban"),
        ("AT61 1904 3002 3457 3201 then", "iban"), ("DE88370400440532013000", None), ("078-05-1123", "us-ssn"),
        ("000-05-1123", None), ("1.2.3.4", "ip-address"), ("1.2.3.444", None), ("2001:db8::1", "ipv6-address"),
        ("12:30:45", None), ("2024-01-17 23:08:55", None), ("+49 30 901820", "phone"), ("version 1.2.3", None),
        ("3J98t1WpEZ73CNmQviecrnyiWrnqRhWNLy", "crypto-wallet"), ("3J98t1WpEZ73CNmQviecrnyiWrnqRhWNLz", None),
        ("bc1qar0srrr7xfkvy5l643lydnw9re59gtzzwf5mdq", "crypto-wallet"), ("me@localhost", None),
    ],
)  # fmt: skip
def test_check_digits_decide(text: str, rule: str | None) -> None:
    found = [finding.rule for finding in Guard({"output": ["pii"]}).scan(f"see {text}, ok").findings]
    assert (rule in found) if rule else found == []


def test_a_rule_says_what_is_wrong_with_it() -> None:
    with pytest.raises(UsageError, match="unknown key `regexp`"):
        rule_of({"id": "a", "regexp": "x"}, "file")
    with pytest.raises(UsageError, match="no check `nope`"):
        rule_of({"id": "a", "regex": "x", "check": "nope"}, "file")
    with pytest.raises(UsageError, match="neither"):
        rule_of({"id": "a"}, "file")


def test_a_capture_is_the_sensitive_part_and_its_context_streams_on() -> None:
    rule = make_rule("key", r"(?i)[\w.-]{0,50}?api_key\s{0,3}=\s{0,3}([a-z0-9]{8,})(?:[;\s]|$)")
    assert rule.before is not None and rule.width == (8, None)
    guard = Guard({"output": [{"use": "regex", "name": "key", "regex": r"api_key = ([a-z0-9]{8,})(?:[;\s]|$)"}]})
    session = guard.session()
    assert session.push("api_key = ") == "api_key = "
    assert session.push("abcd1234") == "" and session.push("; ok") == "[REDACTED:key]; ok"
