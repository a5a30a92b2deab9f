"""Sessions: what leaves and what is found depend on the text alone, in every mode, for every split, bytes included."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gnomon.errors import UsageError
from gnomon.guard import Finding, Guard, Vault
from gnomon.guard.views import VIEW_NAMES

from . import reference
from .test_matcher import CUTS, TEXTS, patterns

KEY = "ghp_9rtqamlth6e39ixjq0ji9qzqs7cxfl909k1l"


def outcome(guard: Guard, pieces: list[Any]) -> tuple[str, list[Finding], str]:
    session = guard.session()
    out = "".join([session.push(piece) for piece in pieces] + [session.finish()])
    return out, session.findings, session.verdict


def checks() -> st.SearchStrategy[list[dict[str, Any]]]:
    check = st.fixed_dictionaries(
        {
            "use": st.just("regex"),
            "regex": patterns(),
            "action": st.sampled_from(["redact", "block", "flag", "replace"]),
            "views": st.lists(
                st.sampled_from(["raw", "leet", "spaced", "visible", "url"]), min_size=1, max_size=2, unique=True
            ),
        }
    )
    return st.lists(check, min_size=1, max_size=3)


@settings(max_examples=300, deadline=None)
@given(checks(), TEXTS, CUTS)
def test_every_split_gives_the_same_text_findings_and_verdict(
    rules: list[dict[str, Any]], text: str, cuts: list[int]
) -> None:
    try:
        guard = Guard({"output": [{**rule, "name": f"r{i}"} for i, rule in enumerate(rules)]})
    except UsageError:
        return  # matches the empty text
    whole = outcome(guard, [text])
    result = guard.scan(text)
    assert (result.text, list(result.findings), result.verdict) == whole
    assert outcome(guard, list(text)) == whole
    assert outcome(guard, list(reference.splits(text, cuts))) == whole
    assert outcome(guard, [bytes([b]) for b in text.encode()]) == whole


@settings(max_examples=200, deadline=None)
@given(st.lists(patterns(), min_size=1, max_size=3), TEXTS)
def test_redacting_removes_exactly_what_the_reference_finds(rules: list[str], text: str) -> None:
    from gnomon.guard.regex import parse

    try:
        guard = Guard({"output": [{"use": "regex", "regex": rule, "replacement": "#"} for rule in rules]})
    except UsageError:
        return
    spans = sorted((a, b) for rule in rules for a, b in reference.matches(None, parse(rule), text))
    out, at = "", 0
    for start, end in spans:
        if start >= at:
            out += text[at:start] + "#"
        at = max(at, end)
    assert guard.scan(text).text == out + text[at:]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from(VIEW_NAMES), min_size=1, max_size=3, unique=True), st.text(max_size=30), CUTS)
def test_views_never_change_clean_text_nor_depend_on_the_split(views: list[str], text: str, cuts: list[int]) -> None:
    guard = Guard({"output": [{"use": "words", "words": ["zebra", "heart"], "views": views, "match": "str"}]})
    pieces = [text.encode("utf-8", "replace").decode()]
    whole = outcome(guard, pieces)
    if not whole[1]:
        assert whole[0] == pieces[0]
    assert outcome(guard, list(pieces[0])) == whole == outcome(guard, list(reference.splits(pieces[0], cuts)))
    assert outcome(guard, [bytes([b]) for b in pieces[0].encode()]) == whole


@settings(max_examples=100, deadline=None)
@given(checks(), TEXTS, st.integers(0, 24))
def test_a_saved_session_goes_on_as_if_nothing_happened(rules: list[dict[str, Any]], text: str, cut: int) -> None:
    try:
        guard = Guard({"output": rules})
    except UsageError:
        return
    whole = outcome(guard, [text])
    first = guard.session()
    out = first.push(text[:cut])
    second = Guard({"output": rules}).resume(json.loads(json.dumps(first.state())))
    out += second.push(text[cut:]) + second.finish()
    assert (out, second.findings, second.verdict) == whole


def test_nothing_of_a_blocked_part_leaves_and_nothing_after_it() -> None:
    guard = Guard(
        {"output": [{"use": "words", "words": ["secret"], "action": "block"}], "on_block": {"message": " [ended]"}}
    )
    for pieces in (["The secret is 42."], list("The secret is 42."), ["The sec", "ret is 42."]):
        out, findings, verdict = outcome(guard, pieces)
        assert out == "The  [ended]" and verdict == "block" and [f.start for f in findings] == [4]


def test_a_finding_prints_where_and_never_what() -> None:
    result = Guard().scan(f"key {KEY} end")
    assert result.text == "key [REDACTED:github-token] end" and not result.valid and result.risk == 1.0
    assert [str(f) for f in result.findings] == ["github-token [4, 44) redact 1"]
    assert KEY[4:12] not in repr(result)


def test_shadow_mode_reports_and_changes_nothing() -> None:
    guard = Guard({"output": ["secrets", {"use": "words", "words": ["end"], "action": "block"}], "shadow": True})
    result = guard.scan(f"key {KEY} end")
    assert result.text == f"key {KEY} end" and result.valid and {f.action for f in result.findings} == {"flag"}
    session = guard.session()
    assert session.push("key ghp_9rt") == "key ghp_9rt"


def test_only_what_may_still_become_a_finding_is_held() -> None:
    session = Guard().session()
    assert session.push("my key is ghp_") == "my key is "
    assert session.push("-dash") == ""  # an e-mail address may still follow
    assert session.push("! And more ") == "ghp_-dash! And more "


def test_a_run_without_an_end_never_leaks_and_is_redacted_as_one() -> None:
    text = "token eyJ" + "hbGciOiJIUzI1NiJ9" * 1000 + " done"
    guard = Guard({"output": [{"use": "regex", "regex": r"eyJ[0-9A-Za-z_-]+\.[0-9A-Za-z_-]+", "name": "jwt"}]})
    session = guard.session()
    out, most = "", 0
    for at in range(0, len(text), 7):
        out += session.push(text[at : at + 7])
        most = max(most, session.held)
    out += session.finish()
    assert out == "token [REDACTED:jwt] done" and most <= 4096
    assert guard.scan(text).text == out and guard.scan(text).findings == tuple(session.findings)


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ({"output": [{"use": "nothing"}]}, "No check `nothing`"),
        ({"output": [{"use": "secrets", "only": ["nope"]}]}, "no rule or entity `nope`"),
        ({"output": [{"use": "regex", "regex": "a("}]}, "character 1"),
        ({"output": [{"use": "regex", "regex": "a*"}]}, "empty text"),
        ({"output": [{"use": "words"}]}, "needs `words` or `file`"),
        ({"output": [{"use": "secrets", "views": ["xray"]}]}, "no view `xray`"),
        ({"output": [{"use": "secrets", "mode": "async"}]}, "async check cannot redact"),
        ({"output": [{"use": "secrets", "action": "vault"}]}, "`vault` is for `input`"),
        ({"outptu": []}, "outptu"),
        ("missing.yaml", "cannot be read"),
    ],
)
def test_a_wrong_policy_says_what_and_where(policy: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says.replace("(", r"\(")):
        Guard(policy)


def test_right_to_left_text_and_combining_characters_pass_unchanged() -> None:
    text = "שלום עולם! نَصٌّ مُشَكَّل 👩‍👩‍👧 e\u0301 ک\u200cتاب\r\n"
    guard = Guard(
        {"output": ["secrets", "pii", {"use": "words", "words": ["bomb"], "views": ["nfkc", "leet", "spaced"]}]}
    )
    for pieces in ([text], list(text), [bytes([b]) for b in text.encode()]):
        assert outcome(guard, pieces) == (text, [], "pass")


@pytest.mark.parametrize(
    ("view", "disguise"),
    [
        ("nfkc", "ｂａｎａｎａ"), ("nfkc", "bа nanа".replace(" ", "")), ("nfkc", "ba\u200bna\u2060na"),
        ("nfkc", "BÄnána"),
        ("leet", "b4n4n4"), ("leet", "b@n@n@"), ("spaced", "b a n a n a"), ("spaced", "b.a.n.a.n.a"),
        ("rot13", "onanan"), ("base64", "YmFuYW5h"), ("hex", "62616e616e61"), ("url", "b%61nan%61"),
        ("base64+base64", "WW1GdVlXNWg="), ("url+nfkc", "B%61NANA"), ("base64+nfkc", "QkFOQU5B"),
    ],
)  # fmt: skip
def test_a_disguised_word_is_found_in_its_view(view: str, disguise: str) -> None:
    check = {"use": "words", "words": ["banana"], "match": "str"}
    plain, seen = Guard({"output": [check]}), Guard({"output": [{**check, "views": ["raw", view]}]})
    text = f"eat {disguise} now"
    assert plain.scan(text).text == text
    result = seen.scan(text)
    assert result.text.startswith("eat [REDACTED:words]") and disguise not in result.text
    assert outcome(seen, list(text))[0] == result.text


def test_words_are_found_in_a_view_that_takes_off_their_own_accents() -> None:
    guard = Guard({"output": [{"use": "words", "words": ["café", "бомба", "h4x"], "views": ["raw", "nfkc", "leet"]}]})
    for text in ("the café", "the cafe\u0301", "the CAFÉ", "une б\u200bомба", "an h4x", "a hax"):
        assert guard.scan(text).findings, text
    assert not guard.scan("a cafeteria").findings


def test_what_is_no_text_and_a_vault_that_is_missing_are_said_so() -> None:
    with pytest.raises(UsageError, match="str or bytes, not int"):
        Guard().session().push(3)  # type: ignore[arg-type]
    guard = Guard({"input": [{"use": "pii", "action": "vault"}]})
    with pytest.raises(UsageError, match="vault=Vault"):
        guard.scan("I am jane@example.org", "input")
    vault = Vault()
    forged = guard.scan("I am jane@example.org, not [EMAIL_1]", "input", vault=vault).text
    assert forged == "I am [EMAIL_2], not [EMAIL_1]" and vault.restore(forged) == "I am jane@example.org, not [EMAIL_1]"
