"""`gnomon explain`: why each token of a run is there."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import typer

from gnomon.cli.common import print_json, print_table
from gnomon.explanation import Explanation, Step
from gnomon.explanation import explain as explained
from gnomon.ledger import Ledger

app = typer.Typer(add_completion=False, rich_markup_mode=None)
WORDS = {
    "favourite": "",
    "forced": "the grammar left nothing else",
    "masked": "the grammar forbade the favourite",
    "closed": "to end in time",
    "drawn": "by chance",
    "shifted": "by a penalty or a bias",
}


@app.command()
def explain(
    id: str = typer.Argument(..., help="The run's id, or its beginning (gnomon runs ls)."),
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """Generate a run of the ledger again, and say of each token what the model thought and what changed its mind.

    P is the model's own probability, before penalties, bias, grammar and temperature. Ends with code 1 when the run
    does not come again bit for bit.
    """
    from gnomon.loading import load

    runs = Ledger().find(id)
    with load(runs[0].reference, profile=runs[0].profile, ledger=False) as model:
        found = explained(runs, model)
    if json:
        print_json([_plain(explanation) for explanation in found])
    else:
        for explanation in found:
            _show(explanation)
    if not all(explanation.replay.ok for explanation in found):
        raise typer.Exit(1)


def _show(explanation: Explanation) -> None:
    run, replay = explanation.run, explanation.replay
    choice = f"/{run.choice}" if run.choice else ""
    verdict = "identical bit for bit" if replay.ok else f"{replay.verdict}: {replay.detail}"
    print(f"{run.id}{choice}   {run.model} {run.profile} {run.fingerprint}   seed {run.seed}   {verdict}")
    if explanation.generation is None:
        return
    rows = [(place, *_cells(step)) for place, step in enumerate(explanation.steps)]
    print_table(("", "TOKEN", "P", "FAVOURITE", "P", "WHY"), rows)
    for finding in explanation.generation.findings:
        where = " (in the prompt)" if finding.get("where") == "input" else ""
        print(f"guard: {finding['rule']} at {finding['start']}..{finding['end']}, {finding['action']}{where}")
    for name in run.options.get("patches") or []:
        print(f"patched: {name}")
    print(f"ended: {run.finish_reason}")


def _cells(step: Step) -> tuple[str, str, str, str, str]:
    text, other = ("", "") if step.favourite is None else (repr(step.favourite[0]), _percent(step.favourite[1]))
    why = [WORDS[step.why]] if WORDS[step.why] else []
    if step.kept_mass is not None and step.kept_mass < 0.9995:
        why.append(f"grammar kept {_percent(step.kept_mass)}")
    if (ensemble := (step.runner or {}).get("ensemble")) is not None:
        votes = [f"{name} {_percent(math.exp(vote))}" for name, vote in ensemble["votes"].items() if vote is not None]
        why.append(f"votes: {', '.join(votes)}")
    return repr(step.text), _percent(step.probability), text, other, ", ".join(why)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.001 else f"{100 * share:.1e} %"


def _plain(explanation: Explanation) -> dict[str, Any]:
    made = explanation.generation
    return {
        "verdict": explanation.replay.verdict,
        "detail": explanation.replay.detail,
        "run": asdict(explanation.run),
        "steps": [asdict(step) for step in explanation.steps],
        "findings": [dict(finding) for finding in made.findings] if made else [],
    }
