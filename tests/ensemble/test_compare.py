"""Comparing, judging pairs, and ensembles of segments and answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gnomon.cli.main import run as command
from gnomon.ensemble import Ensemble
from gnomon.ensemble.answers import best_of, cool_fusion, last_number, majority
from gnomon.ensemble.check import check, sweep_gate, sweep_weight
from gnomon.ensemble.compare import Item, compare, read_items, svg
from gnomon.errors import UsageError
from gnomon.model import Model

TEXTS = ["the band", "in the sand"]
ITEMS = [Item("Question: a?\nAnswer:", (" the", " in the sand"), 0), Item("Question: b?\nAnswer:", (" a", " band"), 1)]


def test_references_are_compared_on_the_same_bytes_with_paired_intervals(duo_dirs: list[Path]) -> None:
    both = "+".join(map(str, duo_dirs))
    report = compare([*map(str, duo_dirs), both], TEXTS, ITEMS, threads=1)
    first, second, mixture = (row["bits_per_byte"]["value"] for row in report["rows"])
    assert mixture <= (first + second) / 2 + 1e-9
    for row in report["rows"]:
        for measure in ("bits_per_byte", "accuracy"):
            cell = row[measure]
            assert cell["low"] <= cell["value"] <= cell["high"]
    best = min(report["rows"], key=lambda row: row["bits_per_byte"]["value"])
    assert best["bits_per_byte_to_best"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    with Ensemble(duo_dirs, threads=1, core="byte") as ensemble:
        spent = [-np.log2(ensemble.byte_probabilities(t)["tiny-llama"][:-1]).sum() for t in TEXTS]
    assert first == pytest.approx(sum(spent) / sum(map(len, TEXTS)), rel=1e-9)
    assert svg(report).count("<circle") == 6


def test_the_command_prints_a_row_for_each_and_draws(
    duo_dirs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, picture = tmp_path / "text.txt", tmp_path / "plot.svg"
    text.write_text("\n\n".join(TEXTS))
    refs = list(map(str, duo_dirs))
    assert command(["compare", *refs, "--text", str(text), "--plot", str(picture), "--threads", "1", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["rows"]] == refs
    assert picture.read_text().startswith("<svg")
    assert command(["compare", *refs, "--text", str(tmp_path / "none.txt")]) == 2


def test_items_that_are_none_are_refused_with_their_line(tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    file.write_text('{"question": "q", "A": "x", "B": "y", "answer": "B"}\n{"question": "q"}\n')
    assert read_items(file, 1)[0].answer == 1
    with pytest.raises(UsageError, match="line 2"):
        read_items(file)


def test_a_check_measures_overlap_bits_and_cost(duo_dirs: list[Path]) -> None:
    with Ensemble(duo_dirs, threads=1, core="byte") as ensemble:
        report = check(ensemble, "the band in the sand")
        assert 0 < report["shared_strings"] < 1 and 0 < report["agreeing_boundaries"] <= 1
        assert report["tuned_bits_per_byte"] <= report["mixture_bits_per_byte"] + 1e-3
        assert report["findings"] and all(member["ms_per_token"] >= 0 for member in report["members"])
        grid = sweep_weight(ensemble, "the band in the sand", steps=3)
        assert [row["weight"] for row in grid] == [0, 0.5, 1]
    with Ensemble(duo_dirs, threads=1) as ensemble:
        shares = [row["fused_share"] for row in sweep_gate(ensemble, "the band in the sand")]
        assert shares == sorted(shares) and shares[-1] == 1.0


def test_weights_from_the_prompts_perplexity_favour_the_member_it_suits(duo: Model) -> None:
    prompt = "the band in the sand and the band"
    members = duo.members  # type: ignore[attr-defined]
    spent = [m.prompt_bits(m.tokenizer.encode(prompt), 64) for m in members]
    told = duo.generate(prompt, max_tokens=2, seed=1, logprobs=0, ensemble={"weigh": "perplexity", "sharpness": 50})
    alone = [float(spent[0] < spent[1]), float(spent[1] <= spent[0])]
    sharp = duo.generate(prompt, max_tokens=2, seed=1, logprobs=0, ensemble={"weights": alone})
    assert told.text == sharp.text and spent[0] != spent[1]


def test_segments_and_answers_are_chosen_by_all(duo_dirs: list[Path], tiny: Model, duo: Model) -> None:
    models = [tiny, duo.models[1]]  # type: ignore[attr-defined]
    fused = cool_fusion(models, "the band", max_segments=2, segment_tokens=3, temperature=0.9, seed=1, ignore_eos=True)
    assert fused.text == "".join(text for _, text, _ in fused.parts) and 1 <= len(fused.parts) <= 2
    best = best_of(models, "the band", max_tokens=4, temperature=0.9, seed=1, ignore_eos=True)
    assert best.parts[0][0] in ("tiny-llama", "tiny-gemma")
    voted = majority(models, "the band", n=2, max_tokens=3, temperature=0.9, seed=1, answer=lambda text: "same")
    assert voted.text == "same"
    with pytest.raises(UsageError, match="No text holds an answer"):
        majority(models, "the band", n=1, max_tokens=2, answer=lambda text: None)
    assert last_number("so 1,200 + 3 = 1,203.") == "1203" and last_number(" yes ") == "yes"
