"""The certificate: a model and its numeric profile, tested on this machine before anybody relies on them.

One request is decoded alone, then among others, in chunks, on a warm cache, after being put back, and with drafts:
every token and log-probability must have the same bits each time. `digest` hashes the solo run: two machines with equal
fingerprints must show equal digests.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from gnomon.arch.network import Network
from gnomon.engine.drafting import Choose, Drafter
from gnomon.engine.engine import Engine
from gnomon.engine.probes import probe_sampler
from gnomon.engine.request import Decision, Finished, PromptLogprob, Request, SamplingParams, TokenEvent
from gnomon.engine.runner import PagedRunner
from gnomon.kernels.batch import PAGE
from gnomon.kernels.operators import Operators
from gnomon.kernels.probes import Probe, golden_digest, probe, probe_operators
from gnomon.kernels.side import SidePath
from gnomon.models.cache import cache_dir
from gnomon.version import __version__

PROMPT_TOKENS, NEW_TOKENS = 97, 6


@dataclass(frozen=True)
class Certificate:
    """What was tested, where, and with what result."""

    fingerprint: str
    profile: dict[str, Any]
    probes: tuple[Probe, ...]
    operator_digest: str
    digest: str
    machine: dict[str, Any]
    seconds: float
    covered: bool = True
    """Whether the network runs on canonical operators at all."""

    @property
    def passed(self) -> bool:
        return self.covered and all(probe.passed for probe in self.probes)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Certificate:
        known = {name: values[name] for name in cls.__dataclass_fields__}
        return cls(**{**known, "probes": tuple(Probe(**entry) for entry in values["probes"])})

    def as_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}


def certified(
    network: Network,
    fingerprint: str,
    profile: dict[str, Any],
    *,
    renew: bool = False,
    sides: tuple[SidePath, ...] = (),
) -> Certificate:
    """The certificate for this profile on this machine: kept from an earlier run, or made now and kept.

    A failed one is never kept. Raises nothing for an unwritable cache: it is then made each time.
    """
    machine = _machine(getattr(network, "operators", None))
    key = hashlib.sha256(json.dumps([__version__, platform.node(), machine], sort_keys=True).encode()).hexdigest()[:12]
    path = cache_dir() / "certificates" / f"{fingerprint}-{key}.json"
    if not renew:
        with suppress(OSError, ValueError, KeyError, TypeError):
            return Certificate.from_dict(json.loads(path.read_text(encoding="utf-8")))
    certificate = certify(network, fingerprint, profile, sides)
    if certificate.passed:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(json.dumps(certificate.as_dict(), indent=1), encoding="utf-8")
            partial.replace(path)
    return certificate


def certify(
    network: Network, fingerprint: str, profile: dict[str, Any], sides: tuple[SidePath, ...] = ()
) -> Certificate:
    """Test a network on this machine. To be called on the thread that runs it; takes pages of its own.

    sides: patches beside the weights, which the probe request wears and its company does not.
    """
    started = time.perf_counter()
    operators: Operators | None = getattr(network, "operators", None)
    verified = getattr(network, "apart", None)
    if verified is not None:
        run = _Run(verified())
        solo = run.alone()
        probes = [probe("the sampler", probe_sampler()), probe("the engine", _scenarios(run, solo))]
        seconds = round(time.perf_counter() - started, 3)
        return Certificate(fingerprint, profile, tuple(probes), "", solo.digest(), _machine(None), seconds)
    if operators is None:
        return Certificate(fingerprint, profile, (), "", "", _machine(None), 0.0, covered=False)
    solo = _Run(network, sides).alone()
    probes = [
        *probe_operators(operators),
        probe("the sampler", probe_sampler()),
        probe("the engine", _scenarios(_Run(network, sides), solo)),
    ]
    return Certificate(
        fingerprint=fingerprint,
        profile=profile,
        probes=tuple(probes),
        operator_digest=golden_digest(operators),
        digest=solo.digest(),
        machine=_machine(operators),
        seconds=round(time.perf_counter() - started, 3),
    )


def _machine(operators: Operators | None) -> dict[str, Any]:
    return {
        "processor": platform.machine(),
        "torch": torch.__version__,
        "threads": None if operators is None else operators.threads,
        "instruction_set": getattr(operators, "instruction_set", None) or torch.backends.cpu.get_cpu_capability(),
    }


@dataclass
class _Seen:
    """What the probe request saw."""

    tokens: list[tuple[int, float | None]] = field(default_factory=list)
    prompt: list[PromptLogprob] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)

    def on_token(self, event: TokenEvent) -> Decision:
        self.tokens.append((event.token_id, event.logprob))
        return Decision.CONTINUE

    def digest(self) -> str:
        packed = b"".join(struct.pack("<qf", token, logprob or 0.0) for token, logprob in self.tokens)
        return hashlib.sha256(packed).hexdigest()


class _Guesses:
    """Right guesses, of which every second one is spoiled."""

    def __init__(self, text: list[int], vocabulary: int) -> None:
        self.text, self.vocabulary = text, vocabulary

    def propose(self, tokens: list[int], most: int, choose: Choose) -> list[int]:
        right = self.text[len(tokens) : len(tokens) + most]
        return right if len(tokens) % 2 else [(token + 1) % self.vocabulary for token in right]

    def close(self) -> None:
        """Nothing to free."""


class _Run:
    """Engines of the probe's own over one network."""

    def __init__(self, network: Network, sides: tuple[SidePath, ...] = ()) -> None:
        self.network = network
        self.sides = sides
        size = network.vocab_size
        self.prompt = [(7 + 7919 * place) % size for place in range(PROMPT_TOKENS)]
        self.params = SamplingParams(temperature=0.8, seed=20251, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0)

    def engine(self, pages: int = 12, budget: int = 256, drafter: Callable[[], Drafter] | None = None) -> Engine:
        runner = PagedRunner(self.network, page_count=pages)
        return Engine(runner, max_sequences=8, token_budget=budget, drafter=drafter)

    def submit(
        self, engine: Engine, prompt: list[int], name: str = "probe", *, salt: str = "", **changes: Any
    ) -> _Seen:
        seen = _Seen()
        params = SamplingParams(**{**self.params.__dict__, **changes})
        # With patches the company runs without them: nobody's bits may depend on anybody else's.
        sides = self.sides if name in ("probe", "first") else ()
        request = Request(name, prompt, params, on_token=seen.on_token, cache_salt=salt)
        request.on_prompt, request.on_finish = seen.prompt.extend, seen.finished.append
        engine.submit(replace(request, sides=sides, side_names=("patched",) * len(sides)))
        return seen

    def alone(self, **settings: Any) -> _Seen:
        return self.submit_and_drain(self.engine(**settings))

    def submit_and_drain(self, engine: Engine, **changes: Any) -> _Seen:
        seen = self.submit(engine, self.prompt, **changes)
        _drain(engine)
        return seen


def _drain(engine: Engine) -> None:
    while engine.step():
        pass


def _scenarios(run: _Run, solo: _Seen) -> Iterator[tuple[str, bool]]:
    expected = solo.tokens
    yield "the solo run ends as asked", len(expected) == NEW_TOKENS
    for budget in (16, PAGE + 1):
        yield f"chunks of {budget} tokens", run.alone(budget=budget).tokens == expected

    engine = run.engine()
    others = [run.submit(engine, run.prompt[start : start + 9], f"other {start}", seed=start) for start in (1, 30)]
    engine.step()
    seen = run.submit(engine, run.prompt)
    late = run.submit(engine, run.prompt[:40], "late", seed=3)
    _drain(engine)
    company = engine.largest_batch == 4 and all(other.finished for other in (*others, late))
    yield "among other requests", company and seen.tokens == expected

    if getattr(run.network, "shares_pages", True):
        yield from _cache_scenarios(run, expected)

    engine = run.engine(pages=3)
    run.submit(engine, run.prompt[:62], "older", seed=5, max_tokens=12)
    seen = run.submit(engine, run.prompt)
    _drain(engine)
    yield "after being put back", engine.stats().preemptions > 0 and seen.tokens == expected

    text = run.prompt + [token for token, _ in expected]
    engine = run.engine(drafter=lambda: _Guesses(text, run.network.vocab_size))
    seen = run.submit_and_drain(engine)
    yield "with drafts", engine.accepted_tokens > 0 and seen.tokens == expected

    engine = run.engine()
    seen = run.submit(engine, text, max_tokens=1, temperature=0.0, prompt_logprobs=0)
    _drain(engine)
    again = [(entry.token_id, entry.logprob) for entry in seen.prompt[-NEW_TOKENS:]]
    yield "as part of a prompt", again == expected


def _cache_scenarios(run: _Run, expected: list[tuple[int, float | None]]) -> Iterator[tuple[str, bool]]:
    engine = run.engine()
    run.submit_and_drain(engine, name="first", seed=9)
    seen = run.submit_and_drain(engine)
    yield "on a warm prefix cache", seen.finished[0].cached_tokens == PAGE and seen.tokens == expected

    seen = run.submit_and_drain(engine, salt="other")
    yield "under another salt", seen.finished[0].cached_tokens == 0 and seen.tokens == expected

    engine = run.engine()
    before = [(token + 1) % run.network.vocab_size for token in run.prompt[:PAGE]]
    run.submit(engine, before + run.prompt[:PAGE] + before[:1], "the same page later in a text", max_tokens=1)
    _drain(engine)
    yield "after the same page elsewhere", run.submit_and_drain(engine).tokens == expected
