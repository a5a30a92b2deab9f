"""One grammar engine, driven by grammar.py: schemas and texts in, verdicts and times out. Run by the interpreter that
has the engine:
    python benchmarks/grammar_engines.py ENGINE VOCABULARY.json
The vocabulary: {"tokens": [hex], "end": id, "gguf": path}. Each line in is {"schema", "texts": [[token ids]]}, each
line out {"status": "ok" | "refused" | "timeout" | "died", "first_ms", "masks_us", "verdicts", "peak_mb"}. Schemas
run in a forked process with a kill timer and a limit of memory; when it was killed, a fresh one follows. A text is
accepted when each of its tokens is in the mask at its place, and an end after the last.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

SECONDS = float(os.environ.get("GRAMMAR_SECONDS", "10"))
MEMORY = 8 << 30
WARMTH = {"schema": {"type": "object", "properties": {"a": {"type": "string"}}}, "texts": [[]]}


class Walk(Protocol):
    """A text being judged. allowed(None): whether it may end here."""

    def mask(self) -> None: ...
    def allows(self, token: int | None) -> bool: ...
    def take(self, token: int) -> None: ...


class Gnomon:
    """Masks, then the checks behind them: what decoding does."""

    def __init__(self, vocabulary: dict[str, Any]) -> None:
        from gnomon.grammar.vocabulary import vocabulary_of
        from gnomon.models.reference import open_checkpoint

        self.registry: dict[str, Any] | None = None  # set per job: documents that a reference may name
        self.tokenizer = open_checkpoint(vocabulary["model"]).tokenizer()
        vocabulary_of(self.tokenizer)

    def compile(self, schema: Any) -> Callable[[], Walk]:
        from gnomon.grammar import compile

        formats = os.environ.get("GRAMMAR_FORMATS", "assert")
        grammar = compile(schema, formats=formats, registry=self.registry, tokenizer=self.tokenizer)
        if grammar.report.unsatisfiable:
            raise ValueError("Unsatisfiable schema")
        return lambda: _GnomonWalk(grammar, self.tokenizer)


class _GnomonWalk:
    def __init__(self, grammar: Any, tokenizer: Any) -> None:
        self.grammar, self.text, self.allowed_V = grammar, b"", None
        self.matcher = grammar.bind(tokenizer)
        self.place = grammar.checks.begin()
        self.end = self.matcher.vocabulary.ends[0]

    def mask(self) -> None:
        self.allowed_V = self.matcher.allowed()

    def allows(self, token: int | None) -> bool:
        if token is not None:
            return bool(self.allowed_V[token])
        return bool(self.allowed_V[self.end]) and self.grammar.checks.may_end(self.place, self.text)

    def take(self, token: int) -> None:
        self.matcher.advance([token])
        self.text += bytes(self.matcher.vocabulary.engine.decode_bytes([token]))
        self.place = self.grammar.checks.read(self.place, self.text)
        if self.place is None:
            raise EOFError("a check failed")


class _Bits:
    """A mask as bits of 32-bit words."""

    bits: Any
    end: int

    def allows(self, token: int | None) -> bool:
        token = self.end if token is None else token
        return bool((int(self.bits[token // 32]) >> (token % 32)) & 1)


class Llguidance:
    """The mask engine alone, its defaults but for compact JSON."""

    def __init__(self, vocabulary: dict[str, Any]) -> None:
        from gnomon.grammar.vocabulary import vocabulary_of
        from gnomon.models.reference import open_checkpoint

        self.vocabulary = vocabulary_of(open_checkpoint(vocabulary["model"]).tokenizer())

    def compile(self, schema: Any) -> Callable[[], Walk]:
        from llguidance import LLMatcher

        text = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})
        first = LLMatcher(self.vocabulary.engine, text, log_level=0)
        if first.is_error():
            raise ValueError(first.get_error())
        return lambda: _LlguidanceWalk(first.deep_copy(), self.vocabulary)


class _LlguidanceWalk(_Bits):
    def __init__(self, matcher: Any, vocabulary: Any) -> None:
        self.matcher, self.end = matcher, vocabulary.ends[0]
        self.bits = np.zeros((vocabulary.size + 31) // 32, dtype=np.uint32)

    def mask(self) -> None:
        self.matcher.unsafe_compute_mask_ptr(self.bits.ctypes.data, self.bits.nbytes)

    def take(self, token: int) -> None:
        self.matcher.consume_token(token)


class Xgrammar:
    """any_whitespace (compact JSON included), not strict, one thread."""

    def __init__(self, vocabulary: dict[str, Any]) -> None:
        import xgrammar

        tokens = [bytes.fromhex(token) for token in vocabulary["tokens"]]
        self.module, self.size, self.end = xgrammar, len(tokens), vocabulary["end"]
        self.info = xgrammar.TokenizerInfo(tokens, vocab_size=len(tokens), stop_token_ids=[self.end])

    def compile(self, schema: Any) -> Callable[[], Walk]:
        compiler = self.module.GrammarCompiler(self.info, max_threads=1, cache_enabled=False)
        compiled = compiler.compile_json_schema(json.dumps(schema), any_whitespace=True, strict_mode=False)
        return lambda: _XgrammarWalk(self.module, compiled, self.size, self.end)


class _XgrammarWalk(_Bits):
    def __init__(self, module: Any, compiled: Any, size: int, end: int) -> None:
        self.matcher, self.end = module.GrammarMatcher(compiled), end
        self.tensor = module.allocate_token_bitmask(1, size)
        self.bits = self.tensor.numpy()[0].view(np.uint32)

    def mask(self) -> None:
        if not self.matcher.fill_next_token_bitmask(self.tensor):
            self.tensor.fill_(-1)  # it says that everything is allowed

    def take(self, token: int) -> None:
        self.matcher.accept_token(token)


class Outlines:
    """Its own regular expression and index."""

    def __init__(self, vocabulary: dict[str, Any]) -> None:
        from outlines_core import Vocabulary

        ids: dict[bytes, list[int]] = {}
        for place, token in enumerate(vocabulary["tokens"]):
            if token and place != vocabulary["end"] and place not in vocabulary["special"]:
                ids.setdefault(bytes.fromhex(token), []).append(place)
        self.size, self.end = len(vocabulary["tokens"]), vocabulary["end"]
        self.vocabulary = Vocabulary(self.end, ids)

    def compile(self, schema: Any) -> Callable[[], Walk]:
        from outlines_core import Index
        from outlines_core.json_schema import build_regex_from_schema

        index = Index(build_regex_from_schema(json.dumps(schema)), self.vocabulary)
        return lambda: _OutlinesWalk(index, self.size, self.end)


class _OutlinesWalk(_Bits):
    def __init__(self, index: Any, size: int, end: int) -> None:
        from outlines_core import Guide

        self.guide, self.end = Guide(index), end
        self.bits = np.zeros((size + 31) // 32, dtype=np.uint32)

    def mask(self) -> None:
        self.guide.write_mask_into(self.bits.ctypes.data, self.bits.size, 4)

    def take(self, token: int) -> None:
        self.guide.advance(token, False)


class LmFormatEnforcer:
    """Its character-level parser over the whole vocabulary; what it has found for a state is kept, as it does."""

    def __init__(self, vocabulary: dict[str, Any]) -> None:
        from lmformatenforcer.tokenenforcer import TokenEnforcerTokenizerData

        tokens = [bytes.fromhex(token) for token in vocabulary["tokens"]]
        self.end = vocabulary["end"]
        regular = []
        for place, token in enumerate(tokens):
            if place != self.end and place not in vocabulary["special"] and token:
                regular.append((place, token.decode("utf-8", "replace"), token[:1] == b" "))

        def decode(ids: list[int]) -> str:
            return b"".join(tokens[place] for place in ids).decode("utf-8", "replace")

        self.data = TokenEnforcerTokenizerData(regular, decode, self.end, False, len(tokens))

    def compile(self, schema: Any) -> Callable[[], Walk]:
        from lmformatenforcer import JsonSchemaParser, TokenEnforcer

        enforcer = TokenEnforcer(self.data, JsonSchemaParser(schema))
        return lambda: _LmFormatWalk(enforcer, self.end)


class _LmFormatWalk:
    def __init__(self, enforcer: Any, end: int) -> None:
        self.enforcer, self.end, self.ids, self.found = enforcer, end, [], set()

    def mask(self) -> None:
        self.found = set(self.enforcer.get_allowed_tokens(self.ids).allowed_tokens)

    def allows(self, token: int | None) -> bool:
        return (self.end if token is None else token) in self.found

    def take(self, token: int) -> None:
        self.ids = [*self.ids, token]


class LlamaCpp:
    """llama.cpp's own converter of schemas (as xllamacpp binds it). Its sampler is bound by no wheel that runs here, so
    it gives no verdicts: what it refuses is counted, and what it takes may be wider or narrower than the schema."""

    def __init__(self, vocabulary: dict[str, Any]) -> None:
        import xllamacpp

        self.convert = xllamacpp.json_schema_to_grammar

    def compile(self, schema: Any) -> None:
        self.convert(json.dumps(schema))


ENGINES = {
    "gnomon": Gnomon,
    "llguidance": Llguidance,
    "xgrammar": Xgrammar,
    "outlines": Outlines,
    "lmformatenforcer": LmFormatEnforcer,
    "llamacpp": LlamaCpp,
}


def judged(begin: Callable[[], Walk], tokens: list[int], masks_us: list[float], first: Walk | None) -> bool:
    walk = first or begin()
    try:
        for place, token in enumerate([*tokens, None]):
            if first is None or place:
                started = time.perf_counter()
                walk.mask()
                masks_us.append((time.perf_counter() - started) * 1e6)
            if not walk.allows(token):
                return False
            if token is not None:
                walk.take(token)
    except EOFError:
        return False
    return True


def work(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    engine.registry = job.get("registry") or None
    started = time.perf_counter()
    try:
        begin = engine.compile(job["schema"])
    except ValueError as error:
        if "Unsatisfiable schema" not in str(error):
            raise
        return {"status": "ok", "verdicts": [False] * len(job["texts"])}  # a verdict on every text at once
    if begin is None:
        return {"status": "ok", "verdicts": None, "convert_ms": (time.perf_counter() - started) * 1e3}
    walk = begin()
    walk.mask()
    first_ms = (time.perf_counter() - started) * 1e3
    masks_us: list[float] = []
    verdicts = [judged(begin, text, masks_us, walk if n == 0 else None) for n, text in enumerate(job["texts"])]
    return {"status": "ok", "first_ms": first_ms, "masks_us": masks_us, "verdicts": verdicts}


class Child:
    """A process forked from this one that works on schema after schema, until one kills it."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.pid = 0

    def __call__(self, job: dict[str, Any]) -> dict[str, Any]:
        """Whatever becomes of the child, an answer."""
        if not self.pid:
            self._fork()
        line = (json.dumps(job) + "\n").encode()
        while line:
            line = line[os.write(self.asking, line) :]
        text, deadline = b"", time.monotonic() + SECONDS
        while (left := deadline - time.monotonic()) > 0 and select.select([self.answering], [], [], left)[0]:
            piece = os.read(self.answering, 1 << 20)
            text += piece
            if not piece or text.endswith(b"\n"):
                break
        if text.endswith(b"\n"):
            found: dict[str, Any] = json.loads(text)
            return found
        late = time.monotonic() >= deadline
        self.end()
        return {"status": "timeout" if late else "died"}

    def end(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self.asking), os.close(self.answering)
            self.pid = 0

    def _fork(self) -> None:
        asked, self.asking = os.pipe()
        self.answering, answered = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(asked), os.close(answered)
            return
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.close(self.asking), os.close(self.answering)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        work(self.engine, WARMTH)
        with os.fdopen(asked) as jobs, os.fdopen(answered, "w") as answers:
            for line in jobs:
                try:
                    answer = work(self.engine, json.loads(line))
                except BaseException as error:
                    answer = {"status": "refused", "error": f"{type(error).__name__}: {error}"[:300]}
                answer["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                print(json.dumps(answer), file=answers, flush=True)
                gc.collect()  # what the last schema left is not this one's time
        os._exit(0)


def main() -> None:
    vocabulary = json.loads(Path(sys.argv[2]).read_text())
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an engine prints is no answer
    engine = ENGINES[sys.argv[1]](vocabulary)
    work(engine, WARMTH)  # what is loaded or built once is not timed
    print(json.dumps({"ready": True}), file=answers, flush=True)
    child = Child(engine)
    for line in sys.stdin:
        print(json.dumps(child(json.loads(line))), file=answers, flush=True)
    child.end()


if __name__ == "__main__":
    main()
