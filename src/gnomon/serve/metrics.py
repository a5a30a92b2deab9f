"""Prometheus metrics, named as vLLM's under our prefix, so that existing dashboards need one word changed.

One registry per server: several can live in one process (tests do).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from gnomon.generation import Chunk

if TYPE_CHECKING:
    from gnomon.serve.state import ServerState

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server."""

    def __init__(self, state: ServerState) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.success = Counter("gnomon:request_success", "Finished choices", ["finished_reason"], registry=r)
        self.rejected = Counter("gnomon:request_rejected", "Requests answered 429", registry=r)
        self.prompt_tokens = Counter("gnomon:prompt_tokens", "Prompt tokens of finished choices", registry=r)
        self.generation_tokens = Counter("gnomon:generation_tokens", "Generated tokens", registry=r)
        self.first_token = Histogram(
            "gnomon:time_to_first_token_seconds", "Admission to first text", buckets=SECONDS, registry=r
        )
        self.between = Histogram("gnomon:inter_token_latency_seconds", "Between pieces", buckets=SECONDS, registry=r)
        self.latency = Histogram("gnomon:e2e_request_latency_seconds", "Admission to end", buckets=SECONDS, registry=r)
        r.register(_EngineCollector(state))

    def chunk(self, chunk: Chunk, first: float | None, since: float) -> None:
        if not chunk.token_ids:
            return
        self.generation_tokens.inc(len(chunk.token_ids))
        (self.between.observe(since) if first is None else self.first_token.observe(first))

    def finished(self, chunk: Chunk, seconds: float) -> None:
        self.success.labels(chunk.finish_reason).inc()
        self.latency.observe(seconds)
        if chunk.usage:
            self.prompt_tokens.inc(chunk.usage.prompt_tokens)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """Reads the engines' own numbers when asked."""

    def __init__(self, state: ServerState) -> None:
        self.state = state

    def collect(self) -> Iterable[Metric]:
        running = GaugeMetricFamily("gnomon:num_requests_running", "Sequences in the batch", labels=["model"])
        waiting = GaugeMetricFamily("gnomon:num_requests_waiting", "Requests waiting", labels=["model"])
        usage = GaugeMetricFamily("gnomon:kv_cache_usage_perc", "Share of pages in use, 0..1", labels=["model"])
        hits = CounterMetricFamily("gnomon:prefix_cache_hits", "Prompt tokens found in the cache", labels=["model"])
        preempted = CounterMetricFamily("gnomon:num_preemptions", "Sequences preempted", labels=["model"])
        drafted = CounterMetricFamily("gnomon:spec_decode_num_draft_tokens", "Tokens guessed", labels=["model"])
        accepted = CounterMetricFamily(
            "gnomon:spec_decode_num_accepted_tokens", "Guessed tokens that the model confirmed", labels=["model"]
        )
        replays = CounterMetricFamily("gnomon:sentinel_replays", "Requests decoded twice", labels=["model"])
        alarms = CounterMetricFamily("gnomon:sentinel_mismatches", "Of these, with other bits: alarm", labels=["model"])
        for name, model in self.state.models.items():
            if model.encoder is not None:
                continue
            stats = model.stats()
            running.add_metric([name], stats.running)
            waiting.add_metric([name], stats.waiting)
            usage.add_metric([name], stats.pages_used / max(stats.pages_total, 1))
            hits.add_metric([name], stats.cached_tokens)
            preempted.add_metric([name], stats.preemptions)
            drafted.add_metric([name], stats.draft_tokens)
            accepted.add_metric([name], stats.accepted_tokens)
            replays.add_metric([name], stats.sentinel_replays)
            alarms.add_metric([name], stats.sentinel_mismatches)
        guard = list(_guard_metrics())
        return [*guard, running, waiting, usage, hits, preempted, drafted, accepted, replays, alarms]


def _guard_metrics() -> Iterable[Metric]:
    """The guard's counters, which belong to the process."""
    from gnomon.guard.meter import HELD_BUCKETS, METER, SECONDS_BUCKETS

    held = HistogramMetricFamily("gnomon:guard_hold_chars", "Characters held after a piece")
    seconds = HistogramMetricFamily("gnomon:guard_added_seconds", "Seconds that guarding a piece took")
    for family, counts, buckets, name in (
        (held, METER.held, HELD_BUCKETS, "held"),
        (seconds, METER.seconds, SECONDS_BUCKETS, "seconds"),
    ):
        total, rows = 0, []
        for limit in (*buckets, float("inf")):
            total += counts[limit]
            rows.append(("+Inf" if limit == float("inf") else str(float(limit)), total))
        family.add_metric([], rows, METER.sums[name])
        yield family
    findings = CounterMetricFamily("gnomon:guard_findings", "Findings", labels=["rule", "action"])
    for (rule, action), count in METER.findings.items():
        findings.add_metric([rule, action], count)
    yield findings
    aborts = CounterMetricFamily("gnomon:guard_aborts", "Answers ended by a block")
    aborts.add_metric([], METER.aborts)
    yield aborts
    rollbacks = CounterMetricFamily("gnomon:guard_rollbacks", "Times an answer was taken back to before a finding")
    rollbacks.add_metric([], METER.rollbacks)
    yield rollbacks
