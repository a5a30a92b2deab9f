"""Do members fit? Overlap, agreement, likelihood and cost, measured on a text; and sweeps of weight and threshold.

The rule of the literature (UniTE, arXiv 2410.03777): members whose quality differs by more than ten points on the task
hurt each other. Points here are percent of bits per byte, the only measure that needs no task. Takes an open ensemble.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from gnomon.ensemble.ensemble import Ensemble
from gnomon.ensemble.runner import Judged
from gnomon.ensemble.scoring import bits, mixed, tuned_weights
from gnomon.errors import UsageError

GAP = 10.0
MOST_BYTES = 4000
SAMPLE = (
    "The old lighthouse keeper climbed the stairs every evening to light the lamp, and counted one hundred and twelve "
    "steps. From the gallery he could see the fishing boats come home.\n"
    "Der alte Leuchtturmwärter stieg jeden Abend die Treppe hinauf, um die Lampe anzuzünden.\n"
    "Le vieux gardien du phare montait chaque soir l'escalier pour allumer la lampe, même en été.\n"
    "El viejo farero subía cada noche la escalera para encender la lámpara.\n"
    "老灯塔看守人每天晚上都爬上楼梯去点灯。\n"
    "def steps(count: int) -> list[int]:\n    return [step for step in range(1, count + 1) if step % 2 == 0]\n"
)


def check(ensemble: Ensemble, text: str) -> dict[str, Any]:
    """A report on members (name, vocabulary size, bits per byte, ms per token) with findings in sentences."""
    text = text.encode("utf-8")[:MOST_BYTES].decode("utf-8", "ignore")
    scored = {name: np.array(p[:-1]) for name, p in ensemble.byte_probabilities(text).items()}
    rows = []
    for member, model in zip(ensemble.members, ensemble.models, strict=True):
        rows.append(
            {
                "name": member.name,
                "vocabulary": sum(1 for t in member.retokenizer.texts if t),
                "bits_per_byte": round(bits(scored[member.name]), 4),
                "ms_per_token": round(_milliseconds(model), 2),
            }
        )
    report = {"bytes": len(text.encode()), "members": rows, **_overlap(ensemble, text)}
    weights = ensemble.policy.weights
    report["mixture_bits_per_byte"] = round(bits(mixed(list(scored.values()), weights)), 4)
    best = tuned_weights(list(scored.values()))
    report["tuned_weights"] = [round(w, 3) for w in best]
    report["tuned_bits_per_byte"] = round(bits(mixed(list(scored.values()), best)), 4)
    report["findings"] = _findings(report)
    return report


def _overlap(ensemble: Ensemble, text: str) -> dict[str, Any]:
    """Shares of shared strings, and of token boundaries that all members set."""
    vocabularies = [{t for t in member.retokenizer.texts if t} for member in ensemble.members]
    common, union = set.intersection(*vocabularies), set.union(*vocabularies)
    edges = []
    for member in ensemble.members:
        ends, place = set(), 0
        for token in member.retokenizer.ids(text.encode()):
            place += len(member.retokenizer.texts[token])
            ends.add(place)
        edges.append(ends)
    agreed = set.intersection(*edges)
    return {
        "shared_strings": round(len(common) / len(union), 4),
        "agreeing_boundaries": round(len(agreed) / len(set.union(*edges)), 4),
    }


def _findings(report: dict[str, Any]) -> list[str]:
    best = min(report["members"], key=lambda m: m["bits_per_byte"])
    lines = [
        f"{100 * report['shared_strings']:.1f} % of all token strings are shared; members set "
        f"{100 * report['agreeing_boundaries']:.0f} % of token boundaries at the same places.",
        f"The mixture needs {report['mixture_bits_per_byte']} bits per byte, the best member "
        f"({best['name']}) {best['bits_per_byte']}.",
    ]
    shown = ", ".join(str(w) for w in report["tuned_weights"])
    lines.append(f"With weights {shown} it needs {report['tuned_bits_per_byte']} (tuned on this very text).")
    for member in report["members"]:
        gap = 100 * (member["bits_per_byte"] / best["bits_per_byte"] - 1)
        if gap > GAP:
            lines.append(
                f"{member['name']} needs {gap:.0f} % more bits than {best['name']}: a gap above {GAP:.0f} points "
                "usually hurts. Give it a smaller weight, or make the better one primary behind a gate."
            )
    total = sum(m["ms_per_token"] for m in report["members"])
    lines.append(f"Expect about {total:.0f} ms per token (every token fused), as members run one after another.")
    return lines


def _milliseconds(model: Any, tokens: int = 12) -> float:
    """Milliseconds of one decoded token, alone: what `tokens` more of them cost."""
    spent = []
    for count in (1, 1 + tokens):
        started = time.perf_counter()
        model.generate("The keeper of the lighthouse", max_tokens=count, ignore_eos=True, seed=0)
        spent.append(time.perf_counter() - started)
    return max(0.0, 1000 * (spent[1] - spent[0]) / tokens)


def sweep_weight(ensemble: Ensemble, text: str, steps: int = 11) -> list[dict[str, float]]:
    """Bits per byte for weights of the first of two members."""
    if len(ensemble.members) != 2:
        raise UsageError("A weight is swept between two members.", param="ensemble.members")
    text = text.encode("utf-8")[:MOST_BYTES].decode("utf-8", "ignore")
    first, second = (np.array(p[:-1]) for p in ensemble.byte_probabilities(text).values())
    grid = [place / (steps - 1) for place in range(steps)]
    return [{"weight": round(w, 4), "bits_per_byte": round(bits(mixed([first, second], [w, 1 - w])), 5)} for w in grid]


def sweep_gate(ensemble: Ensemble, text: str) -> list[dict[str, float]]:
    """What a gate would do on this text at each threshold: the share of tokens it would fuse, and bits per byte.

    Thresholds 0 (the primary alone) and 1 (all but certain tokens) are the ends of the scale.
    """
    data = text.encode("utf-8")[:MOST_BYTES].decode("utf-8", "ignore")
    (seen,) = ensemble.judge("", [data])
    size = len(data.encode("utf-8"))
    grid = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    return [{"threshold": t, **gated(seen, size, t)} for t in grid]


def gated(seen: Sequence[Judged], size: int, threshold: float) -> dict[str, float]:
    """The share of fused tokens and the bits per byte of a text under a gate."""
    spent = sum(j.fused if j.best < threshold else j.alone for j in seen)
    opened = sum(j.best < threshold for j in seen)
    return {
        "fused_share": round(opened / len(seen), 4),
        "bits_per_byte": round(-spent / math.log(2) / size, 4),
    }
