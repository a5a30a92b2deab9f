"""Facts from files, in the formats in use, recognised by their fields.

CounterFact (ROME's), EasyEdit's CounterFact, zsRE (MEND's), KnowEdit, MQuAKE, RippleEdits, QAEdit, FastEdit's job file,
and plain records {prompt, subject?, target, ...} as JSON, JSONL or CSV. In goes a file; out come Facts. A record that
fits nothing is an error that names its place and its fields, never skipped.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gnomon.edit.facts import Fact, Probe
from gnomon.errors import UsageError

RIPPLE_GROUPS = (
    "Logical_Generalization", "Compositionality_I", "Compositionality_II", "Subject_Aliasing", "Forgetfulness",
)  # fmt: skip
RIPPLE_LOCALITY = ("Relation_Specifity", "Relation_Specificity")


def read_facts(path: Path | str) -> list[Fact]:
    """All facts of a file (.json, .jsonl, .csv, each also .gz). Raises UsageError with file and record."""
    file = Path(path)
    facts: list[Fact] = []
    for place, record in enumerate(_records(file), 1):
        try:
            facts += facts_of(record)
        except UsageError as error:
            raise UsageError(f"{file}, record {place}: {error.message}", hint=error.hint, param=error.param) from None
    if not facts:
        raise UsageError(f"{file} holds no facts.")
    return facts


def fact_of(record: Mapping[str, Any]) -> Fact:
    """One record as one fact."""
    found = facts_of(record)
    if len(found) != 1:
        raise UsageError(f"This record holds {len(found)} facts; one was expected.", param="facts")
    return found[0]


def facts_of(record: Mapping[str, Any]) -> list[Fact]:
    """One record in any of the formats. Raises UsageError when its fields fit none."""
    if not isinstance(record, Mapping):
        raise UsageError(f"A fact is a mapping of fields, not {type(record).__name__}.")
    keys = set(record)
    if isinstance(record.get("requested_rewrite"), list):
        return _mquake(record)
    if "requested_rewrite" in keys:
        return [_counterfact(record)]
    if {"src", "alt"} <= keys:
        return [_zsre(record)]
    if isinstance(record.get("edit"), Mapping):
        return [_ripple(record)]
    if "target_new" in keys or ("labels" in keys and "text" in keys):
        return [_easyedit(record)]
    if {"prompt", "target"} <= keys:
        return [_plain(record)]
    raise UsageError(
        f"This record fits no known format of facts (its fields: {', '.join(sorted(map(str, keys)))}).",
        hint="Plain facts have `prompt`, `target` and, if wished, `subject`.",
    )


def _plain(r: Mapping[str, Any]) -> Fact:
    """Ours, FastEdit's ({prompt, subject, target, queries}) and QAEdit's ({prompt, target, subject, rephrase})."""
    known = {
        "id",
        "prompt",
        "subject",
        "target",
        "old",
        "paraphrases",
        "neighbours",
        "portability",
        "occurrence",
        "references",
    }
    known |= {"queries", "rephrase", "locality", "source"}
    for key in r:
        if key not in known:
            raise UsageError(f"A fact has no field `{key}`.", hint=f"Fields: {', '.join(sorted(known))}.", param=key)
    subject = r.get("subject") or None
    filled = str(r["prompt"]).replace("{}", str(subject or ""))
    if subject is not None and "{}" not in str(r["prompt"]) and str(subject) not in filled:
        raise UsageError(f"The subject `{subject}` is not in the prompt `{filled}`.", param="subject")
    neighbours = [tuple(n) if isinstance(n, list) else n for n in r.get("neighbours") or ()]
    neighbours += [(item["loc"], item["loc_ans"]) for item in r.get("locality") or ()]
    return Fact(
        prompt=str(r["prompt"]),
        subject=str(subject) if subject is not None else None,
        target=str(r["target"]),
        old=r.get("old"),
        paraphrases=(*_texts(r.get("paraphrases")), *_texts(r.get("rephrase")), *_texts(r.get("queries"))),
        neighbours=tuple(neighbours),
        portability=tuple(_probe(p) for p in r.get("portability") or ()),
        references=_texts(r.get("references")),
        occurrence=r.get("occurrence"),
        id=str(r.get("id", "")),
    )


def _counterfact(r: Mapping[str, Any]) -> Fact:
    edit = r["requested_rewrite"]
    old = edit.get("target_true", {}).get("str")
    return Fact(
        prompt=edit["prompt"],
        subject=edit["subject"],
        target=edit["target_new"]["str"],
        old=old,
        paraphrases=tuple(r.get("paraphrase_prompts", ())),
        neighbours=tuple((prompt, old) for prompt in r.get("neighborhood_prompts", ())),
        id=str(r.get("case_id", "")),
    )


def _easyedit(r: Mapping[str, Any]) -> Fact:
    """EasyEdit's flat records and KnowEdit's (their `labels`/`text`/`concept` spelling included)."""
    prompt = str(r.get("prompt") or r.get("text"))
    target = _first(r.get("target_new", r.get("labels")))
    subject = r.get("subject") or r.get("concept")
    old = r.get("ground_truth")
    old = _first(old) if old is not None else None
    probes = [
        Probe(str(item["prompt"]), _alternatives(item["ground_truth"]), group)
        for group, items in (r.get("portability") or {}).items()
        for item in items
    ]
    neighbours: list[Any] = []
    if r.get("locality_prompt"):
        neighbours.append((str(r["locality_prompt"]), _first(r["locality_ground_truth"])))
    for items in (r.get("locality") or {}).values():
        neighbours += [(str(item["prompt"]), _first(item["ground_truth"])) for item in items]
    return Fact(
        prompt=prompt,
        subject=str(subject) if subject and str(subject) in prompt else None,
        target=target,
        old=old if old and old != target else None,
        paraphrases=_texts(r.get("rephrase_prompt")) + _texts(r.get("rephrase")),
        neighbours=tuple(neighbours),
        portability=tuple(probes),
        id=str(r.get("case_id", "")),
    )


def _zsre(r: Mapping[str, Any]) -> Fact:
    """MEND's zsRE: {src, subject, alt, answers, rephrase, loc, loc_ans}; `loc` is a natural question."""
    neighbours = ((str(r["loc"]), str(r["loc_ans"])),) if r.get("loc") else ()
    answers = _texts(r.get("answers"))
    return Fact(
        prompt=str(r["src"]),
        subject=str(r["subject"]) if r.get("subject") else None,
        target=str(r["alt"]),
        old=answers[0] if answers and answers[0] != r["alt"] else None,
        paraphrases=_texts(r.get("rephrase")),
        neighbours=neighbours,
        id=str(r.get("case_id", "")),
    )


def _mquake(r: Mapping[str, Any]) -> list[Fact]:
    """MQuAKE: one or more edits, and multi-hop questions that follow from all of them together."""
    answers = (str(r["new_answer"]), *_texts(r.get("new_answer_alias")))
    probes = [Probe(str(question), answers, "multi-hop") for question in r.get("questions", ())]
    hops = [
        Probe(str(hop["question"]), (str(hop["answer"]), *_texts(hop.get("answer_alias"))), "single-hop")
        for hop in r.get("new_single_hops", ())
    ]
    facts = []
    for place, edit in enumerate(r["requested_rewrite"]):
        old = edit.get("target_true", {}).get("str")
        facts.append(
            Fact(
                prompt=edit["prompt"],
                subject=edit["subject"],
                target=edit["target_new"]["str"],
                old=old,
                paraphrases=_texts(edit.get("question")),
                portability=tuple(probes + hops) if place == 0 else (),
                id=f"{r.get('case_id', '')}.{place}",
            )
        )
    return facts


def _ripple(r: Mapping[str, Any]) -> Fact:
    """RippleEdits: {edit{prompt, ...}, six criteria of test queries}. The edit's prompt ends with its target."""
    edit = r["edit"]
    original = edit.get("original_fact") or {}
    prompt, target = _split_statement(str(edit["prompt"]), str(original.get("prompt") or ""))
    probes = [
        Probe(
            str(query["prompt"]),
            _ripple_answers(query),
            group,
            tuple((str(q["prompt"]), _ripple_answers(q)) for q in item.get("condition_queries") or ()),
            test,
            item.get("test_condition") == "OR",
        )
        for group in RIPPLE_GROUPS
        for test, item in enumerate(r.get(group) or (), 1)
        for query in item["test_queries"]
        if query.get("answers")
    ]
    neighbours = [
        (str(query["prompt"]), _ripple_answers(query)[0])
        for group in RIPPLE_LOCALITY
        for item in r.get(group) or ()
        for query in item["test_queries"]
        if query.get("answers")
    ]
    return Fact(prompt, None, target, neighbours=tuple(neighbours), portability=tuple(probes))


def _split_statement(new: str, original: str) -> tuple[str, str]:
    """Two statements of one template -> (their common beginning, the new answer)."""
    common = 0
    for common, (a, b) in enumerate(zip(new, original, strict=False)):  # noqa: B007
        if a != b:
            break
    at = new.rfind(" ", 0, common + 1) if original else new.rstrip(". ").rfind(" ")
    if at <= 0:
        raise UsageError(f"`{new}` cannot be split into prompt and answer.", param="edit.prompt")
    return new[:at], new[at:].strip().rstrip(".")


def _ripple_answers(query: Mapping[str, Any]) -> tuple[str, ...]:
    found = [text for a in query["answers"] for text in (a["value"], *a.get("aliases", ()))]
    return tuple(map(str, found))


def _probe(item: Any) -> Any:
    if isinstance(item, Mapping):
        return Probe(str(item["prompt"]), _alternatives(item["answers"]), str(item.get("group", "")))
    return tuple(item)


def _first(value: Any) -> str:
    """The first of possibly nested alternatives."""
    while isinstance(value, list | tuple):
        if not value:
            return ""
        value = value[0]
    return str(value)


def _alternatives(value: Any) -> tuple[str, ...]:
    if isinstance(value, list | tuple):
        return tuple(text for item in value for text in _alternatives(item))
    return (str(value),)


def _texts(value: Any) -> tuple[str, ...]:
    if value is None or value == "":
        return ()
    return (value,) if isinstance(value, str) else tuple(map(str, value))


def _records(path: Path) -> Iterable[Any]:
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
        text = raw.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The facts file {path} cannot be read: {error}.", param="facts") from None
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind == ".csv":
        rows = csv.DictReader(text.splitlines())
        return [{key: value for key, value in row.items() if value} for row in rows]
    try:
        if kind == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is not valid JSON at line {error.lineno}: {error.msg}.", param="facts") from None
    return content if isinstance(content, list) else [content]
