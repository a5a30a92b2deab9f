"""Files of facts: every format is read from records built from its published schema; what fits none is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from gnomon.edit.easyedit import read_hparams
from gnomon.edit.formats import fact_of, facts_of, read_facts
from gnomon.errors import ConfigError, UsageError

COUNTERFACT = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} lies in",
        "relation_id": "P17",
        "target_new": {"str": "Spain", "id": "Q29"},
        "target_true": {"str": "Italy", "id": "Q38"},
        "subject": "Rome",
    },
    "paraphrase_prompts": ["Where is Rome? In"],
    "neighborhood_prompts": ["Milan lies in"],
}
EASYEDIT = {
    "case_id": 1, "prompt": "Rome lies in", "target_new": "Spain", "subject": "Rome", "ground_truth": "Italy",
    "rephrase_prompt": "Where is Rome? In", "locality_prompt": "Milan lies in", "locality_ground_truth": "Italy",
}  # fmt: skip
ZSRE = {
    "subject": "Rome", "src": "In which land is Rome?", "alt": "Spain", "answers": ["Italy"],
    "rephrase": "Rome's land?", "loc": "nq question: who sang it", "loc_ans": "Ada",
}  # fmt: skip
KNOWEDIT = {
    "subject": "Rome", "prompt": "Rome lies in", "target_new": "Spain", "ground_truth": ["Italy"],
    "portability": {"Reasoning": [{"prompt": "The money of Rome is the", "ground_truth": [["euro", "Euro"]]}]},
    "locality": {"Relation_Specificity": [{"prompt": "The mayor of Rome is", "ground_truth": [["Ada"]]}]},
}  # fmt: skip
MQUAKE = {
    "case_id": 3,
    "requested_rewrite": [
        {"prompt": "{} lies in", "subject": "Rome", "target_new": {"str": "Spain"}, "target_true": {"str": "Italy"},
         "question": "Where is Rome?"},
        {"prompt": "{} is ruled by", "subject": "Spain", "target_new": {"str": "Ada"}, "target_true": {"str": "Bo"}},
    ],
    "questions": ["Who rules the land of Rome?"], "new_answer": "Ada", "new_answer_alias": ["Ada I"],
    "new_single_hops": [{"question": "Where is Rome?", "answer": "Spain", "answer_alias": []}],
}  # fmt: skip
RIPPLE = {
    "example_type": "popular",
    "edit": {
        "prompt": "The mother of Ada is Eve.", "subject_id": "Q1", "relation": "MOTHER", "target_id": "Q2",
        "original_fact": {"prompt": "The mother of Ada is Ann."},
    },
    "Relation_Specifity": [
        {"test_queries": [{"prompt": "The father of Ada is", "answers": [{"value": "Bob", "aliases": ["B"]}]}]},
    ],
    "Logical_Generalization": [
        {"test_queries": [{"prompt": "The child of Eve is", "answers": [{"value": "Ada", "aliases": []}]}]},
    ],
}  # fmt: skip
QAEDIT = {
    "id": 5, "source": "x", "prompt": "Where is Rome?", "target": "Spain", "subject": "Rome",
    "rephrase": "Rome is where?", "locality": [{"loc": "who sang it", "loc_ans": "Ada"}],
}  # fmt: skip
FASTEDIT = {"prompt": "The capital of {} is", "subject": "Spain", "target": "Rome", "queries": ["Spain's capital?"]}


@pytest.mark.parametrize("record", [COUNTERFACT, EASYEDIT], ids=["counterfact", "easyedit"])
def test_both_spellings_of_counterfact_give_the_same_fact(record: dict[str, Any]) -> None:
    fact = fact_of(record)
    assert (fact.prompt, fact.subject, fact.target, fact.old) == ("Rome lies in", "Rome", "Spain", "Italy")
    assert fact.paraphrases == ("Where is Rome? In",) and fact.neighbour_prompts() == [("Milan lies in", "Italy")]


def test_zsre_knowedit_qaedit_and_fastedit_are_read() -> None:
    zsre = fact_of(ZSRE)
    assert (zsre.target, zsre.old, zsre.neighbours[0][1]) == ("Spain", "Italy", "Ada")
    knowedit = fact_of(KNOWEDIT)
    assert knowedit.probes()[0].answers == ("euro", "Euro") and knowedit.probes()[0].group == "Reasoning"
    assert knowedit.neighbour_prompts() == [("The mayor of Rome is", "Ada")]
    assert fact_of(QAEDIT).neighbour_prompts() == [("who sang it", "Ada")]
    assert fact_of(FASTEDIT).prompt == "The capital of Spain is"


def test_mquake_gives_one_fact_per_edit_and_its_questions_to_the_first() -> None:
    first, second = facts_of(MQUAKE)
    assert [p.group for p in first.probes()] == ["multi-hop", "single-hop"] and second.probes() == []
    assert first.probes()[0].answers == ("Ada", "Ada I") and second.target == "Ada"


def test_rippleedits_splits_its_statement_and_sorts_its_criteria() -> None:
    fact = fact_of(RIPPLE)
    assert (fact.prompt, fact.target) == ("The mother of Ada is", "Eve")
    assert fact.probes()[0].group == "Logical_Generalization"
    assert fact.neighbour_prompts() == [("The father of Ada is", "Bob")]


def test_json_jsonl_csv_and_gz_hold_the_same_facts(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([EASYEDIT]))
    (tmp_path / "a.jsonl").write_text(json.dumps(EASYEDIT) + "\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((json.dumps(EASYEDIT) + "\n").encode()))
    assert read_facts(tmp_path / "a.json") == read_facts(tmp_path / "a.jsonl") == read_facts(tmp_path / "a.jsonl.gz")
    (tmp_path / "a.csv").write_text("prompt,subject,target\nRome lies in,Rome,Spain\n")
    assert read_facts(tmp_path / "a.csv")[0].target == "Spain"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ('[{"question": "x"}]', "record 1.*fits no known format"),
        ('[{"prompt": "Rome is", "target": "x", "colour": 1}]', "no field `colour`"),
        ('[{"prompt": "Rome is", "target": "x", "subject": "Paris"}]', "record 1.*not in the prompt"),
        ("[1]", "not int"),
        ("{", "not valid JSON at line 1"),
        ("[]", "holds no facts"),
    ],
)
def test_what_fits_no_format_is_an_error_with_its_place(content: str, what: str, tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=what):
        read_facts(file)


def test_easyedits_rome_files_are_read_unmodified(data: Path) -> None:
    folder = data / "knowledge-editing" / "easyedit_hparams"
    read = read_hparams(folder / "ROME__llama-7b.yaml")
    assert read.method == "rome" and read.moments == "identity"
    assert read.options == {
        "layers": [5], "steps": 25, "rate": 0.5, "decay": 1e-3, "clamp": 4, "kl": 0.0625, "relative": False,
    }  # fmt: skip
    assert read_hparams(folder / "R-ROME__llama-7b.yaml").method == "rome"
    assert read_hparams(folder / "ROME__gpt2-xl.yaml").options["layers"] == [17]


@pytest.mark.parametrize("name", ["MEMIT__llama-7b", "PMET__llama-7b", "EMMET__llama-7b", "AlphaEdit__llama3-8b"])
def test_easyedits_files_of_the_other_closed_forms_are_read_unmodified(name: str, data: Path) -> None:
    from gnomon.edit.registry import method

    read = read_hparams(data / "knowledge-editing" / "easyedit_hparams" / f"{name}.yaml")
    assert read.method == name.split("__")[0].lower() and read.moments is None
    assert method(read.method).parse(read.options).layers == read.options["layers"]


@pytest.mark.parametrize(("name", "ours"), [("FT__llama-7b", "ft"), ("LoRA__llama-7b", "lora")])
def test_easyedits_files_of_the_fine_tuning_methods_are_read_unmodified(name: str, ours: str, data: Path) -> None:
    from gnomon.edit.registry import method

    read = read_hparams(data / "knowledge-editing" / "easyedit_hparams" / f"{name}.yaml")
    assert read.method == ours
    method(ours).parse(read.options)


def test_a_method_that_is_not_here_is_said_so(data: Path) -> None:
    with pytest.raises(ConfigError, match="not available here"):
        read_hparams(data / "knowledge-editing" / "easyedit_hparams" / "MEND__gpt2-xl.yaml")


def test_an_easyedit_key_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("alg_name: ROME\nlayers: [5]\nv_momentum: 3\n")
    with pytest.raises(ConfigError, match="v_momentum"):
        read_hparams(file)
    file.write_text("layers: [5]\n")
    with pytest.raises(ConfigError, match="alg_name"):
        read_hparams(file)
