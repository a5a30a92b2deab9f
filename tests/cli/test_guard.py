"""`gnomon guard` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gnomon.cli.main import run

KEY = "ghp_9rtqamlth6e39ixjq0ji9qzqs7cxfl909k1l"
Out = pytest.CaptureFixture[str]


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(f"first line\nthe key {KEY}, kept\n")
    return str(path)


def test_scan_prints_the_clean_text_and_fails_when_asked_to(text: str, capsys: Out) -> None:
    assert run(["guard", "scan", text]) == 0
    out, err = capsys.readouterr()
    assert out == "first line\nthe key [REDACTED:github-token], kept\n" and "github-token [19, 59) redact" in err
    assert run(["guard", "scan", text, "--fail"]) == 3


def test_explain_says_where_and_by_which_pattern_and_never_what(text: str, capsys: Out) -> None:
    assert run(["guard", "explain", text]) == 0
    out = capsys.readouterr().out
    assert out.startswith("2:9\tgithub-token\tredact") and "gh[pousr]_" in out and KEY[:8] not in out
    assert run(["guard", "explain", text, "--json", "-p", "toxicity,secrets"]) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert (found["line"], found["column"]) == (2, 9)


def test_check_runs_a_table_of_cases(tmp_path: Path, capsys: Out) -> None:
    cases = tmp_path / "cases.yaml"
    cases.write_text(f'- {{text: "{KEY}", verdict: redact, rules: [github-token]}}\n- {{text: plain, verdict: pass}}\n')
    assert run(["guard", "check", "secrets", "--cases", str(cases)]) == 0
    cases.write_text("- {text: plain, verdict: block}\n")
    assert run(["guard", "check", "secrets", "--cases", str(cases)]) == 1
    assert "1 of 1 cases" in capsys.readouterr().err


def test_replay_counts_what_a_policy_would_have_found(tmp_path: Path, capsys: Out) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": KEY}) + "\n\n" + json.dumps({"text": "plain"}) + "\n")
    assert run(["guard", "replay", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdicts"] == {"redact": 1, "pass": 1}
    path.write_text('{"text": "a"}\n{"txt": "b"}\n')
    assert run(["guard", "replay", str(path)]) == 2
    assert "texts.jsonl, line 2: no JSON object with a `text`" in capsys.readouterr().err


def test_gitleaks_rules_are_taken_and_used(data: Path, tmp_path: Path, capsys: Out) -> None:
    import gzip

    source = tmp_path / "gitleaks.toml"
    source.write_bytes(gzip.decompress((data / "rails-streaming-ux" / "rules" / "gitleaks.toml.gz").read_bytes()))
    mine, policy = tmp_path / "mine.yaml", tmp_path / "policy.yaml"
    assert run(["guard", "rules", "import", str(source), "-o", str(mine)]) == 0
    assert "221 rules taken" in "".join(capsys.readouterr())
    policy.write_text("output: [{use: rules, file: mine.yaml}]\n")
    (tmp_path / "key.txt").write_text(f"push {KEY}\n")
    assert run(["guard", "scan", str(tmp_path / "key.txt"), "-p", str(policy)]) == 0
    assert capsys.readouterr().out == "push [REDACTED:github-pat]\n"


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("output: [{use: regex, regex: '(a+)+$('}]", "`(` is never closed at character 6"),
        (r"output: [{use: regex, regex: '(a)\1'}]", "back-references need more than linear time at character 3"),
        ("output: [{use: secrets, acton: block}]", "Unknown key `"),
        ("output: [{use: nosuch}]", "No check `nosuch`"),
        ("output: [{use: words, words: [", "cannot be read"),
    ],
)
def test_a_wrong_policy_says_what_and_where(policy: str, says: str, tmp_path: Path, capsys: Out) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(policy)
    assert run(["guard", "check", str(path)]) == 2
    assert says in capsys.readouterr().err
