"""What grammar.py measures with a model: decoding with a schema beside decoding without, and texts drawn at random.

In: its options. Out: the figures that it writes.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BENCH = ROOT / ".bench"

# -- decoding -----------------------------------------------------------------------------------------------------

PEOPLE = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "occupation": {"type": "string", "maxLength": 40},
        "year_of_birth": {"type": "integer", "minimum": 1000, "maximum": 2030},
        "nationality": {"enum": ["British", "French", "German", "American", "Polish", "other"]},
        "known_for": {"type": "array", "items": {"type": "string", "maxLength": 50}, "minItems": 2, "maxItems": 3},
        "is_alive": {"type": "boolean"},
    },
    "required": ["name", "occupation", "year_of_birth", "nationality", "known_for", "is_alive"],
    "additionalProperties": False,
}
CALL = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 30},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
    },
    "required": ["city", "unit", "days"],
    "additionalProperties": False,
}
FREE = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}


def decode(options: argparse.Namespace) -> dict[str, Any]:
    """The same prompt with a schema, and without one for as many tokens; alternating, medians."""
    import gnomon

    cases = {
        "person": (PEOPLE, "Tell me about Marie Curie as JSON."),
        "weather call": (CALL, "What will the weather be in Paris? Answer as JSON."),
        "one long string": (FREE, "Write a short story as JSON."),
    }
    result: dict[str, Any] = {"threads": options.threads}
    with gnomon.load(options.model, profile="fp32", threads=options.threads) as model:
        for name, (schema, prompt) in cases.items():
            rates: dict[str, list[float]] = {"with": [], "without": []}
            tokens = 0
            for round in range(options.rounds + 1):
                elapsed, made = _timed(model, prompt, grammar=schema, max_tokens=120)
                tokens = made.usage.completion_tokens
                free, _ = _timed(model, prompt, max_tokens=tokens, ignore_eos=True)
                if round:
                    rates["with"].append(tokens / elapsed)
                    rates["without"].append(tokens / free)
            ratios = [a / b for a, b in zip(rates["with"], rates["without"], strict=True)]
            kinds = Counter(made.trace.kinds) if made.trace else {}
            result[name] = {
                "tokens": tokens,
                "with": statistics.median(rates["with"]),
                "without": statistics.median(rates["without"]),
                "ratio": statistics.median(ratios),
                "ratio_spread": [min(ratios), max(ratios)],
                "kinds": dict(kinds),
            }
            print(name, result[name], flush=True)
    return result


def _timed(model: Any, prompt: str, **options: Any) -> tuple[float, Any]:
    started = time.perf_counter()
    made = model.chat(prompt, **options)
    return time.perf_counter() - started, made


# -- sampling -----------------------------------------------------------------------------------------------------


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema that some value satisfies, of many keywords."""
    kinds = ["string", "integer", "number", "boolean", "enum", "format", "pattern"]
    kind = rng.choice([*kinds, "object", "object", "array", "union"] if depth < 3 else kinds)
    if kind == "object":
        names = rng.sample(["id", "name", "tags", "size", "note", "at", "x-1", "ключ"], rng.randint(1, 4))
        properties = {name: random_schema(rng, depth + 1) for name in names}
        made: dict[str, Any] = {"type": "object", "properties": properties}
        made["required"] = rng.sample(names, rng.randint(0, len(names)))
        if rng.random() < 0.5:
            made["additionalProperties"] = False
        if rng.random() < 0.2:
            made["minProperties"] = 1
        if rng.random() < 0.2:
            made["dependentRequired"] = {names[0]: [names[-1]]}
        if rng.random() < 0.15:
            made["propertyNames"] = {"minLength": 1}
        return made
    if kind == "array":
        made = {"type": "array", "items": random_schema(rng, depth + 1), "maxItems": rng.randint(2, 6)}
        if rng.random() < 0.3:
            made["uniqueItems"] = True
        if rng.random() < 0.3 and not made.get("uniqueItems"):
            made["minItems"] = rng.randint(1, 2)
        if rng.random() < 0.15:
            made["contains"] = random_schema(rng, 3)
        return made
    if kind == "union":
        return {rng.choice(["anyOf", "oneOf"]): [random_schema(rng, depth + 1) for _ in range(rng.randint(2, 3))]}
    if kind == "enum":
        return {"enum": rng.sample(["red", "green", 1, 2.5, None, True, {"a": 1}, [1, 2], "日本"], rng.randint(1, 4))}
    if kind == "format":
        return {"type": "string", "format": rng.choice(["date", "time", "date-time", "email", "uuid", "ipv4", "uri"])}
    if kind == "pattern":
        patterns = [r"^[a-z]{2,8}$", r"^\d{3}-\d{4}$", r"^(?!no)\w{3,5}$", r"^v\d+(\.\d+){0,2}$", r"[A-Z]\d$"]
        return {"type": "string", "pattern": rng.choice(patterns)}
    if kind == "string":
        return {"type": "string", "minLength": rng.randint(0, 3), "maxLength": rng.randint(4, 60)}
    low = rng.randint(-50, 50)
    if kind == "integer":
        made = {"type": "integer", "minimum": low, "maximum": low + rng.randint(5, 10_000)}
        return made | ({"not": {"const": low + 1}} if rng.random() < 0.3 else {})
    return {"type": "number", "minimum": low} if kind == "number" else {"type": "boolean"}


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """Every text must be valid: by jsonschema-rs with formats, and whole within its limit."""
    import jsonschema_rs

    import gnomon
    from gnomon.errors import GrammarError
    from gnomon.grammar import compile

    path = BENCH / f"sampling-{options.count}.jsonl"
    done = [json.loads(line) for line in path.open()] if path.exists() else []
    rng = random.Random(options.seed)
    with gnomon.load(options.model, profile="fp32", threads=1) as model, path.open("a") as file:
        for place in range(options.count):
            schema, room, seed = random_schema(rng), rng.random(), rng.getrandbits(31)
            if place < len(done):
                continue
            row: dict[str, Any] = {"schema": schema}
            started = time.perf_counter()
            try:
                grammar = compile(schema)
                least = 1 if grammar.report.unsatisfiable else len(grammar.shortest_tokens(model.tokenizer))
                limit = least if place % 5 == 0 else least + round((place % 5) / 4 * room * 120)
                if grammar.report.unsatisfiable:
                    row["outcome"] = "unsatisfiable"
                else:
                    prompt = "Give an example value as JSON."
                    answer = model.chat(prompt, grammar=grammar, max_tokens=limit, temperature=1.0, seed=seed)
                    valid = jsonschema_rs.validator_for(schema, validate_formats=True).is_valid(json.loads(answer.text))
                    row |= {"outcome": "valid" if valid and answer.completed else "INVALID", "text": answer.text}
                    row |= {"least": least, "limit": limit, "finish": answer.finish_reason}
                    row["rollbacks"] = answer.trace.rollbacks
            except (GrammarError, ValueError) as error:
                row["outcome"] = f"refused: {error}"[:200]
            row["seconds"] = time.perf_counter() - started
            done.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
    done = done[: options.count]
    outcomes = Counter(row["outcome"].split(":")[0] for row in done)
    return {
        "schemas": len(done),
        "outcomes": dict(outcomes),
        "at the shortest limit": sum(row.get("limit") == row.get("least") for row in done if "limit" in row),
        "closed in time": sum(row.get("finish") == "length" for row in done),
        "rollbacks": sum(row.get("rollbacks", 0) for row in done),
        "wrong": [row for row in done if row["outcome"] not in ("valid", "unsatisfiable")],
    }
