"""Values for grammar.py's schemas: some that fit, some spoilt, each judged by the `jsonschema` package (none of ours).

    python benchmarks/grammar_instances.py < schemas.jsonl > instances.jsonl     (by an interpreter that has jsonschema)
A value counts as valid when it is with formats asserted, as invalid when it is not even without; between the two it is
left out. Each schema has SECONDS; the values are drawn with a seed of the schema's own text.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import signal
import sys
from typing import Any

import jsonschema

SECONDS = 4
VALID, INVALID = 3, 5
FORMATS = {
    "date-time": "2024-05-17T10:20:30Z",
    "date": "2024-05-17",
    "time": "10:20:30Z",
    "email": "ada@example.org",
    "uri": "https://example.org/a",
    "uri-reference": "/a/b",
    "uuid": "3f2504e0-4f89-41d3-9a0c-0305e82c3301",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "hostname": "example.org",
    "duration": "P1D",
    "regex": "a*",
    "json-pointer": "/a",
}
WORDS = ("alpha", "beta", "gamma", "42", "x", "Zürich", "a b", "1.0.0", "v1", "/tmp/a", "en", "2024-05-17", "#ff0000")


class Maker:
    """Draws a value that a schema probably takes."""

    def __init__(self, schema: Any, rng: random.Random) -> None:
        self.root, self.rng = schema, rng

    def resolved(self, schema: Any) -> Any:
        for _ in range(20):
            if not isinstance(schema, dict) or not isinstance(schema.get("$ref"), str):
                return schema
            target = self.root
            for step in schema["$ref"].lstrip("#").strip("/").split("/") if schema["$ref"] != "#" else []:
                step = step.replace("~1", "/").replace("~0", "~").replace("%24", "$")
                target = target[int(step)] if isinstance(target, list) else target.get(step, {})
            rest = {key: value for key, value in schema.items() if key != "$ref"}
            schema = {**target, **rest} if isinstance(target, dict) and rest else target
        return schema

    def make(self, schema: Any, depth: int = 0) -> Any:
        schema = self.resolved(schema)
        rng = self.rng
        if not isinstance(schema, dict) or depth > 12:
            return rng.choice([None, True, 3, "x"]) if depth <= 12 else {}
        if "const" in schema:
            return schema["const"]
        if schema.get("enum"):
            return rng.choice(schema["enum"])
        for key in ("examples", "default"):
            if key in schema and rng.random() < 0.2:
                return rng.choice(schema[key]) if key == "examples" and schema[key] else schema[key]
        for part in schema.get("allOf", []):
            part = self.resolved(part)
            if isinstance(part, dict):
                schema = merged(schema, part)
        for key in ("anyOf", "oneOf"):
            if schema.get(key):
                branch = self.resolved(rng.choice(schema[key]))
                if isinstance(branch, dict):
                    return self.make(merged({k: v for k, v in schema.items() if k != key}, branch), depth + 1)
        kind = schema.get("type")
        if isinstance(kind, list):
            kind = rng.choice(kind)
        if kind is None:
            kind = "object" if {"properties", "required", "additionalProperties"} & set(schema) else None
            kind = kind or ("array" if "items" in schema else None)
            kind = kind or ("string" if {"pattern", "format", "minLength"} & set(schema) else None)
            kind = kind or ("number" if "minimum" in schema else rng.choice(["string", "integer", "boolean"]))
        return getattr(self, f"_{kind}", lambda *_: None)(schema, depth)

    def _object(self, schema: dict[str, Any], depth: int) -> Any:
        required, made = set(schema.get("required") or ()), {}
        chance = 0.7 if depth < 2 else 0.25 if depth < 5 else 0.0
        properties = schema.get("properties") or {}
        for name, below in properties.items():
            if below is not False and (name in required or self.rng.random() < chance):
                made[name] = self.make(below, depth + 1)
        extra = schema.get("additionalProperties")
        for name in [n for n in required if n not in made]:
            made[name] = self.make(extra if isinstance(extra, dict) else {}, depth + 1)
        if isinstance(extra, dict) and self.rng.random() < 0.5:
            made[self.rng.choice(["alpha", "beta"])] = self.make(extra, depth + 1)
        for least in range(int(schema.get("minProperties", 0)) - len(made)):
            made[f"k{least}"] = self.make(extra if isinstance(extra, dict) else {}, depth + 1)
        return made

    def _array(self, schema: dict[str, Any], depth: int) -> Any:
        items = schema.get("items", {})
        prefix = schema.get("prefixItems") or (items if isinstance(items, list) else [])
        least = int(schema.get("minItems", 0))
        count = max(least, min(int(schema.get("maxItems", 3)), self.rng.choice([0, 1, 2, 3]) if depth < 5 else 0))
        made = [self.make(part, depth + 1) for part in prefix[: max(count, least)]]
        item = items if isinstance(items, dict) else {}
        while len(made) < count:
            made.append(self.make(item, depth + 1))
        return made

    def _string(self, schema: dict[str, Any], depth: int) -> Any:
        if schema.get("format") in FORMATS:
            return FORMATS[schema["format"]]
        if "pattern" in schema:
            return self._fitting(schema["pattern"])
        text = self.rng.choice(WORDS)
        least, most = int(schema.get("minLength", 0)), schema.get("maxLength")
        text = text + "abcdefgh"[: max(0, least - len(text))] + "z" * max(0, least - len(text) - 8)
        return text if most is None else text[: int(most)]

    def _fitting(self, pattern: str) -> str:
        """A text that a pattern probably takes, by the reader of Python's own expressions."""
        import re
        import re._parser as reader

        try:
            return self._of_tree(list(reader.parse(pattern.replace("(?<", "(?P<") if "(?<" in pattern else pattern)))
        except (re.error, RecursionError, TypeError, ValueError):
            return self.rng.choice(WORDS)

    def _of_tree(self, tree: Any) -> str:
        out = []
        for operator, value in tree:
            name = str(operator)
            if name == "LITERAL":
                out.append(chr(value))
            elif name in ("MAX_REPEAT", "MIN_REPEAT"):
                low, high, below = value
                for _ in range(self.rng.randint(low, min(int(high), low + 3))):
                    out.append(self._of_tree(below))
            elif name == "SUBPATTERN":
                out.append(self._of_tree(value[-1]))
            elif name == "BRANCH":
                out.append(self._of_tree(self.rng.choice(value[1])))
            elif name == "IN":
                out.append(self._one_of(value))
            elif name == "NOT_LITERAL":
                out.append("b" if value == ord("a") else "a")
            elif name == "ANY":
                out.append("a")
        return "".join(out)

    def _one_of(self, parts: Any) -> str:
        if str(parts[0][0]) == "NEGATE":
            return "~"
        operator, value = self.rng.choice(parts)
        if str(operator) == "RANGE":
            return chr(self.rng.randint(value[0], value[1]))
        if str(operator) == "LITERAL":
            return chr(value)
        return {"CATEGORY_DIGIT": "7", "CATEGORY_SPACE": " ", "CATEGORY_NOT_SPACE": "s"}.get(str(value), "w")

    def _integer(self, schema: dict[str, Any], depth: int) -> Any:
        low, high = schema.get("minimum", 0), schema.get("maximum", schema.get("minimum", 0) + 100)
        step = schema.get("multipleOf", 1) or 1
        value = self.rng.randint(int(low), max(int(low), int(high)))
        return int(value // step * step) if isinstance(step, int) else value

    def _number(self, schema: dict[str, Any], depth: int) -> Any:
        low, high = schema.get("minimum", 0), schema.get("maximum", 100)
        return round(self.rng.uniform(low, max(low, high)), 2) if "multipleOf" not in schema else low

    def _boolean(self, schema: dict[str, Any], depth: int) -> Any:
        return self.rng.random() < 0.5


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    out = {**first, **second}
    out["required"] = [*(first.get("required") or []), *(second.get("required") or [])]
    if first.get("properties") and second.get("properties"):
        out["properties"] = {**first["properties"], **second["properties"]}
    out.pop("allOf", None)
    return out


def spoilt(value: Any, rng: random.Random) -> Any:
    """The value with one thing changed somewhere."""
    if isinstance(value, dict) and value and rng.random() < 0.7:
        name = rng.choice(list(value))
        if rng.random() < 0.35:
            return {key: item for key, item in value.items() if key != name}
        return {key: spoilt(item, rng) if key == name else item for key, item in value.items()}
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return [spoilt(item, rng) if n == place else item for n, item in enumerate(value)]
    if isinstance(value, dict) and rng.random() < 0.5:
        return {**value, "notThere": 1}
    others = [None, True, -1, 1.5, 10**7, "", "?? no such value", [], {}, ["x"], {"notThere": 1}]
    return rng.choice([other for other in others if type(other) is not type(value) or rng.random() < 0.4])


def instances(schema: Any, files: list[str]) -> list[dict[str, Any]]:
    """files: texts that come with the schema; values are drawn until there are enough of both kinds."""
    rng = random.Random(hashlib.sha256(json.dumps(schema).encode()).digest())
    cls = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    judge = _Judge(cls(schema, format_checker=cls.FORMAT_CHECKER), cls(schema))
    for text in files:
        with contextlib.suppress(*_FAULTS):
            judge.take(json.loads(text), VALID + len(files), INVALID + len(files))
    maker, base = Maker(schema, rng), [{}]
    for attempt in range(60):
        if judge.has_enough():
            break
        fresh = attempt % 2 == 0
        with contextlib.suppress(*_FAULTS):
            value = maker.make(schema) if fresh else spoilt(rng.choice(base), rng)
            judge.take(value, VALID, INVALID)
            if fresh:
                base.append(value)
    return [{"text": text, "valid": ok} for text, ok in judge.found.items()]


_FAULTS = (ArithmeticError, LookupError, ValueError, TypeError, AttributeError, RecursionError)


class _Judge:
    """Values that are certainly valid or certainly not, as texts."""

    def __init__(self, strict: Any, loose: Any) -> None:
        self.strict, self.loose = strict, loose
        self.found: dict[str, bool] = {}

    def has_enough(self) -> bool:
        valid = sum(self.found.values())
        return valid >= VALID and len(self.found) - valid >= INVALID

    def take(self, value: Any, most_valid: int, most_invalid: int) -> None:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        if len(text) > 4000 or text in self.found:
            return
        valid = sum(self.found.values())
        ok, wrong = self.strict.is_valid(value), not self.loose.is_valid(value)
        if (ok and valid < most_valid) or (wrong and len(self.found) - valid < most_invalid):
            self.found[text] = ok


class _Late(Exception):
    pass


def _late(*_: object) -> None:
    raise _Late


def main() -> None:
    signal.signal(signal.SIGALRM, _late)
    for line in sys.stdin:
        one = json.loads(line)
        signal.alarm(SECONDS)
        try:
            one["instances"] = instances(one["schema"], one.get("files", []))
        except _Late:
            one["instances"] = []
        except Exception as error:  # a reference that the judge cannot follow: no values for this schema
            one["instances"], one["note"] = [], f"{type(error).__name__}: {error}"[:200]
        finally:
            signal.alarm(0)
        print(json.dumps(one), flush=True)


if __name__ == "__main__":
    main()
