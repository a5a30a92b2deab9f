"""The co-processor's mechanism, on a tiny model: two heads learn, a token is computed once, pages come back."""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from gnomon.errors import ConfigError, ContextLengthExceeded
from gnomon.guard import Guard
from gnomon.guard import coprocessor as room
from gnomon.guard.coprocessor import Example, Heads, Reading, tokens_of, train
from gnomon.guard.scanners import coprocessor as scanner_module
from gnomon.model import Model

FILLER = ["the cat sat", "a dog ran on", "we sing a song", "all of it is good", "then they went home"]


def examples() -> list[Example]:
    found = []
    for place, text in enumerate(FILLER):
        follow = FILLER[(place + 1) % len(FILLER)]
        found.append(Example(f"{text} {follow}", "safe"))
        for risk, word, kind in (("unsafe", "KILL KILL", "violence"), ("controversial", "9999 9999", "numbers")):
            found.append(Example(f"{text} {word}", risk, kind, boundary=len(text)))
            found.append(Example(word, risk, kind))
    return found


@pytest.fixture(scope="module")
def heads(tiny: Model) -> Heads:
    return train(examples(), tiny, width=32, rounds=400)


def test_it_learns_risk_category_and_where_it_begins(tiny: Model, heads: Heads) -> None:
    reading = Reading(heads, tiny)
    assert heads.categories == ("numbers", "violence")
    assert reading("we sing a song then").score < 0.5
    found = Reading(heads, tiny)("we sing a song KILL KILL now")
    assert found.score > 0.5 and found.note == "unsafe: violence"
    assert Reading(heads, tiny)("the cat sat 9999 9999").note == "controversial: numbers"
    assert Reading(heads, tiny, strict=False)("the cat sat 9999 9999").score < 0.5  # loose: controversial is let be


def test_each_token_is_computed_once_and_never_judged_otherwise(tiny: Model, heads: Heads) -> None:
    text = "the cat sat and then KILL KILL it went home to sing a song of good things again"
    reading = Reading(heads, tiny)
    scores, ends = [], [at for at, letter in enumerate(text) if letter == " "]
    for end in [*ends, len(text)]:
        before = reading.risk_T3.copy()
        scores.append(reading(text[:end]).score)
        assert np.array_equal(reading.risk_T3[: len(before)], before)
    assert reading.rows == len(tokens_of(text, tiny.tokenizer)[0])  # the same cost wherever a token stands
    assert scores == sorted(scores)
    assert Reading(heads, tiny)(text).score == scores[-1]  # bit for bit what reading it at once gives
    assert reading(text[: ends[3]]).score == scores[3]


def test_a_guard_with_it_blocks_the_same_for_every_split_and_gives_its_pages_back(
    tiny: Model, heads: Heads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads.write(tmp_path / "heads.safetensors")
    monkeypatch.setattr(scanner_module, "_model", lambda reference: tiny)
    closed: list[Any] = []
    close = room._close
    monkeypatch.setattr(room, "_close", lambda worker, reader: (close(worker, reader), closed.append(reader)))
    check = {"use": "coprocessor", "action": "block", "options": {"heads": str(tmp_path / "heads.safetensors")}}
    guard = Guard({"output": [check | {"timeout_ms": 60_000}]})
    text = "The cat sat. We sing KILL KILL KILL. And then they went home."
    outcomes = set()
    for pieces in ([text], list(text), [text[i : i + 7] for i in range(0, len(text), 7)]):
        session = guard.session()
        out = "".join([session.push(piece) for piece in pieces] + [session.finish()])
        outcomes.add((out, session.verdict, str([f.rule for f in session.findings])))
    assert outcomes == {("The cat sat.", "block", "['coprocessor']")}
    del session
    for _ in range(1000):
        gc.collect()
        if len(closed) == 3 and not any(reader.pages for reader in closed):
            break
        time.sleep(0.02)
    assert [reader.pages for reader in closed] == [[], [], []]


def test_a_reader_forgets_grows_and_refuses(tiny: Model) -> None:
    ids = tiny.tokenizer.encode("the cat sat on it", add_special_tokens=False)
    whole = tiny.worker.hidden(ids)
    reader = tiny.worker.reader()
    first = tiny.worker.run_exclusive(lambda: reader.read(ids[:3]))
    tiny.worker.run_exclusive(lambda: reader.read(ids[:2]))
    again = tiny.worker.run_exclusive(lambda: reader.read(ids[3:], after=3))
    assert (whole[:3] == first).all() and (whole[3:] == again).all()
    with pytest.raises(ContextLengthExceeded):
        tiny.worker.run_exclusive(lambda: reader.read([1] * 600))
    tiny.worker.run_exclusive(reader.close)


def test_heads_are_kept_and_what_is_no_heads_is_refused(tiny: Model, heads: Heads, tmp_path: Path) -> None:
    heads.write(tmp_path / "heads.safetensors")
    again = Heads.read(tmp_path / "heads.safetensors")
    rows = np.ones((2, heads.arrays["pre"].shape[0]))
    assert np.allclose(again.judge(rows)[0], heads.judge(rows)[0], atol=1e-5) and again.categories == heads.categories
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match="cannot be read"):
        Heads.read(tmp_path / "bad.safetensors")
    with pytest.raises(ConfigError, match="No risk `evil`"):
        train([Example("a", "evil")], tiny)
    with pytest.raises(ConfigError, match="two different risks"):
        train([Example("a b", "safe")], tiny)
    with pytest.raises(ConfigError, match="needs `heads`"):
        scanner_module.reading()


def test_the_command_trains_heads(tiny_dir: Path, tmp_path: Path) -> None:
    from gnomon.cli.guard import app

    data = tmp_path / "labelled.jsonl"
    rows: list[dict[str, Any]] = [vars(one) for one in sorted(examples(), key=lambda one: one.text)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "heads.safetensors"
    arguments = ["train-coprocessor", str(data), "--out", str(out), "--model", str(tiny_dir), "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert (
        Heads.read(out).record["auc"] is not None
        and Heads.read(out).categories == ("numbers", "violence")
        and json.loads(done.stdout)["count"] == 5
    )
    data.write_text('{"text": "a"}\n')
    assert "line 1" in str(CliRunner().invoke(app, arguments).exception)
    assert room.RISKS == ("safe", "controversial", "unsafe")
