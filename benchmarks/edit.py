"""Knowledge editing measured: single edits by method, time per edit, sequences under the guard.

    python benchmarks/edit.py single  --model smollm2-135m-instruct --methods rome --facts 100
    python benchmarks/edit.py sequence --methods rome,alphaedit,encore --facts 100
    python benchmarks/edit.py batch    --methods memit --facts 100
    python benchmarks/edit.py time     --facts 10
    python benchmarks/edit.py sweep    --layers 8,12,16 --facts 50 --set frames=3 --updates '{"strength": [1, 1.3]}'

Facts: CounterFact rows beside the project (GNOMON_DATA); `single` takes the first ones (or from `--first N` on),
`sweep` rows from 1,000 on. Every fact's record is kept as it comes (benchmarks/results/edit_*.jsonl), so that a run
can be interrupted and goes on; summaries are written beside them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import gnomon
from gnomon.edit import Fact, edit, evaluate
from gnomon.edit.evaluation import means
from gnomon.edit.formats import read_facts
from gnomon.edit.protocols import harmonic

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PROTOCOLS = ("wild", "probability", "teacher")
NOTES = ("layer", "steps", "loss", "relative_norm")
"""What is kept of a fact's report; its text stays where it is."""
HELD_OUT = 1000
JUDGED = ("reliability", "generalization", "locality")


def counterfact(start: int, count: int) -> list[Fact]:
    data = Path(os.environ.get("GNOMON_DATA", ROOT / ".." / "shared" / "data"))
    return read_facts(data / "knowledge-editing" / "counterfact_0000_1999.jsonl.gz")[start : start + count]


def single(
    model: Any, methods: list[str], facts: list[Fact], label: str, hyper: dict[str, Any], protocols: list[str]
) -> None:
    """One edit per fact, each alone, judged by these protocols."""
    file = RESULTS / f"edit_single_{model.name}{label}.jsonl"
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(record["method"], record["fact"]) for record in known}
    with file.open("a") as out:
        for fact in facts:
            for method in methods:
                if (method, fact.id) in done:
                    continue
                record: dict[str, Any] = {"method": method, "fact": fact.id}
                started, cpu = time.perf_counter(), time.process_time()
                try:
                    patch = edit(model, fact, method=method, report=False, **hyper)
                except gnomon.GnomonError as error:
                    record |= {"failed": str(error)}
                else:
                    record |= {
                        "seconds": round(time.perf_counter() - started, 2),
                        "cpu_seconds": round(time.process_time() - cpu, 2),
                        "bytes": patch.bytes,
                        "notes": {k: v for k, v in patch.report["facts"][0].items() if k in NOTES},
                        **judged(model, patch, fact, protocols),
                    }
                out.write(json.dumps(record) + "\n")
                out.flush()
                known.append(record)
    summarise(model.name + label, known)


def judged(model: Any, patch: Any, fact: Fact, protocols: list[str]) -> dict[str, Any]:
    """The verdicts of these protocols, and what was said."""
    found = evaluate(model, patch, [fact], protocols)
    said = {d["metric"]: d["after"] for d in found.details if d["protocol"] == "wild"}
    return {"rows": [dict(row) for row in found], "says": said}


def summarise(label: str, records: list[dict[str, Any]]) -> None:
    """Means with 95 % intervals per method and protocol, as JSON and on the screen."""
    rows = []
    for method in dict.fromkeys(record["method"] for record in records):
        own = [record for record in records if record["method"] == method]
        worked = [record for record in own if "rows" in record]
        for protocol in PROTOCOLS:
            found = [row for record in worked for row in record["rows"] if row["protocol"] == protocol]
            if not found:
                continue
            row = {"method": method, "protocol": protocol, "failed": len(own) - len(worked), **means(found)}
            row |= {
                "seconds_median": statistics.median(r["seconds"] for r in worked),
                "cpu_seconds_median": statistics.median(r["cpu_seconds"] for r in worked),
            }
            rows.append(row)
    write(f"edit_single_{label}.json", {"rows": rows})
    for row in rows:
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})


def tell(record: dict[str, Any]) -> None:
    print(record["facts"][0], record["perplexity"], record["kept"], record.get("failed", ""), flush=True)


def sequence(model: Any, methods: list[str], facts: list[Fact], hyper: dict[str, Any]) -> None:
    """Edits one after another: perplexity with and without the guard."""
    from gnomon.edit.guard import Guard, edit_sequence, perplexity

    rows = []
    for method in methods:
        for guarded in (False, True) if method == "rome" else (False,):
            guard = Guard() if guarded else Guard(most=1e9)
            result = edit_sequence(model, facts, method=method, guard=guard, told=tell, **hyper)
            judged = evaluate(model, result.patch, facts).rows[0] if result.patch is not None else {}
            row = {
                "method": method,
                "guarded": guarded,
                "unedited": perplexity(model),
                "perplexity": [record["perplexity"] for record in result.records],
                "taken_back": sum(not record["kept"] for record in result.records),
                **{key: judged.get(key) for key in ("reliability", "generalization", "locality")},
            }
            rows.append(row)
            print({**row, "perplexity": row["perplexity"][-1]}, flush=True)
            write(f"edit_sequence_{model.name}.json", {"rows": rows})


def batch(model: Any, method: str, facts: list[Fact], hyper: dict[str, Any]) -> None:
    """All facts in one edit: seconds, perplexity before and after, and every fact judged under the one patch."""
    from gnomon.edit.guard import perplexity

    edit(model, facts[0], method=method, report=False, **hyper)  # moments and module are there now
    unedited, started, cpu = perplexity(model), time.perf_counter(), time.process_time()
    patch = edit(model, facts, method=method, report=False, **hyper)
    row: dict[str, Any] = {
        "method": method,
        "facts": len(facts),
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "bytes": patch.bytes,
        "unedited": unedited,
        "perplexity": perplexity(model.with_patches([patch])),
        "steps": statistics.mean(told["steps"] for told in patch.report["facts"]),
    }
    write(f"edit_batch_{model.name}.json", row)
    row |= {key: value for key, value in evaluate(model, patch, facts).rows[0].items() if key in (*JUDGED, "chat")}
    write(f"edit_batch_{model.name}.json", row)
    print(row)


def timing(model: Any, facts: list[Fact]) -> None:
    """Seconds per ROME edit with moments and layer known."""
    edit(model, facts[0], report=False)  # moments and module are there now
    seconds = []
    for fact in facts:
        started = time.perf_counter()
        edit(model, fact, report=False)
        seconds.append(time.perf_counter() - started)
    row = {"median": statistics.median(seconds), "all": [round(s, 2) for s in seconds]}
    write(f"edit_time_{model.name}.json", row)
    print(row)


def sweep(
    model: Any, facts: list[Fact], layers: list[int], hyper: dict[str, Any], updates: dict[str, Any], tokens: int
) -> None:
    """ROME over layers and settings: one search per fact and layer, from which every update is made and judged.

    One line per fact, layer and update in results/edit_sweep_MODEL.jsonl; lines that are there are not made again.
    """
    from gnomon.edit.contrast import contrast_keys
    from gnomon.edit.editor import Editor
    from gnomon.edit.evaluation import RAW_TOKENS, looks
    from gnomon.edit.methods.rome import RomeOptions, update
    from gnomon.edit.protocols import kept, says
    from gnomon.edit.search import find_value
    from gnomon.models.patch import Patch

    file = RESULTS / f"edit_sweep_{model.name}.jsonl"
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(r["fact"], json.dumps(r["setting"], sort_keys=True)) for r in known}
    editor = Editor.of(model, tokens=tokens)
    editor.moments(layers)
    variants = [dict(zip(updates, values, strict=True)) for values in itertools.product(*updates.values())]
    before: dict[str, list[str]] = {}

    def told(models: list[Any], asked: list[Any]) -> list[list[str]]:
        options = {"temperature": 0.0, "max_tokens": RAW_TOKENS, "stop": ["\n"]}
        handles = [[one.submit(look.prompt, options, chat=look.chat) for look in asked] for one in models]
        return [[handle.collect()[0].text for handle in row] for row in handles]

    with file.open("a") as out:
        for fact, layer in ((fact, layer) for fact in facts for layer in layers):
            settings = [{"tokens": tokens, **hyper, "layers": layer, **variant} for variant in variants]
            settings = [s for s in settings if (fact.id, json.dumps(s, sort_keys=True)) not in done]
            if not settings:
                continue
            parsed = [
                RomeOptions(**{k: [v] if k == "layers" else v for k, v in s.items() if k != "tokens"}) for s in settings
            ]
            started = time.process_time()
            found = find_value(editor, fact, layer, parsed[0])
            searched = time.process_time() - started
            avoided = contrast_keys(editor, fact, layer) if any(p.contrast for p in parsed) else None
            asked = [look for look in looks(model, fact) if look.metric in JUDGED]
            if fact.id not in before:
                before[fact.id] = told([model], asked)[0]
            worn = []
            for one in parsed:
                change = update(editor.factor(layer, one.ridge), found, one, avoided)
                deltas = {editor.tensor(layer): editor.low_rank(layer, change)}
                worn.append(model.with_patches([Patch(deltas, model.checkpoint.identity, {}, {}, {})]))
            for setting, texts in zip(settings, told(worn, asked), strict=True):
                record: dict[str, Any] = {"fact": fact.id, "setting": setting, "search": round(searched, 2)}
                record |= {"steps": found.value.steps, "loss": round(found.value.loss, 3), "says": {}}
                for look, old, new in zip(asked, before[fact.id], texts, strict=True):
                    right = look.answers[0] if look.answers else None
                    good = kept(old, new, fact.target, right) if look.metric == "locality" else says(new, look.answers)
                    record[look.metric] = float(good)
                    record["says"][look.metric] = new
                out.write(json.dumps(record) + "\n")
                known.append(record)
            out.flush()
            for one in worn:
                one.close()
            print(fact.id, layer, searched, time.process_time() - started, flush=True)
    sweep_table(model.name, known)


def sweep_table(name: str, records: list[dict[str, Any]]) -> None:
    """Means per setting, best harmonic mean first, as JSON and on the screen."""
    rows = []
    by_setting: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_setting.setdefault(json.dumps(record["setting"], sort_keys=True), []).append(record)
    for setting, own in by_setting.items():
        three = [statistics.mean(r[m] for r in own) for m in JUDGED]
        rows.append((harmonic(three), len(own), *three, setting))
    rows.sort(reverse=True)
    named = [dict(zip(("harmonic", "facts", *JUDGED), row, strict=False)) | {"setting": row[-1]} for row in rows]
    write(f"edit_sweep_{name}.json", {"rows": named})
    for row in rows:
        told = zip(("rel", "para", "kept"), row[2:5], strict=True)
        shares = "  ".join(f"{name} {share:.3f}" for name, share in told)
        print(f"{row[0]:.3f}  n={row[1]:3d}  {shares}  {row[5]}")


def write(name: str, content: dict[str, Any]) -> None:
    about = {
        "machine": platform.machine(),
        "processors": len(os.sched_getaffinity(0)),
        "load": os.getloadavg(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / name).write_text(json.dumps({**content, "about": about}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("single", "sequence", "batch", "time", "sweep"))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--methods", default="rome")
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--first", type=int, help="first row of CounterFact; default: 0, for `sweep` 1,000")
    parser.add_argument("--protocols", default=",".join(PROTOCOLS), help="single: how edits are judged")
    parser.add_argument("--layers", default="")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--updates", default="{}", help="sweep: lists of values of the update's options, all combined")
    parser.add_argument("--tokens", type=int, default=30_000, help="sweep: tokens of the moments")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    hyper = {key: json.loads(value) for key, _, value in (item.partition("=") for item in given.set)}
    methods = given.methods.split(",")
    torch.set_num_threads(given.threads)
    with gnomon.load(given.model, profile="fp32", threads=given.threads, ledger=False) as model:
        if given.what == "single":
            single(model, methods, counterfact(given.first or 0, given.facts), "", hyper, given.protocols.split(","))
        elif given.what == "sequence":
            sequence(model, methods, counterfact(given.first or 0, given.facts), hyper)
        elif given.what == "batch":
            batch(model, methods[0], counterfact(given.first or 0, given.facts), hyper)
        elif given.what == "time":
            timing(model, counterfact(0, given.facts))
        else:
            facts = counterfact(HELD_OUT if given.first is None else given.first, given.facts)
            sweep(
                model, facts, [int(n) for n in given.layers.split(",")], hyper, json.loads(given.updates), given.tokens
            )


if __name__ == "__main__":
    main()
