"""Guard beside its peers: what leaks at every offset and chunking, what it costs, what it finds.

Peers run in environments of their own under .bench/ (llm-guard 0.3.16: its Secrets scanner; nemoguardrails 0.24.1: its
RollingBuffer, driven as its server drives it; openai-guardrails 0.3.6: its client, checking every 100 chunks),
and each is given the exact text of the secret as its pattern, so that only the streaming is compared. A window of 256
characters stands for the gateways that hold back a fixed tail. An environment: python -m venv .bench/nemo &&
.bench/nemo/bin/pip install nemoguardrails==0.24.1; likewise .bench/openai (openai-guardrails==0.3.6), .bench/llmguard.
    python benchmarks/guard.py [--quick] [--only speed,cost,leaks,recall,names] [--out benchmarks/results/guard.json]
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from gnomon.guard import Guard
from gnomon.models.reference import open_checkpoint

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("GNOMON_DATA", ROOT / ".." / "shared" / "data")) / "rails-streaming-ux"
BENCH = ROOT / ".bench"
PII = ("CREDIT_CARD", "PHONE_NUMBER", "EMAIL_ADDRESS", "IBAN_CODE", "US_SSN", "IP_ADDRESS")
PROSE = (
    "The committee met on Tuesday to discuss the new library. Most members agreed that the old building, which had "
    "served the town for eighty years, needed more than paint. A few wanted to keep the reading room as it was, with "
    "its tall windows and its quiet; others asked for more light, more tables and a place where children could talk. "
    "In the end they decided to do both, and to begin in spring. The cost would be shared, and nobody would have to "
    "travel to another town for a book again. People left the hall in good spirits and walked home along the river. "
)
NEMO = """
import asyncio, json, re, sys
from nemoguardrails.rails.llm.buffer import RollingBuffer
async def run(chunks, secret, first):
    async def source():
        for chunk in chunks: yield chunk
    shown = []
    async for batch in RollingBuffer(buffer_context_size=50, buffer_chunk_size=200).process_stream(source()):
        blocked = secret in "".join(batch.processing_context)
        if first: shown.extend(batch.user_output_chunks)
        if blocked: return "".join(shown), True
        if not first: shown.extend(batch.user_output_chunks)
    return "".join(shown), False
for line in sys.stdin:
    job = json.loads(line)
    print(json.dumps([asyncio.run(run(job["chunks"], job["secret"], first)) for first in (True, False)]), flush=True)
"""
OPENAI = """
import asyncio, json, sys
from guardrails._streaming import StreamingMixin
from guardrails.exceptions import GuardrailTripwireTriggered
class Client(StreamingMixin):
    def _extract_response_text(self, chunk): return chunk
    def _create_guardrails_response(self, chunk, *results): return chunk
    async def _run_stage_guardrails(self, stage, text, **more):
        if self.secret in text: raise GuardrailTripwireTriggered.__new__(GuardrailTripwireTriggered)
async def run(chunks, secret):
    async def source():
        for chunk in chunks: yield chunk
    client, shown = Client(), []
    client.secret = secret
    try:
        async for chunk in client._stream_with_guardrails(source(), [], []): shown.append(chunk)
    except GuardrailTripwireTriggered: return "".join(shown), True
    return "".join(shown), False
for line in sys.stdin:
    job = json.loads(line)
    print(json.dumps(asyncio.run(run(job["chunks"], job["secret"]))), flush=True)
"""
LLM_GUARD = """
import json, logging, sys, time, types
base = sys.argv[1] + "/llm_guard"
for name, path in (("llm_guard", base), ("llm_guard.input_scanners", base + "/input_scanners")):
    module = types.ModuleType(name); module.__path__ = [path]; sys.modules[name] = module
import structlog
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
from llm_guard.input_scanners.secrets import Secrets
scanner = Secrets()
for line in sys.stdin:
    job = json.loads(line)
    begun, walled = time.process_time(), time.perf_counter()
    for _ in range(job.get("times", 1)): text, valid, risk = scanner.scan(job["text"])
    spent = [(time.process_time() - begun) / job.get("times", 1), (time.perf_counter() - walled) / job.get("times", 1)]
    print(json.dumps([spent, text, valid]), flush=True)
"""


class Peer:
    """A peer's process: one JSON line in, one out. None when its environment is missing."""

    def __init__(self, folder: str, script: str) -> None:
        python = BENCH / folder / "bin" / "python"
        site = next((BENCH / folder / "lib").glob("python3*/site-packages"))
        self.process = subprocess.Popen(
            [python, "-c", script, str(site)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, **job: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def cases(kind: str) -> list[dict[str, Any]]:
    with gzip.open(DATA / "gitleaks_cases.sample.jsonl.gz", "rt") as lines:
        return [case for case in map(json.loads, lines) if case["kind"] == kind]


def chunkings(text: str, tokenizer: Any) -> dict[str, list[str]]:
    def every(size: int) -> list[str]:
        return [text[i : i + size] for i in range(0, len(text), size)]

    detokenizer, tokens = tokenizer.detokenizer(), []
    for token in tokenizer.encode(text, add_special_tokens=False):
        tokens.append(detokenizer.push(token))
    tokens.append(detokenizer.finish())
    return {
        "1 char": every(1), "2 chars": every(2), "4 chars": every(4), "tokens": [t for t in tokens if t],
        "words": re.findall(r"\s*\S+|\s+$", text), "whole": [text],
    }  # fmt: skip


TURNS, OURS = 10, 1500
"""Turns a round, and scans of ours a turn, about as long as 20 of the peer's: long rounds, so that one hiccup of the
machine does not make one, and short turns, so that both sides meet its slow and its fast moments."""


def leaks(secret: str, shown: str) -> bool:
    return any(secret[i : i + 4] in shown for i in range(len(secret) - 3))


def window(chunks: list[str], secret: str, size: int = 256) -> tuple[str, bool]:
    """A fixed tail held back, the pattern looked for in what is held: what many gateways do."""
    shown, held = "", ""
    for chunk in chunks:
        held = (held + chunk).replace(secret, "[X]")
        shown, held = shown + held[:-size], held[-size:]
    return shown + held, "[X]" in shown + held


def leak_rates(quick: bool) -> dict[str, Any]:
    guard = Guard({"output": ["secrets"]})
    tokenizer = open_checkpoint("smollm2-135m-instruct").tokenizer()
    nemo = Peer("nemo", NEMO) if (BENCH / "nemo").exists() else None
    openai = Peer("openai", OPENAI) if (BENCH / "openai").exists() else None
    chosen: dict[str, tuple[str, str]] = {}
    for case in cases("tp"):
        if case["own_rule_regex"] is None or case["rule"] in chosen:
            continue
        start, end = case["own_rule_regex"]["secret"]
        secret = case["text"][start:end]
        if len(secret) >= 8 and not leaks(secret, guard.scan(case["text"]).text):
            chosen[case["rule"]] = (case["text"], secret)
    rules = sorted(chosen)[:: 8 if quick else 3]
    offsets = range(0, 300, 97 if quick else 43)
    leaked: dict[str, Counter[str]] = {}
    verdicts: dict[str, list[int]] = {}
    total: Counter[str] = Counter()
    for rule in rules:
        text, secret = chosen[rule]
        for offset in offsets:
            whole = f"{PROSE[:offset]}\n{text}\n{PROSE[offset:]}"
            seen: dict[str, set[str]] = {}
            for name, chunks in chunkings(whole, tokenizer).items():
                total[name] += 1
                results = {"gnomon": ours(guard, chunks), "window of 256": window(chunks, secret)}
                if nemo is not None:
                    first, checked = nemo.ask(chunks=chunks, secret=secret)
                    results |= {"nemoguardrails (default)": first, "nemoguardrails (stream_first: false)": checked}
                if openai is not None:
                    results["openai-guardrails (every 100 chunks)"] = openai.ask(chunks=chunks, secret=secret)
                for system, (shown, verdict) in results.items():
                    leaked.setdefault(system, Counter())[name] += leaks(secret, shown)
                    seen.setdefault(system, set()).add(json.dumps([shown, verdict]))
            by_bytes = ours(guard, [bytes([b]) for b in whole.encode()])
            total["bytes"] += 1
            leaked["gnomon"]["bytes"] += leaks(secret, by_bytes[0])
            seen["gnomon"].add(json.dumps(by_bytes))
            for system, found in seen.items():
                verdicts.setdefault(system, []).append(len(found))
    return {
        "secrets": len(rules),
        "offsets": len(offsets),
        "streams_per_chunking": dict(total),
        "leaked": {
            s: {n: f"{c[n]}/{total[n]}" for n in total if s == "gnomon" or n != "bytes"} for s, c in leaked.items()
        },
        "most_distinct_outcomes_over_chunkings": {system: max(many) for system, many in verdicts.items()},
    }


def ours(guard: Guard, chunks: list[Any]) -> tuple[str, str]:
    session = guard.session()
    shown = "".join([session.push(chunk) for chunk in chunks] + [session.finish()])
    return shown, session.verdict


def cost() -> dict[str, Any]:
    """Added time per token and held characters on prose, with the whole default pack; median of rounds."""
    text = "".join((ROOT / "docs" / f"{name}.md").read_text() for name in ("engine", "models", "determinism", "serve"))
    text += PROSE * 20
    detokenizer = open_checkpoint("smollm2-135m-instruct").tokenizer()
    pieces = chunkings(text, detokenizer)["tokens"]
    guard = Guard()
    rounds = []
    for _ in range(7):
        session, times, held = guard.session(), [], []
        for piece in pieces:
            begun = time.perf_counter()
            session.push(piece)
            times.append(time.perf_counter() - begun)
            held.append(session.held)
        session.finish()
        rounds.append(statistics.median(times) * 1e6)
    held.sort()
    return {
        "tokens": len(pieces),
        "microseconds_per_token_median_of_rounds": [round(value, 2) for value in sorted(rounds[1:])],
        "held_mean": statistics.mean(held),
        "held_p99": held[int(len(held) * 0.99)],
        "held_max": held[-1],
        "findings": [str(finding) for finding in session.findings],
        "identical": guard.scan(text).text == text,
    }


def speed() -> dict[str, Any]:
    """The same input through both, alternating: processor and wall seconds, and their ratio per round."""
    if not (BENCH / "llmguard").exists():
        return {"skipped": "no .bench/llmguard"}
    peer, guard = Peer("llmguard", LLM_GUARD), Guard({"output": ["secrets"]})
    examples = json.loads(gzip.decompress((DATA / "llm_guard_bench_input_examples.json.gz").read_bytes()))
    result = {}
    for name in ("Secrets", "Anonymize"):
        text = examples[name]
        peer.ask(text=text, times=10)
        for _ in range(500):
            guard.scan(text)
        rows = []
        for _ in range(9):
            theirs, mine = [0.0, 0.0], [0.0, 0.0]
            for _ in range(TURNS):
                spent = peer.ask(text=text, times=20)[0]
                begun, walled = time.process_time(), time.perf_counter()
                for _ in range(OURS):
                    guard.scan(text)
                ours = (time.process_time() - begun) / OURS, (time.perf_counter() - walled) / OURS
                for place in (0, 1):
                    theirs[place] += spent[place] / TURNS
                    mine[place] += ours[place] / TURNS
            rows.append((theirs, mine))
        result[f"{name} ({len(text)} characters)"] = {
            clock: {
                "llm_guard_ms": round(statistics.median(t[place] for t, _ in rows) * 1e3, 3),
                "gnomon_ms": round(statistics.median(m[place] for _, m in rows) * 1e3, 4),
                "ratio_median": round(statistics.median(t[place] / m[place] for t, m in rows), 1),
                "ratio_range": [round(pick(t[place] / m[place] for t, m in rows), 1) for pick in (min, max)],
            }
            for place, clock in enumerate(("processor", "wall"))
        }
    return result


def recall(quick: bool) -> dict[str, Any]:
    secrets = Guard({"output": ["secrets"]})
    positives, negatives = cases("tp"), cases("fp")
    found = [bool(secrets.scan(case["text"]).findings) for case in positives]
    result: dict[str, Any] = {
        "secrets": {
            "found": sum(found),
            "of": len(found),
            "negatives_flagged": sum(bool(secrets.scan(case["text"]).findings) for case in negatives),
            "negatives": len(negatives),
        }
    }
    if (BENCH / "llmguard").exists():
        peer = Peer("llmguard", LLM_GUARD)
        sample = positives[:: 40 if quick else 8]
        theirs = sum(not peer.ask(text=case["text"])[2] for case in sample)
        mine = sum(bool(secrets.scan(case["text"]).findings) for case in sample)
        wrong = sum(not peer.ask(text=case["text"])[2] for case in negatives)
        result["same_sample"] = {"of": len(sample), "gnomon": mine, "llm_guard": theirs}
        result["secrets"]["negatives_flagged_by_llm_guard"] = wrong
    pii = Guard({"output": ["pii"]})
    result["pii"] = covering(lambda text: [(f.start, f.end) for f in pii.scan(text).findings], PII)
    return result


def names() -> dict[str, Any]:
    """People found by the scanner `names`, which needs its extra."""
    from gnomon.guard.scanners.names import named

    return covering(lambda text: [(start, end) for start, end, _ in named(text)], ("PERSON",))


def covering(find: Callable[[str], list[tuple[int, int]]], kinds: Collection[str]) -> dict[str, Any]:
    """Spans of these kinds in synthetic documents: how many are found whole, and what is found elsewhere."""
    covered, total, wrong = Counter[str](), Counter[str](), 0
    for line in (DATA / "presidio_synth_v2.sample.jsonl").read_text().splitlines():
        case = json.loads(line)
        found = find(case["full_text"])
        hidden = {i for start, end in found for i in range(start, end)}
        spans = [span for span in case["spans"] if span["entity_type"] in kinds]
        for span in spans:
            start, text = span["start_position"], case["full_text"]
            end = start + len(text[start : span["end_position"]].rstrip(". "))
            total[span["entity_type"]] += 1
            covered[span["entity_type"]] += hidden.issuperset(range(start, end))
        wrong += sum(not any(s["start_position"] < b and a < s["end_position"] for s in spans) for a, b in found)
    return {"covered": dict(covered), "of": dict(total), "findings_elsewhere": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="speed,cost,leaks,recall")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "guard.json")
    arguments = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    result: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    result |= {
        "python": sys.version.split()[0],
        "peers": {
            "llm-guard": "0.3.16 (Secrets scanner)",
            "nemoguardrails": "0.24.1 (RollingBuffer 200/50)",
            "openai-guardrails": "0.3.6 (check_interval 100)",
        },
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    parts = {"speed": speed, "cost": cost, "leaks": leak_rates, "recall": recall, "names": names}
    for name in arguments.only.split(","):
        part = parts[name]
        found = part(arguments.quick) if name in ("leaks", "recall") else part()
        about = {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 1),
            "commit": commit,
        }
        result[name] = {"run": about} | found
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        print(name, json.dumps(result[name], indent=1), flush=True)


if __name__ == "__main__":
    main()
