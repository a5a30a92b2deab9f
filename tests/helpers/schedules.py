"""Random schedules of an engine, and the comparison of every request with its solo run, bit for bit."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from gnomon.arch.network import Network
from gnomon.engine.drafting import Choose
from gnomon.engine.engine import Engine
from gnomon.engine.request import Decision, Finished, PromptLogprob, Request, SamplingParams, TokenEvent
from gnomon.engine.runner import PagedRunner
from gnomon.kernels.batch import PAGE
from gnomon.kernels.side import SidePath

Patches = dict[str, SidePath]
"""What runs beside the weights, by name, in order."""


@dataclass
class Record:
    """What one request saw."""

    events: list[tuple[int, float | None, tuple[tuple[int, float], ...]]] = field(default_factory=list)
    prompt: list[PromptLogprob] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)

    def request(
        self, number: int, prompt: list[int], params: SamplingParams, index: int = 0, patches: Patches | None = None
    ) -> Request:
        def on_token(event: TokenEvent) -> Decision:
            self.events.append((event.token_id, event.logprob, event.top))
            return Decision.CONTINUE

        return Request(
            id=str(number),
            prompt_ids=prompt,
            sampling=params,
            stream_index=index,
            on_token=on_token,
            on_prompt=self.prompt.extend,
            on_finish=self.finished.append,
            sides=tuple((patches or {}).values()),
            side_names=tuple(patches or {}),
        )


def params_for(rng: random.Random) -> SamplingParams:
    greedy = rng.random() < 0.3
    return SamplingParams(
        temperature=0.0 if greedy else rng.choice([0.3, 0.8, 1.4]),
        top_k=rng.choice([0, 0, 5, 40]),
        top_p=rng.choice([1.0, 0.9, 0.5]),
        min_p=rng.choice([0.0, 0.05]),
        repetition_penalty=rng.choice([1.0, 1.3]),
        frequency_penalty=rng.choice([0.0, 0.4]),
        seed=rng.randrange(2**64),
        max_tokens=rng.randint(1, 12),
        logprobs=rng.choice([None, 0, 3]),
        prompt_logprobs=rng.choice([None, None, None, 1]),
        eos_token_ids=frozenset({2}),
    )


class HalfRight:
    """Guesses from the texts that will come, and wrongly at every third length."""

    def __init__(self, texts: list[list[int]]) -> None:
        self.texts = texts

    def propose(self, tokens: list[int], most: int, choose: Choose) -> list[int]:
        own = next((text for text in self.texts if text[: len(tokens)] == tokens), [])
        guess = own[len(tokens) : len(tokens) + most]
        return [token + (len(tokens) % 3 == 0) for token in guess]

    def close(self) -> None:
        """Nothing to free."""


@dataclass
class Seen:
    """What the schedules contained: a comparison in which nothing happened proves nothing."""

    requests: int = 0
    preemptions: int = 0
    hits: int = 0
    chunked: int = 0
    largest_batch: int = 0
    accepted: int = 0
    pauses: int = 0
    different: list[str] = field(default_factory=list)


def compare_schedule(
    network: Network,
    seed: int,
    seen: Seen,
    *,
    vocabulary: int = 290,
    patches: list[Patches] | None = None,
    brief: bool = False,
) -> None:
    """One random schedule: arrivals, chunking, hits, preemption, cancellation, in each third one requests that are not
    ready now and then; differences go to seen.different.

    patches: each request gets one of these sets of patches. brief: for real models, at most five requests of at most
    four tokens, and prompts that the budget fills in some tens of steps.
    """
    rng, other = random.Random(seed), random.Random(-seed)
    shared = [rng.randrange(3, vocabulary) for _ in range(rng.choice([0, 64, 130]))]
    jobs = []
    for number in range(rng.randint(2, 9)):
        own = [rng.randrange(3, vocabulary) for _ in range(rng.choice([1, 5, PAGE - 1, PAGE, PAGE + 1, 100]))]
        prompt = (shared if rng.random() < 0.7 else []) + own
        if jobs and other.random() < 0.2:  # another choice of an earlier prompt
            prompt = jobs[-1][1]
        jobs.append((number, prompt, params_for(rng), rng.randrange(3), other.choice(patches or [{}])))
    budget = rng.choice([1, 3, 16, 17, 64, 257])
    if brief:
        most_tokens = 24 * budget if budget < 16 else 2 * PAGE + 5
        jobs = [(n, text[:most_tokens], replace(p, max_tokens=min(p.max_tokens, 4)), *r) for n, text, p, *r in jobs[:5]]
    pages, most = rng.choice([4, 5, 40]), rng.choice([2, 4, 16])
    alone = {job[0]: solo(network, *job) for job in jobs}
    texts = [prompt + [event[0] for event in alone[number].events] for number, prompt, *_ in jobs]
    runner = PagedRunner(network, page_count=pages)
    engine = Engine(runner, max_sequences=most, token_budget=budget, drafter=lambda: HalfRight(texts))
    records = {number: Record() for number, *_ in jobs}
    moods = random.Random(seed + 1)

    def ready() -> bool:
        pauses = seed % 3 == 0 and moods.random() < 0.4
        seen.pauses += pauses
        return not pauses

    waiting = list(jobs)
    cancelled: set[int] = set()
    while waiting or engine.sequences:
        while waiting and rng.random() < 0.5:
            number, *job = waiting.pop(0)
            engine.submit(replace(records[number].request(number, *job), ready=ready))
        if engine.sequences and rng.random() < 0.02:
            victim = rng.choice(list(engine.sequences))
            cancelled.add(int(victim))
            engine.cancel(victim)
        engine.step()
    for number, prompt, *_ in jobs:
        record, own = records[number], alone[number]
        seen.requests += 1
        same = len(record.finished) == 1 and record.events == own.events[: len(record.events)]
        if number not in cancelled:
            same = same and record.events == own.events and record.prompt == own.prompt
            same = same and record.finished[0].reason == own.finished[0].reason
            seen.chunked += len(prompt) > budget
        if not same:
            seen.different.append(f"schedule {seed}, request {number}")
    stats = engine.stats()
    if (stats.pages_used, stats.running, stats.waiting) != (0, 0, 0):
        seen.different.append(f"schedule {seed} left {stats}")
    seen.preemptions += stats.preemptions
    seen.hits += stats.cached_tokens
    seen.accepted += stats.accepted_tokens
    seen.largest_batch = max(seen.largest_batch, stats.largest_batch)


def solo(
    network: Network, number: int, prompt: list[int], params: SamplingParams, index: int, patches: Patches
) -> Record:
    """The request with an engine to itself, in one chunk, without speculation."""
    record = Record()
    engine = Engine(PagedRunner(network, page_count=8), token_budget=1000, drafter=None)
    engine.submit(record.request(number, prompt, params, index, patches))
    while engine.step():
        pass
    return record
