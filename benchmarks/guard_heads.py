"""Heads measured: prompt injection on sources they never saw, every token judged by the co-processor, intents.

Trained on S-Labs' train split alone; measured on its test half, the same with lengths matched, and per unseen source of
injections against bank customers' questions, which nobody trained on either. `sentence`: a linear head on MiniLM's
vectors (the shipped one is of this kind); `states`: the same on the mean of the 135M model's final hidden states;
`tokens`: the co-processor's two heads on each token's. Controversial: texts on which a strict and a loose head, both
trained on others, disagree. Draws benchmarks/results/guard_heads.svg. Vectors and states are cached under .bench/heads.
    python benchmarks/guard_states.py && python benchmarks/guard_heads.py [--write-head injection.safetensors]
        [--write-intents intents.safetensors] [--only-intents]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
from guard_states import CACHE, MODEL, ROOT, Labelled, States, few, states, table

from gnomon.guard.coprocessor import Example, Heads, fit
from gnomon.guard.head import Head, length_matched, train
from gnomon.guard.scanners.embedding import DEFAULT, vectors

RESULTS = ROOT / "benchmarks" / "results"
ROUNDS = 60
UNSEEN = ("multilingual", "indirect", "gcg")
Scores = dict[str, np.ndarray]


def embedded(name: str, rows: list[Labelled]) -> np.ndarray:
    """Cached sentence vectors, made 64 texts at a time."""
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / f"{DEFAULT}-{name.replace(' ', '-')}-{len(rows)}.npy"
    if not path.exists():
        texts = [row.text for row in rows]
        np.save(path, np.concatenate([vectors(texts[at : at + 64]) for at in range(0, len(texts), 64)]))
        print("embedded", name, len(rows), flush=True)
    found: np.ndarray = np.load(path)
    return found


def positive(rows: list[Labelled]) -> np.ndarray:
    return np.array([row.label == "1" for row in rows])


def roc(score_N: np.ndarray, truth_N: np.ndarray) -> dict[str, Any]:
    """Area, false alarms where 95 % (and 80 %) are found, and the curve, thinned."""
    order = np.argsort(-score_N, kind="stable")
    found, wrong = np.cumsum(truth_N[order]) / truth_N.sum(), np.cumsum(~truth_N[order]) / (~truth_N).sum()
    good, bad = np.sort(score_N[truth_N]), np.sort(score_N[~truth_N])
    below = np.searchsorted(bad, good, side="left") + np.searchsorted(bad, good, side="right")
    at = {share: float((bad >= good[int((1 - share) * len(good))]).mean()) for share in (0.95, 0.8)}
    keep = np.unique(np.linspace(0, len(order) - 1, 150).astype(int))
    return {
        "injections": int(truth_N.sum()),
        "others": int((~truth_N).sum()),
        "auc": round(float(below.sum() / 2 / (len(good) * len(bad))), 4),
        "false_alarms_at_95_percent_found": round(at[0.95], 4),
        "false_alarms_at_80_percent_found": round(at[0.8], 4),
        "curve": [[round(float(wrong[i]), 4), round(float(found[i]), 4)] for i in keep],
    }


def measured(texts: dict[str, list[Labelled]], scores: Scores) -> dict[str, Any]:
    """A detector of injections everywhere; its threshold finds 95 % of the validation split's."""
    test, truth = texts["slabs test"], positive(texts["slabs test"])
    valid = np.sort(scores["slabs validation"][positive(texts["slabs validation"])])
    threshold = float(valid[int(0.05 * len(valid))])
    chosen = length_matched([len(row.text) for row in test], [row.label for row in test])
    result: dict[str, Any] = {
        "threshold_finding_95_percent_of_validation": threshold,
        "test": roc(scores["slabs test"], truth),
        "test_with_lengths_matched": roc(scores["slabs test"][chosen], truth[chosen]),
        "at_that_threshold": {
            "test found": round(float((scores["slabs test"][truth] >= threshold).mean()), 4),
            "test false alarms": round(float((scores["slabs test"][~truth] >= threshold).mean()), 4),
            "bank false alarms": round(float((scores["bank"] >= threshold).mean()), 4),
        },
        "unseen": {},
    }
    for name in UNSEEN:
        both = np.concatenate([scores[name], scores["bank"]])
        labels = np.array([True] * len(scores[name]) + [False] * len(scores["bank"]))
        lengths = [len(row.text) for row in texts[name] + texts["bank"]]
        chosen = length_matched(lengths, [str(int(label)) for label in labels])
        result["unseen"][name] = {"against bank": roc(both, labels)}
        if len(chosen) >= 40:
            result["unseen"][name]["lengths matched"] = roc(both[chosen], labels[chosen])
        result["at_that_threshold"][f"{name} found"] = round(float((scores[name] >= threshold).mean()), 4)
    return result


def linear(texts: dict[str, list[Labelled]], vectors_of: dict[str, np.ndarray], model: str) -> tuple[Scores, Head]:
    head = train(vectors_of["slabs train"], [row.label for row in texts["slabs train"]], model=model)
    place = head.labels.index("1")
    return {name: head.scores(vectors_of[name])[:, place] for name in texts if name != "slabs train"}, head


def worst_pair(heads: Heads, read: States) -> np.ndarray:
    """What the co-processor says of whole texts: the gravest that two tokens in a row agree on."""
    found = []
    for one in read.hidden:
        risky_T = 1 - heads.judge(one)[0][:, 0]
        found.append(float(np.minimum(risky_T[1:], risky_T[:-1]).max()) if len(risky_T) > 1 else 0.0)
    return np.array(found)


def examples(rows: list[Labelled], category: str) -> list[Example]:
    return [Example(r.text, "unsafe" if r.label == "1" else "safe", category, r.boundary) for r in rows]


def tokens(texts: dict[str, list[Labelled]], read: dict[str, States]) -> dict[str, Any]:
    """The co-processor's heads on S-Labs alone, whole and joined behind safe text: everywhere, and where it notices."""
    names = ("slabs train", "slabs joined train")
    known = [one for name in names for one in examples(texts[name], "injection")][::3]
    hidden = [one for name in names for one in read[name].hidden][::3]
    heads = fit(known, hidden, [one for name in names for one in read[name].ends][::3], MODEL, rounds=ROUNDS)
    result = {"trained_on": len(known)} | measured(
        texts, {name: worst_pair(heads, read[name]) for name in texts if name not in names}
    )
    threshold = result["threshold_finding_95_percent_of_validation"]
    early = delays = 0
    late: list[int] = []
    joined = texts["slabs joined test"]
    for row, states_TC, ends in zip(joined, *read["slabs joined test"], strict=True):
        risky_T = 1 - heads.judge(states_TC)[0][:, 0]
        both_T = np.minimum(risky_T[1:], risky_T[:-1]) >= threshold
        first = int(np.argmax(both_T)) + 1 if both_T.any() else -1
        boundary = next(place for place, end in enumerate(ends) if end > row.boundary)
        early += 0 <= first < boundary
        if first >= boundary:
            late.append(first - boundary + 1)
            delays += 1
    return result | {
        "joined": {
            "texts": len(joined),
            "noticed_before_the_injection_begins": early,
            "noticed_in_it": delays,
            "tokens_into_it_median": float(np.median(late)) if late else None,
            "tokens_into_it_90th_percentile": float(np.percentile(late, 90)) if late else None,
        }
    }


def kinds(texts: dict[str, list[Labelled]], read: dict[str, States]) -> dict[str, Any]:
    """Risk and category from half of every source; measured on the other half.

    Controversial, as in Qwen3Guard's report: of the trained half, the texts on which a head that rather alarms and one
    that rather does not, both trained on other texts, disagree.
    """
    category = {"slabs train": "injection", "multilingual": "injection", "indirect": "hidden", "gcg": "suffix"}
    parts: dict[int, list[tuple[Example, np.ndarray, list[int], str]]] = {0: [], 1: []}
    for name in (*category, "bank train"):
        rows = examples(texts[name], category.get(name, ""))
        for place, (one, states_TC, ends) in enumerate(zip(rows, *read[name], strict=True)):
            if name == "slabs train" and place % 4 > 1:
                continue
            parts[place % 2].append((one, states_TC, ends, name))

    def fitted(chosen: list[tuple[Example, np.ndarray, list[int], str]], rounds: int = ROUNDS) -> Heads:
        return fit([c[0] for c in chosen], [c[1] for c in chosen], [c[2] for c in chosen], MODEL, rounds=rounds)

    def risky(heads: Heads, chosen: list[tuple[Example, np.ndarray, list[int], str]]) -> np.ndarray:
        return worst_pair(heads, States([c[1] for c in chosen], [])) >= 0.5

    known = parts[0]
    disputed = np.zeros(len(known), bool)
    for half in (0, 1):
        others = [one for place, one in enumerate(known) if place // 2 % 2 != half]
        asked = [place for place in range(len(known)) if place // 2 % 2 == half]
        safe, unsafe = ([one for one in others if one[0].risk == risk] for risk in ("safe", "unsafe"))
        strict, loose = fitted(safe[::3] + unsafe, ROUNDS // 2), fitted(safe + unsafe[::3], ROUNDS // 2)
        mine = [known[place] for place in asked]
        disputed[asked] = risky(strict, mine) != risky(loose, mine)
    relabelled = [
        (Example(one.text, "controversial" if odd else one.risk, one.category or "injection"), *rest)
        for (one, *rest), odd in zip(known, disputed, strict=True)
    ]
    heads = fitted(relabelled)  # type: ignore[arg-type]
    result: dict[str, Any] = {"trained_on": len(known), "controversial_among_them": int(disputed.sum()), "sources": {}}
    for name in (*category, "bank train"):
        held = [one for one in parts[1] if one[3] == name]
        worst, kinds_found = [], []
        for one in held:
            risk_T3, kind_TK = heads.judge(one[1])
            risky_T = 1 - risk_T3[:, 0]
            at = int(np.minimum(risky_T[1:], risky_T[:-1]).argmax()) + 1 if len(risky_T) > 1 else 0
            both = min(risky_T[at], risky_T[at - 1])
            worst.append("safe" if both < 0.5 else "unsafe" if risk_T3[at, 2] >= risk_T3[at, 1] else "controversial")
            kinds_found.append(heads.categories[int(kind_TK[at].argmax())])
        truth = [one[0].risk == "unsafe" for one in held]
        share = {risk: worst.count(risk) for risk in ("safe", "controversial", "unsafe")}
        right = [k == category[name] for k, t in zip(kinds_found, truth, strict=True) if t] if name in category else []
        result["sources"][name] = {
            "texts": len(held),
            "injections": sum(truth),
            "said": share,
            "found_strict": _share([w != "safe" for w, t in zip(worst, truth, strict=True) if t]),
            "found_loose": _share([w == "unsafe" for w, t in zip(worst, truth, strict=True) if t]),
            "false_alarms_strict": _share([w != "safe" for w, t in zip(worst, truth, strict=True) if not t]),
            "false_alarms_loose": _share([w == "unsafe" for w, t in zip(worst, truth, strict=True) if not t]),
            "category_right": _share(right),
        }
    return result


def _share(values: list[bool]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def calibrated(head: Head, vectors_NC: np.ndarray, labels: list[str]) -> tuple[Head, float]:
    """The head at the temperature that gives these texts, which it was not trained on, the most probability."""
    place_N = np.array([head.labels.index(label) for label in labels])
    heads = {t: Head(head.weight_CK * t, head.bias_K * t, head.labels, head.model) for t in np.linspace(0.5, 8, 76)}
    rows = np.arange(len(labels))
    fit = {t: float(np.log(one.scores(vectors_NC)[rows, place_N]).mean()) for t, one in heads.items()}
    best = max(fit, key=fit.__getitem__)
    return heads[best], float(best)


def intents(harmless: list[Labelled]) -> tuple[dict[str, Any], Head]:
    """Banking77: which of 77 things a customer wants; and as a check, of some wanted intents, or of any at all.

    wanted: half of the intents, drawn ten times; found is what wants another. any: found is harmless text of S-Labs,
    which wants nothing of a bank. The areas and false alarms are those of the scanner's own scores.
    """
    rows, asked = (table(f"banking77_{part}", "text", "category") for part in ("train.csv", "test.sample.jsonl"))
    known, held = rows[::3], rows[1::18]
    head = train(embedded("intents train", known), [row.label for row in known], model=DEFAULT, rounds=300)
    head, sharper = calibrated(head, embedded("intents held", held), [row.label for row in held])
    scores, labels = head.scores(embedded("intents test", asked)), np.array([row.label for row in asked])
    right = np.array(head.labels)[scores.argmax(1)] == labels
    halves = []
    for seed in range(10):
        wanted = np.random.default_rng(seed).permutation(len(head.labels))[: len(head.labels) // 2]
        foreign = ~np.isin(labels, np.array(head.labels)[wanted])
        halves.append(_detector(1 - scores[:, wanted].sum(1), foreign))
    elsewhere = head.scores(embedded("intents elsewhere", harmless))
    best = np.concatenate([scores.max(1), elsewhere.max(1)])
    return {
        "trained_on": len(known),
        "texts": len(asked),
        "labels": len(head.labels),
        "accuracy": round(float(right.mean()), 4),
        "temperature": sharper,
        "mean_probability_of_the_likeliest": round(float(scores.max(1).mean()), 4),
        "wanted_least_median_most": {
            key: [round(float(np.quantile([one[key] for one in halves], share)), 4) for share in (0, 0.5, 1)]
            for key in halves[0]
        },
        "any": _detector(1 - best, np.arange(len(best)) >= len(asked)) | {"elsewhere": len(harmless)},
    }, head


def _detector(score_N: np.ndarray, truth_N: np.ndarray) -> dict[str, Any]:
    """The ROC's figures, and what the scanner's own threshold of one half does."""
    figures = {key: value for key, value in roc(score_N, truth_N).items() if key.startswith(("auc", "false"))}
    figures["found_at_one_half"] = round(float((score_N[truth_N] >= 0.5).mean()), 4)
    return figures | {"false_alarms_at_one_half": round(float((score_N[~truth_N] >= 0.5).mean()), 4)}


def picture(detectors: dict[str, Any]) -> str:
    """Found against false alarms, by hand: the source trained on, and those never seen."""
    left, top, size, gap = 50, 40, 260, 70
    colours = {"sentence": "#1f6feb", "states": "#e67e22", "tokens": "#2e8b57"}
    panels = {"S-Labs test": ("test",), "lengths matched": ("test_with_lengths_matched",)}
    panels |= {f"{name} (never seen)": ("unseen", name, "against bank") for name in UNSEEN}
    width = left + len(panels) * (size + gap)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top + size + 60}" font-family="sans-serif" '
        'font-size="13"><rect width="100%" height="100%" fill="white"/>'
    ]
    for number, (title, path) in enumerate(panels.items()):
        x0 = left + number * (size + gap)
        parts.append(f'<text x="{x0}" y="{top - 12}">{title}</text>')
        for share in (0, 0.5, 0.95, 1):
            y = top + size * (1 - share)
            parts.append(f'<line x1="{x0}" x2="{x0 + size}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
            parts.append(f'<text x="{x0 - 6}" y="{y + 4:.1f}" text-anchor="end" font-size="10">{share:.0%}</text>')
        for name, one in detectors.items():
            for key in path:
                one = one[key]
            points = " ".join(f"{x0 + size * a:.1f},{top + size * (1 - b):.1f}" for a, b in [(0, 0), *one["curve"]])
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colours[name]}" stroke-width="2"/>')
        parts.append(f'<text x="{x0 + size}" y="{top + size + 16}" text-anchor="end">false alarms</text>')
    for number, (name, colour) in enumerate(colours.items()):
        parts.append(f'<text x="{left + 140 * number}" y="{top + size + 45}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def written_intents(path: Path | None) -> dict[str, Any]:
    """What was measured; the head goes to `path`."""
    harmless = [row for row in table("slabs_test.sample.jsonl") if row.label == "0"]
    result, head = intents(harmless)
    if path is not None:
        about = {"trained_on": "Banking77, train split (PolyAI, CC BY 4.0)", "measured": result}
        Head(head.weight_CK, head.bias_K, head.labels, head.model, about).write(path)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write-head", type=Path)
    parser.add_argument("--write-intents", type=Path)
    parser.add_argument("--only-intents", action="store_true", help="keep the other results as they are")
    arguments = parser.parse_args()
    if arguments.only_intents:
        result = json.loads((RESULTS / "guard_heads.json").read_text())
        result["intents"] = written_intents(arguments.write_intents)
        (RESULTS / "guard_heads.json").write_text(json.dumps(result, indent=1) + "\n")
        return
    texts = few()
    result: dict[str, Any] = {"machine": {"cpu": platform.machine(), "cores": os.cpu_count()}, "injection": {}}

    def keep() -> None:
        (RESULTS / "guard_heads.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "guard_heads.svg").write_text(picture(result["injection"]))
        print("kept", list(result), list(result["injection"]), flush=True)

    read = {name: states(name, rows) for name, rows in texts.items()}
    means = {name: np.stack([one.astype(np.float32).mean(0) for one in found.hidden]) for name, found in read.items()}
    scores, _ = linear(texts, means, MODEL)
    result["injection"]["states"] = {"trained_on": len(texts["slabs train"])} | measured(texts, scores)
    keep()
    scores, head = linear(texts, {name: embedded(name, rows) for name, rows in texts.items()}, DEFAULT)
    sentence = {"trained_on": len(texts["slabs train"])} | measured(texts, scores)
    result["injection"] = {"sentence": sentence} | result["injection"]
    keep()
    result["injection"]["tokens"] = tokens(texts, read)
    keep()
    result["every_source"] = kinds(texts, read)
    keep()
    result["intents"] = written_intents(arguments.write_intents)
    keep()
    if arguments.write_head is not None:
        test = {key: value for key, value in sentence["test"].items() if key != "curve"}
        about = {"trained_on": "S-Labs prompt injection data, train split (MIT)", "test": test}
        Head(head.weight_CK, head.bias_K, head.labels, head.model, about).write(arguments.write_head)


if __name__ == "__main__":
    main()
