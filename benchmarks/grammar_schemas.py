"""Real schemas for grammar.py: what SchemaStore collects and what packages ship, never committed.

    python benchmarks/grammar_schemas.py --store DIR [--folder .bench/schemas] [--count 1000]
DIR: a checkout of github.com/SchemaStore/schemastore (without one, packages alone). Writes FOLDER/schemas.jsonl, a line
a schema: {"source", "path", "schema", "files"}, files being the texts that SchemaStore keeps to test the schema with.
A package gives at most PER_PACKAGE schemas, drawn with a fixed seed; a description of an HTTP interface (OpenAPI) gives
its named components, each with what it refers to. Left out, and counted: what refers to another document (no engine
here can be handed one), what is no valid schema of its own draft, and repetitions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs

PER_PACKAGE = 125
MOST_BYTES = 400_000
"""A document longer than this is left out: it is a whole language, not the shape of one answer."""
MOST_TEXT = 4000
"""A file longer than this is no answer of a model either."""
MOST_FILES = 6
WHEELS = ["kubernetes-validate", "great-expectations", "jupyterlab", "check-jsonschema"]
NPM = ["kubernetes-client", "@octokit/openapi", "@asyncapi/specs"]


def fetch(folder: Path) -> list[Path]:
    """Archives of every package, by `pip download` (wheels only: nothing is built) and `npm pack`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in WHEELS:
        if not (folder / f"{name}.done").exists():
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", name]
            _try([*command, "-d", str(folder)], folder, name)
    for name in NPM:
        if not (folder / f"{name.replace('/', '+')}.done").exists():
            _try(["npm", "pack", "--silent", "--pack-destination", str(folder), name], folder, name.replace("/", "+"))
    return sorted([*folder.glob("*.whl"), *folder.glob("*.tgz")])


def _try(command: list[str], folder: Path, name: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{name}: not fetched: {(done.stderr.strip().splitlines() or ['?'])[-1][:120]}", file=sys.stderr)
    (folder / f"{name}.done").touch()


def documents(archive: Path) -> Iterator[tuple[str, Any]]:
    """(path, JSON value) for every JSON file of an archive."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            for item in opened.infolist():
                if item.filename.endswith(".json") and item.file_size < 40_000_000:
                    yield from _read(item.filename, opened.read(item))
    else:
        with tarfile.open(archive) as opened:
            for member in opened:
                if member.name.endswith((".json", ".json.gz")) and member.size < 40_000_000:
                    file = opened.extractfile(member)
                    yield from _read(member.name, file.read() if file else b"")


def _read(path: str, raw: bytes) -> Iterator[tuple[str, Any]]:
    import gzip

    try:
        yield path, json.loads(gzip.decompress(raw) if path.endswith(".gz") else raw)
    except (ValueError, OSError, RecursionError):
        return


def schemas_in(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The schemas that a document is, or holds under names."""
    if not isinstance(value, dict):
        return
    components = value.get("components")
    named = components.get("schemas") if isinstance(components, dict) else value.get("definitions")
    if ("openapi" in value or "swagger" in value) and isinstance(named, dict):
        prefix = "#/components/schemas/" if isinstance(components, dict) else "#/definitions/"
        for name in named:
            yield f"{path}#{name}", _component(named, name, prefix)
    elif _is_schema(value):
        yield path, value


def _is_schema(value: dict[str, Any]) -> bool:
    said = value.get("$schema")
    if isinstance(said, str) and "json-schema.org" in said:
        return True
    return isinstance(value.get("properties"), dict) and value.get("type") == "object"


def _component(named: dict[str, Any], name: str, prefix: str) -> dict[str, Any]:
    """One component with everything it refers to, as a document of its own."""
    reached, waiting = {name}, [named[name]]
    while waiting:
        for reference in _references(waiting.pop()):
            target = reference.removeprefix(prefix)
            if reference.startswith(prefix) and target in named and target not in reached:
                reached.add(target)
                waiting.append(named[target])
    kept = {key: named[key] for key in named if key in reached}
    body = {"$ref": prefix + name}
    if prefix.startswith("#/components"):
        return {**body, "components": {"schemas": kept}}
    return {**body, "definitions": kept}


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "$ref" and isinstance(item, str):
                yield item
            else:
                yield from _references(item)
    elif isinstance(value, list):
        for item in value:
            yield from _references(item)


def store(checkout: Path) -> Iterator[tuple[str, Any, list[str]]]:
    """(name, schema, files that test it) of SchemaStore."""
    for path in sorted((checkout / "src" / "schemas" / "json").glob("*.json")):
        tests = [
            text
            for folder in ("test", "negative_test")
            for file in sorted((checkout / "src" / folder / path.stem).glob("*.json"))
            if len(text := file.read_text(encoding="utf-8-sig")) < MOST_TEXT
        ]
        for where, value in _read(path.name, path.read_bytes()):
            if isinstance(value, dict):
                yield where, value, tests


def collect(archives: list[Path], count: int, checkout: Path | None) -> tuple[list[dict[str, Any]], Counter[str]]:
    """(schemas, how many were left out for which reason): from packages first, SchemaStore for the rest."""
    rng = random.Random(20261125)
    chosen = _Chosen()
    found: list[dict[str, Any]] = []
    for archive in archives:
        mine = [
            {"source": archive.name, "path": where, "schema": schema, "files": []}
            for path, value in documents(archive)
            for where, schema in schemas_in(path, value)
            if chosen.takes(schema)
        ]
        chosen.left_out["more than a package's share"] += max(0, len(mine) - PER_PACKAGE)
        found += rng.sample(mine, PER_PACKAGE) if len(mine) > PER_PACKAGE else mine
    stored = [
        {"source": "schemastore", "path": where, "schema": schema, "files": files[:MOST_FILES]}
        for where, schema, files in (store(checkout) if checkout else ())
        if chosen.takes(schema)
    ]
    rng.shuffle(stored)
    found += stored[: max(0, count - len(found))]
    rng.shuffle(found)
    return found[:count], chosen.left_out


class _Chosen:
    """Which schemas are taken; counts the others."""

    def __init__(self) -> None:
        self.left_out: Counter[str] = Counter()
        self.seen: set[str] = set()

    def takes(self, schema: Any) -> bool:
        text = json.dumps(schema)
        digest = hashlib.sha256(text.encode()).hexdigest()
        why = ""
        if digest in self.seen:
            why = "repeated"
        elif len(text) > MOST_BYTES:
            why = "longer than 400 kB"
        elif any(not reference.startswith("#") for reference in _references(schema)):
            why = "refers to another document"
        elif not _valid(schema):
            why = "no valid schema of its draft"
        self.seen.add(digest)
        if why:
            self.left_out[why] += 1
        return not why


def _valid(schema: Any) -> bool:
    try:
        jsonschema_rs.validator_for(schema, offline=True)
    except (ValueError, jsonschema_rs.ReferencingError):
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parents[1] / ".bench" / "schemas")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--store", type=Path, help="a checkout of SchemaStore")
    options = parser.parse_args()
    found, left_out = collect(fetch(options.folder / "packages"), options.count, options.store)
    with (options.folder / "schemas.jsonl").open("w", encoding="utf-8") as file:
        for one in found:
            file.write(json.dumps(one) + "\n")
    sources = Counter(one["source"] for one in found)
    (options.folder / "about.json").write_text(json.dumps({"sources": sources, "left_out": left_out}, indent=1))
    print(f"{len(found)} schemas from {len(sources)} sources; left out: {dict(left_out)}")


if __name__ == "__main__":
    main()
