"""Compiled grammars, kept: the most recently used in memory, and what took long to compile on disk.

Key: the canonical text of the options (the order of keys is part of it: it is the order of what is written) and the
versions of what compiled it. What depends on a vocabulary is kept in memory alone, inside the Grammar, by the
tokenizer's hash. A server compiles in a Worker (`compile_apart`); everywhere else it happens here.
"""

from __future__ import annotations

import atexit
import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from gnomon.errors import GrammarError
from gnomon.grammar.compiling import compile as compile_grammar
from gnomon.grammar.grammar import Grammar
from gnomon.grammar.plans import Arguments, Plan, make, plan_of, restore
from gnomon.grammar.python_types import looks_like_type
from gnomon.grammar.worker import Worker
from gnomon.models.cache import atomic_write, cache_dir

if TYPE_CHECKING:
    from pathlib import Path

    from gnomon.grammar.options import GrammarOptions
    from gnomon.models.tokenizer import Tokenizer

KEPT = 256
KEPT_ON_DISK = 1000
LARGE = 50_000
"""Characters of a grammar from which it is compiled in a worker anywhere, with LARGE_SECONDS to do it: some keep the
mask engine busy for very long, and nothing inside this process could end that."""
LARGE_SECONDS = 60.0
SLOW = 0.05
"""Seconds of compiling from which a plan is worth a file."""
MADE_BY = "/".join(version(name) for name in ("gnomon", "llguidance", "jsonschema_rs"))
log = logging.getLogger("gnomon.grammar")


class GrammarCache:
    """worker: where grammars are compiled; None: here."""

    def __init__(self) -> None:
        self.worker: Worker | None = None
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Grammar] = OrderedDict()

    def get(self, arguments: Arguments, tokenizer: Tokenizer | None = None) -> Grammar:
        """Raises GrammarError."""
        text = canonical(arguments)
        key = sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        grammar = self._found(key, arguments, tokenizer, large=len(text) > LARGE)
        with self._lock:
            self._known[key] = grammar
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        return grammar

    def _found(self, key: str, arguments: Arguments, tokenizer: Tokenizer | None, *, large: bool) -> Grammar:
        if (plan := read_plan(key)) is not None:
            return restore(arguments, plan)
        started = time.monotonic()
        if self.worker is not None or large:
            plan = (self.worker or own_worker()).plan(arguments)
            grammar = restore(arguments, plan)
        else:
            grammar = make(arguments, tokenizer)
        if time.monotonic() - started > SLOW:
            write_plan(key, plan or plan_of(grammar))
        return grammar

    def clear(self) -> None:
        with self._lock:
            self._known.clear()


CACHE = GrammarCache()


@cache
def own_worker() -> Worker:
    """Of a process that is no server."""
    worker = Worker(LARGE_SECONDS)
    atexit.register(worker.close)
    return worker


def compile_within(seconds: float, arguments: Arguments, convert: Callable[[Any], Any] | None = None) -> Grammar:
    """Compile in a worker. convert: from values to a type. Raises GrammarError, also when it takes longer."""
    try:
        plan = own_worker().plan(arguments, seconds=seconds)
    except TypeError:
        raise GrammarError("A schema, registry or grammar that is compiled within `seconds` is plain JSON.") from None
    return restore(arguments, plan).converting(convert)


def compile_apart(worker: Worker | None) -> None:
    """From now on compile in this worker; None: here."""
    CACHE.worker = worker


def compiled(options: GrammarOptions, tokenizer: Tokenizer | None = None) -> Grammar:
    """tokenizer: of the model that will write. Raises GrammarError."""
    source = options.json_schema
    if isinstance(source, Grammar):
        return source
    arguments: dict[str, Any] = {"whitespace": options.whitespace, "formats": options.formats}
    if options.any_order:
        arguments["any_order"] = True
    if looks_like_type(source):
        return compile_grammar(type=source, tokenizer=tokenizer, **arguments)
    if options.tools is not None:
        arguments = {"tools": options.tools.model_dump()}
    for name, value in (
        ("schema", source),
        ("regex", options.regex),
        ("lark", options.lark),
        ("gbnf", options.gbnf),
        ("ebnf", options.ebnf),
        ("structural_tag", options.structural_tag),
        ("choices", options.choices),
    ):
        if value is not None:
            arguments[name] = value
    try:
        return CACHE.get(arguments, tokenizer)
    except TypeError:  # a schema that is no JSON: compile() says where
        return compile_grammar(**arguments, tokenizer=tokenizer)


def canonical(arguments: Arguments) -> str:
    return json.dumps([MADE_BY, arguments], separators=(",", ":"), ensure_ascii=False)


def key_of(arguments: Arguments) -> str:
    return sha256(canonical(arguments).encode("utf-8", "surrogatepass")).hexdigest()


# -- on disk --------------------------------------------------------------------------------------------------------


def read_plan(key: str) -> Plan | None:
    """A plan of an earlier day; a file that is not whole counts as none."""
    path = _path(key)
    try:
        return Plan.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        log.warning("%s cannot be read and is made again: %s", path, str(error).splitlines()[0])
        return None


def write_plan(key: str, plan: Plan) -> None:
    """Whole or not at all; the oldest files make room."""
    path = _path(key)
    try:
        with atomic_write(path) as file:
            file.write(plan.model_dump_json().encode())
        files = sorted(path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)
        for old in files[: max(0, len(files) - KEPT_ON_DISK)]:
            old.unlink(missing_ok=True)
    except OSError as error:
        log.warning("The compiled grammar is not kept: %s", error)


def _path(key: str) -> Path:
    return cache_dir() / "grammars" / f"{key}.json"
