"""The table of capabilities: every pair works together through Python, a recipe and the server, or is refused.

A new capability adds its row; the pairs follow. `check` looks at the Generation that a row's options gave.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

import gnomon
from gnomon.errors import Conflict, UnsupportedModel
from gnomon.generation import Generation
from gnomon.merge import merge
from gnomon.model import Model
from gnomon.models.checkpoint import Checkpoint
from gnomon.models.patch import Patch
from gnomon.models.reference import open_checkpoint
from helpers.patches import random_patch, random_wrappers
from helpers.server import serving
from helpers.tiny import write_tiny_model

MESSAGES = [{"role": "user", "content": "abc"}]
LETTER = "\ufffd"
FORBIDDEN = {"use": "words", "words": list("aeiou"), "match": "str", "replacement": "#"}


@dataclass(frozen=True)
class Row:
    """One capability, or one way of using it."""

    name: str
    options: dict[str, Any]
    check: Callable[[Generation], bool]
    on: str = "tiny"
    """The model it needs: `tiny`, or the ensemble `duo`."""


ROWS = [
    Row("greedy", {"temperature": 0.0}, lambda g: g.finish_reason in ("stop", "length")),
    Row("sampling", {"temperature": 1.1, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "seed": 5}, lambda g: g.seed == 5),
    Row("penalties", {"repetition_penalty": 1.2, "presence_penalty": 0.5}, lambda g: True),
    Row("limit", {"max_tokens": 3}, lambda g: len(g.token_ids) <= 3),
    Row("logprobs", {"logprobs": 2}, lambda g: g.logprobs is not None and len(g.logprobs) == len(g.token_ids)),
    Row("stop", {"stop": [LETTER]}, lambda g: LETTER not in g.text),
    Row("logit_bias", {"logit_bias": {"5": -100.0}}, lambda g: 5 not in g.token_ids),
    Row("min_tokens", {"min_tokens": 2, "ignore_eos": True}, lambda g: True),
    Row("guard", {"guard": {"output": ["pii", FORBIDDEN]}}, lambda g: not set("aeiou") & set(g.text.replace("#", ""))),
    Row("patches", {"patches": ["shift"]}, lambda g: g.fingerprint not in PLAIN),
    Row("wrappers", {"patches": ["wrapped"]}, lambda g: g.fingerprint not in PLAIN),
    Row("ensemble", {"ensemble": {"weights": [3, 1], "trace": True}}, lambda g: "ensemble" in g.usage.details, "duo"),
]
PLAIN: set[str] = set()
"""Fingerprints of the model as it is."""
ROWS += [
    Row("heal", {"heal": True}, lambda g: True),
    Row("grammar", {"grammar": {"regex": "[a-z ]{0,6}"}}, lambda g: set(g.text) <= set("abcdefghijklmnopqrstuvwxyz #")),
]
ROWS += [
    Row("remember", {"remember": {"facts": ["abc -> d"], "method": "retrieve"}}, lambda g: g.usage.prompt_tokens > 5),
]
PAIRS = list(itertools.combinations(ROWS, 2))
IDS = [f"{a.name}+{b.name}" for a, b in PAIRS]


def joined(a: Row, b: Row) -> dict[str, Any]:
    return {"max_tokens": 8} | a.options | b.options


@pytest.fixture(scope="module")
def patch(tiny_dir: Path) -> Patch:
    return random_patch(open_checkpoint(tiny_dir), 1)


@pytest.fixture(scope="module")
def wrapped(tiny_dir: Path) -> Patch:
    return _wrapped(open_checkpoint(tiny_dir))


def _wrapped(checkpoint: Checkpoint) -> Patch:
    return Patch({}, checkpoint.identity, wrappers=random_wrappers(checkpoint.config, 1))


@pytest.fixture(scope="module", autouse=True)
def _what_rows_name(tiny: Model, patch: Patch, wrapped: Patch) -> None:
    PLAIN.add(tiny.fingerprint)
    tiny.patches.add("shift", patch)
    tiny.patches.add("wrapped", wrapped)


@pytest.fixture(scope="module")
def models(tiny: Model, duo: Model) -> dict[str, Model]:
    return {"tiny": tiny, "duo": duo}


@pytest.fixture(scope="module")
def url(models: dict[str, Model]) -> Iterator[str]:
    with serving(models) as address:
        yield address


def needed(a: Row, b: Row) -> str:
    return "duo" if "duo" in (a.on, b.on) else "tiny"


def refused(a: Row, b: Row, model: Model) -> bool:
    """Whether a capability of one refuses the other; then every door must say so."""
    known = model.registry.capabilities
    pairs = {(name, other) for name, c in known.items() for other, _ in c.conflicts}
    return any({x, y} <= a.options.keys() | b.options.keys() for x, y in pairs)


def same(a: Generation, b: Generation) -> bool:
    return (a.text, a.token_ids, a.logprobs, a.finish_reason) == (b.text, b.token_ids, b.logprobs, b.finish_reason)


@pytest.mark.parametrize(("a", "b"), PAIRS, ids=IDS)
def test_every_pair_works_in_python_whole_streamed_and_in_choices(a: Row, b: Row, models: dict[str, Model]) -> None:
    tiny = models[needed(a, b)]
    options = {"seed": 1} | joined(a, b)
    if refused(a, b, tiny):
        with pytest.raises((Conflict, UnsupportedModel)):
            tiny.generate("abc", **options)
        return
    whole = tiny.generate("abc", **options)
    assert a.check(whole) and b.check(whole)
    chunks = list(tiny.stream("abc", **options))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [token for chunk in chunks for token in chunk.token_ids] == whole.token_ids
    choices = tiny.generate("abc", **options, n=2)
    assert same(choices[0], whole) and [g.index for g in choices] == [0, 1]  # type: ignore[index, union-attr]
    chat = tiny.chat(MESSAGES, **options)
    assert a.check(chat) and b.check(chat)  # type: ignore[arg-type]


@pytest.mark.parametrize(("a", "b"), PAIRS, ids=IDS)
def test_every_pair_gives_the_same_through_the_server(a: Row, b: Row, models: dict[str, Model], url: str) -> None:
    tiny = models[needed(a, b)]
    options = {"seed": 1} | joined(a, b)
    if refused(a, b, tiny):
        body = {"model": needed(a, b), "messages": MESSAGES} | options
        reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30)
        assert reply.status_code == 400 and ("cannot be used together" in reply.text or "one member" in reply.text)
        return
    local = tiny.chat(MESSAGES, **options)
    wire = dict(options)
    if "logprobs" in wire:
        wire["top_logprobs"], wire["logprobs"] = wire["logprobs"], True
    body = {"model": needed(a, b), "messages": MESSAGES} | wire
    choice = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).json()["choices"][0]
    assert choice["message"]["content"] == local.text  # type: ignore[union-attr]
    streamed = ""
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body | {"stream": True}, timeout=30) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {") and (event := json.loads(line[6:]))["choices"]:
                streamed += event["choices"][0]["delta"].get("content") or ""
    assert streamed == local.text  # type: ignore[union-attr]


def test_every_row_gives_the_same_through_a_recipe(
    models: dict[str, Model], tiny_dir: Path, duo_dirs: list[Path], tmp_path: Path, patch: Patch, wrapped: Patch
) -> None:
    tiny = models["tiny"]
    files = {"shift": patch.save(tmp_path / "s.patch.safetensors"), "wrapped": wrapped.save(tmp_path / "w.safetensors")}
    fields = set(tiny.registry.capabilities["sampling"].options_model().model_fields)  # type: ignore[union-attr]
    for row in ROWS:
        options = {"max_tokens": 8, "seed": 1} | row.options
        sampling = {key: value for key, value in options.items() if key in fields}
        others = {key: value for key, value in options.items() if key not in fields}
        if "patches" in others:
            others["patches"] = [
                str(files[name]) for name in others["patches"]
            ]  # a recipe names files, a request names what was loaded
        recipe = tmp_path / f"{row.name}.yaml"
        content = {"gnomon": 1, "model": str(tiny_dir), "threads": 1, "sampling": sampling} | others
        if row.on == "duo":
            del content["model"]
            content["ensemble"] = {"members": [str(path) for path in duo_dirs], **row.options["ensemble"]}
        recipe.write_text(yaml.safe_dump(content))
        with gnomon.load(recipe, threads=1, max_sequences=2) as model:
            assert same(model.generate("abc"), models[row.on].generate("abc", **options)), row.name


def test_the_table_names_every_installed_capability(tiny: Model) -> None:
    operators = {"edit"}  # no request may set it; what it makes is a patch (tests/edit/test_joining.py has its doors)
    covered = {key for row in ROWS for key in row.options} | operators
    for capability in tiny.registry.capabilities.values():
        model = capability.options_model()
        if model is not None:
            fields = set(model.model_fields) if capability.inline else {capability.name}
            assert fields & covered, f"add a row for `{capability.name}`"


@pytest.fixture(scope="module")
def merges(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Model, Model]]:
    """One merge twice: as its file, and as the directory that is written of it. Each with patches of its own."""
    folder = tmp_path_factory.mktemp("merge")
    other = write_tiny_model(folder / "other", seed=5)
    entries = [{"model": str(path), "parameters": {"weight": weight}} for path, weight in ((tiny_dir, 3), (other, 1))]
    (folder / "merge.yaml").write_text(yaml.safe_dump({"merge_method": "linear", "models": entries}))
    merge(folder / "merge.yaml", out=folder / "written")
    with (
        gnomon.load(folder / "merge.yaml", ledger=False) as file,
        gnomon.load(folder / "written", ledger=False) as written,
    ):
        for model in (file, written):
            model.patches.add("shift", random_patch(model.checkpoint, 1))
            model.patches.add("wrapped", _wrapped(model.checkpoint))
        yield file, written


@pytest.mark.parametrize("row", [row for row in ROWS if row.on == "tiny"], ids=lambda row: row.name)
def test_a_merge_file_wears_every_row_as_the_written_merge_does(row: Row, merges: tuple[Model, Model]) -> None:
    options = {"max_tokens": 8, "seed": 1} | row.options
    file, written = (model.generate("abc", **options) for model in merges)
    assert row.check(file) and same(file, written)
