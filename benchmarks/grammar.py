"""Grammars beside the peers: the official suite, real schemas, times of masks, decoding, and texts drawn at random.

    python benchmarks/grammar.py suite    [--suite DIR]     JSON-Schema-Test-Suite; DIR: a checkout, for every draft
    python benchmarks/grammar.py real     [--count 250]     what grammar_schemas.py collected; peers: the first 250
    python benchmarks/grammar.py masks                      first mask and mask average, 49k and 262k vocabularies
    python benchmarks/grammar.py decode                     tokens a second with a schema and without
    python benchmarks/grammar.py sampling                   500 schemas at temperature 1, limits from shortest to long
Peers (llguidance alone, xgrammar 0.2.8, outlines-core 0.2.14, lm-format-enforcer 0.11.3, llama.cpp) run in
.bench/grammar's interpreter, every schema in a process of its own (grammar_engines.py). `suite`, `real` and `sampling`
go on where they were stopped. Each writes benchmarks/results/grammar_NAME.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from grammar_generating import BENCH, ROOT, decode, sampling

from gnomon.models.reference import open_checkpoint

RESULTS = Path(os.environ.get("GRAMMAR_RESULTS", ROOT / "benchmarks" / "results"))
DATA = Path(os.environ.get("GNOMON_DATA", ROOT / ".." / "shared" / "data")) / "controlled-generation"
DRAFTS = {
    "draft4": "http://json-schema.org/draft-04/schema#",
    "draft6": "http://json-schema.org/draft-06/schema#",
    "draft7": "http://json-schema.org/draft-07/schema#",
    "draft2019-09": "https://json-schema.org/draft/2019-09/schema",
    "draft2020-12": None,
}
OURS = ("gnomon", "llguidance")
ENGINES = ("gnomon", "llguidance", "xgrammar", "outlines", "lmformatenforcer", "llamacpp")


def vocabulary(model: str) -> Path:
    """A model's tokens as a file that every engine reads."""
    path = BENCH / f"vocabulary-{model}.json"
    if not path.exists():
        checkpoint = open_checkpoint(model)
        tokenizer = checkpoint.tokenizer()
        found = {
            "tokens": [tokenizer.token_bytes(i).hex() for i in range(tokenizer.vocab_size)],
            "special": sorted(tokenizer.special_ids | tokenizer.eos_token_ids),
            "end": min(tokenizer.eos_token_ids),
            "gguf": str(checkpoint.path),
            "model": model,
        }
        path.write_text(json.dumps(found))
    return path


class Engine:
    """A driver process of one engine; started again when it dies."""

    def __init__(self, name: str, model: str, **environment: str) -> None:
        python = sys.executable if name in OURS else str(BENCH / "grammar" / "bin" / "python")
        script = str(ROOT / "benchmarks" / "grammar_engines.py")
        self.process = subprocess.Popen(
            [python, script, name, str(vocabulary(model))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"} | environment,
        )
        assert json.loads(self._line())["ready"]

    def __call__(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        found: dict[str, Any] = json.loads(self._line())
        return found

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def resumed(
    path: Path, jobs: list[dict[str, Any]], engine: str, model: str, **environment: str
) -> list[dict[str, Any]]:
    """Answers for all jobs, in order; those that a file has already are not made again."""
    done = [json.loads(line) for line in path.open()] if path.exists() else []
    if len(done) < len(jobs):
        driver = Engine(engine, model, **environment)
        with path.open("a") as file:
            for job in jobs[len(done) :]:
                answer = driver(job)
                done.append(answer)
                file.write(json.dumps(answer) + "\n")
                file.flush()
        driver.close()
    return done[: len(jobs)]


# -- the official suite -------------------------------------------------------------------------------------------


def suite_groups(draft: str, checkout: Path | None) -> list[tuple[str, Any, list[dict[str, Any]], dict[str, Any]]]:
    """(name, schema, tests, documents) for every group of required tests."""
    if checkout is not None:
        folder = checkout / "tests" / draft
        suite = {file.name: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
        remotes = {
            str(file.relative_to(checkout / "remotes")): json.loads(file.read_text())
            for file in (checkout / "remotes").rglob("*.json")
        }
    else:
        folder = DATA / "json-schema-test-suite"
        content = json.loads(gzip.decompress((folder / f"{draft}.json.gz").read_bytes()))
        suite = {name: groups for name, groups in content.items() if not name.startswith("optional")}
        remotes = json.loads((folder / "remotes.json").read_text())
    documents = {
        f"http://localhost:1234/{path}": (
            {"$schema": DRAFTS[draft], **document}
            if DRAFTS[draft] and isinstance(document, dict) and not path.startswith("draft")
            else document
        )
        for path, document in remotes.items()
        if path.startswith(f"{draft}/") or not path.startswith(("draft", "v1"))
    }
    found = []
    for file, groups in suite.items():
        for group in groups:
            schema = group["schema"]
            if DRAFTS[draft] and isinstance(schema, dict):
                schema = {"$schema": DRAFTS[draft]} | schema
            remote = documents if "localhost:1234" in json.dumps(schema) else {}
            found.append((f"{file}: {group['description']}", schema, group["tests"], remote))
    return found


def suite(options: argparse.Namespace) -> dict[str, Any]:
    folder = BENCH / "suite-out"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = open_checkpoint(options.model).tokenizer()
    drafts = options.drafts or (DRAFTS if options.suite else ("draft7", "draft2020-12"))
    result: dict[str, Any] = {}
    for draft in drafts:
        groups = suite_groups(draft, options.suite)
        jobs = [
            {
                "schema": schema,
                "registry": documents,
                "texts": [tokenizer.encode(compact(test["data"]), add_special_tokens=False) for test in tests],
            }
            for _, schema, tests, documents in groups
        ]
        for name in options.engines:
            for formats in ("annotate", "assert") if name == "gnomon" else ("",):
                label = f"{name} ({formats} formats)" if formats else name
                path = folder / f"{draft}-{name}{formats}.jsonl"
                answers = resumed(path, jobs, name, options.model, GRAMMAR_FORMATS=formats or "assert")
                result.setdefault(draft, {})[label] = suite_row(groups, answers, listed=name == "gnomon")
                print(draft, label, {k: v for k, v in result[draft][label].items() if k != "missed"}, flush=True)
    return result


def suite_row(groups: list[Any], answers: list[dict[str, Any]], *, listed: bool) -> dict[str, Any]:
    count: Counter[str] = Counter()
    missed = []
    for (name, _, tests, _), answer in zip(groups, answers, strict=True):
        count["schemas"] += 1
        count["tests"] += len(tests)
        if answer["status"] != "ok":
            count["schemas refused"] += 1
            missed.append({"schema": name, "tests": len(tests), "reason": answer.get("error", answer["status"])})
            continue
        for test, accepted in zip(tests, answer["verdicts"] or [], strict=answer["verdicts"] is not None):
            if accepted == test["valid"]:
                count["right"] += 1
                continue
            count["invalid accepted" if accepted else "valid refused"] += 1
            reason = why(name, test["data"]) if not accepted else "INVALID ACCEPTED"
            missed.append({"schema": name, "test": test["description"], "reason": reason})
    row = {name: count[name] for name in ("tests", "right", "valid refused", "invalid accepted", "schemas refused")}
    return {**row, "share": count["right"] / count["tests"], **({"missed": missed} if listed else {})}


def why(name: str, data: Any) -> str:
    """Why this compiler refuses a value that is valid."""
    if name.startswith("format.json"):
        return "a format is asserted, where the draft only annotates"
    if "0}" in compact({"": data}) or ".0" in compact(data):
        return "a whole number written with a decimal point; decoding writes it without"
    return "another order of keys than decoding writes"


# -- real schemas -------------------------------------------------------------------------------------------------


def real_jobs(model: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(schemas with instances, jobs)."""
    source, judged = BENCH / "schemas" / "schemas.jsonl", BENCH / "schemas" / "instances.jsonl"
    if not judged.exists():
        script = str(ROOT / "benchmarks" / "grammar_instances.py")
        part = judged.with_suffix(".part")
        with source.open() as given, part.open("w") as out:
            subprocess.run([str(BENCH / "grammar/bin/python"), script], stdin=given, stdout=out, check=True)
        part.rename(judged)
    tokenizer = open_checkpoint(model).tokenizer()
    schemas = [json.loads(line) for line in judged.open()]
    jobs = [
        {
            "schema": one["schema"],
            "texts": [tokenizer.encode(i["text"], add_special_tokens=False) for i in one["instances"]],
        }
        for one in schemas
    ]
    return schemas, jobs


def real(options: argparse.Namespace) -> dict[str, Any]:
    schemas, jobs = real_jobs(options.model)
    instances = sum(len(one["instances"]) for one in schemas)
    result: dict[str, Any] = {"schemas": len(schemas), "instances": instances}
    result |= json.loads((BENCH / "schemas" / "about.json").read_text())
    beside = options.count or len(jobs)
    for name in options.engines:
        count = len(jobs) if name in OURS else beside
        answers = resumed(BENCH / "schemas" / f"real-{name}.jsonl", jobs[:count], name, options.model)
        result[name] = real_row(schemas[:count], answers, listed=name == "gnomon")
        if name in OURS and beside < count:
            result[f"{name}, the first {beside}"] = real_row(schemas[:beside], answers[:beside], listed=False)
        print(name, {key: value for key, value in result[name].items() if key != "missed"}, flush=True)
    return result


def real_row(schemas: list[dict[str, Any]], answers: list[dict[str, Any]], *, listed: bool) -> dict[str, Any]:
    count: Counter[str] = Counter(answer["status"] for answer in answers)
    passing, missed = 0, []
    for one, answer in zip(schemas, answers, strict=True):
        where = f"{one['source']}: {one['path']}"
        if answer["status"] != "ok":
            missed.append({"schema": where, "reason": answer.get("error", answer["status"])})
            continue
        wrong = [
            (instance, accepted)
            for instance, accepted in zip(one["instances"], answer["verdicts"] or [], strict=False)
            if accepted != instance["valid"]
        ]
        passing += not wrong
        for instance, accepted in wrong:
            kind = "invalid accepted" if accepted else "valid refused"
            count[kind] += 1
            missed.append({"schema": where, "reason": kind, "text": instance["text"][:300]})
        count["valid"] += sum(i["valid"] for i in one["instances"])
        count["invalid"] += sum(not i["valid"] for i in one["instances"])
    row = {
        "schemas": len(answers),
        "compiled": count["ok"],
        "compiled_share": count["ok"] / len(answers),
        "passing": passing,
        "refused": count["refused"],
        "timeout": count["timeout"],
        "died": count["died"],
        "valid refused": f"{count['valid refused']}/{count['valid']}",
        "invalid accepted": f"{count['invalid accepted']}/{count['invalid']}",
    }
    if all(answer.get("verdicts") is None for answer in answers):
        return {name: row[name] for name in ("schemas", "compiled", "refused", "timeout", "died")}
    return row | times(answers) | ({"missed": missed} if listed else {})


def times(answers: list[dict[str, Any]]) -> dict[str, Any]:
    first = sorted(answer["first_ms"] for answer in answers if "first_ms" in answer)
    masks = sorted(mask for answer in answers for mask in answer.get("masks_us", ()))
    if not first or not masks:
        return {}
    return {
        "first_ms": {"p50": first[len(first) // 2], "p90": first[len(first) * 9 // 10], "max": first[-1]},
        "mask_us": {
            "mean": statistics.fmean(masks),
            "p50": masks[len(masks) // 2],
            "p99": masks[len(masks) * 99 // 100],
            "count": len(masks),
        },
    }


# -- times --------------------------------------------------------------------------------------------------------


def masks(options: argparse.Namespace) -> dict[str, Any]:
    """A sample of the real schemas, on a quiet machine: engine after engine on the same schema, then the next."""
    result: dict[str, Any] = {}
    for model, engines in (
        (options.model, [name for name in options.engines if name != "lmformatenforcer"]),
        ("gemma-3-270m", [name for name in options.engines if name in OURS]),
    ):
        _, jobs = real_jobs(model)
        chosen = random.Random(7).sample(range(len(jobs)), options.count)
        drivers = {name: Engine(name, model, GRAMMAR_SECONDS="2") for name in engines}
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
        stop = time.monotonic() + options.seconds / 2
        for place in chosen:
            if time.monotonic() > stop:
                break
            for name, driver in drivers.items():
                answers[name].append(driver(jobs[place]))
        for driver in drivers.values():
            driver.close()
        size = open_checkpoint(model).tokenizer().vocab_size
        rows = {
            name: {"schemas": len(found), **dict(Counter(one["status"] for one in found)), **times(found)}
            for name, found in answers.items()
        }
        taken = [place for place, one in enumerate(answers.get("llguidance", ())) if one["status"] == "ok"]
        if taken and "gnomon" in answers:
            both = [answers["gnomon"][place] for place in taken]
            rows["gnomon, where llguidance alone compiles"] = {"schemas": len(both), **times(both)}
        result[f"{model} ({size})"] = rows
        print(model, json.dumps(result[f"{model} ({size})"], indent=1), flush=True)
    return result


SECTIONS = {"suite": suite, "real": real, "masks": masks, "decode": decode, "sampling": sampling}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=list(SECTIONS))
    parser.add_argument("--engines", type=lambda text: tuple(text.split(",")), default=ENGINES)
    parser.add_argument("--suite", type=Path, help="a checkout of JSON-Schema-Test-Suite")
    parser.add_argument("--drafts", type=lambda text: tuple(text.split(",")), help="some of them only")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--count", type=int, default=None)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=20261125)
    options = parser.parse_args()
    options.count = options.count or {"sampling": 500, "masks": 300}.get(options.section, 0)
    BENCH.mkdir(exist_ok=True)
    found = SECTIONS[options.section](options)
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("gnomon", "llguidance", "jsonschema_rs", "numpy")},
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
        ).stdout.strip(),
    }
    RESULTS.joinpath(f"grammar_{options.section}.json").write_text(json.dumps({**about, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
