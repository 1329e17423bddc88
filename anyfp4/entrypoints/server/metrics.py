"""What ``/metrics`` exports; docs/metrics.md lists exactly these."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from anyfp4.engine.outputs import RequestOutput
from anyfp4.engine.stats import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)

#: field of EngineStats -> (name, help)
_GAUGES = {
    "running": ("anyfp4_sequences_running", "Sequences that run now."),
    "waiting": ("anyfp4_sequences_waiting", "Sequences that wait for a place."),
    "kv_blocks_total": ("anyfp4_kv_blocks_capacity", "Blocks of the KV cache."),
    "kv_blocks_used": ("anyfp4_kv_blocks_used", "Blocks held by unfinished sequences."),
    "kv_blocks_cached": ("anyfp4_kv_blocks_cached", "Free blocks that still hold a reusable prefix."),
}
_COUNTERS = {
    "prompt_tokens_computed": ("anyfp4_prompt_tokens_computed", "Prompt tokens the model ran, recomputation included."),
    "generated_tokens": ("anyfp4_generated_tokens", "New tokens."),
    "prefix_query_tokens": ("anyfp4_prefix_cache_query_tokens", "Prompt tokens looked up in the prefix cache."),
    "prefix_hit_tokens": ("anyfp4_prefix_cache_hit_tokens", "Prompt tokens taken from the prefix cache."),
    "prefix_evicted_blocks": (
        "anyfp4_prefix_cache_evicted_blocks",
        "Blocks with a reusable prefix that were overwritten.",
    ),
    "preemptions": ("anyfp4_preemptions", "Sequences put back in the queue because blocks ran out."),
    "steps": ("anyfp4_engine_steps", "Steps of the engine."),
    "steps_ahead": (
        "anyfp4_engine_steps_ahead",
        "Steps of those that were launched before the tokens of the step before were read.",
    ),
    "step_seconds": ("anyfp4_engine_step_seconds", "Seconds spent in steps."),
    "schedule_seconds": ("anyfp4_engine_schedule_seconds", "Seconds of those spent choosing what to run."),
}


class _EngineCollector(Collector):
    """Reads the engine's own numbers at the moment of a scrape."""

    def __init__(self, stats: Callable[[], EngineStats], up: Callable[[], bool]) -> None:
        self._stats, self._up = stats, up

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        yield GaugeMetricFamily("anyfp4_up", "1 while new requests are taken.", value=float(self._up()))
        for name, (metric, text) in _GAUGES.items():
            yield GaugeMetricFamily(metric, text, value=getattr(stats, name))
        for name, (metric, text) in _COUNTERS.items():
            yield CounterMetricFamily(metric, text, value=getattr(stats, name))


class _Registry(CollectorRegistry):
    """Without the ``_created`` times that the client library adds to every counter."""

    def collect(self) -> Iterable[Metric]:
        for family in super().collect():
            family.samples = [s for s in family.samples if not s.name.endswith("_created")]
            yield family


class Metrics:
    """Counters and histograms of one server, in a registry of its own."""

    def __init__(self, stats: Callable[[], EngineStats], up: Callable[[], bool]) -> None:
        """Registers everything.

        Args:
            stats: the engine's numbers.
            up: whether new requests are taken.
        """
        self.registry = registry = _Registry()
        registry.register(_EngineCollector(stats, up))
        self.prompt_tokens = Counter("anyfp4_prompt_tokens", "Prompt tokens of accepted requests.", registry=registry)
        self.finished = Counter(
            "anyfp4_completions_finished", "Completions that ended, by reason.", ["reason"], registry=registry
        )
        self.responses = Counter(
            "anyfp4_http_responses", "Responses of HTTP.", ["method", "path", "code"], registry=registry
        )
        self.first_token = Histogram(
            "anyfp4_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_LONG,
            registry=registry,
        )
        self.inter_token = Histogram(
            "anyfp4_inter_token_latency_seconds", "Between two tokens.", buckets=_SHORT, registry=registry
        )
        self.duration = Histogram(
            "anyfp4_request_duration_seconds",
            "From a request's arrival to its last token.",
            buckets=_LONG,
            registry=registry,
        )

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)


@dataclass
class Watch:
    """Times one HTTP request's tokens.

    Attributes:
        started: when it arrived, on ``time.perf_counter``.
        first: when its first token came.
    """

    metrics: Metrics
    started: float
    first: float | None = None
    _last: dict[tuple[int, int], tuple[int, float]] = field(default_factory=dict)

    def see(self, stream: int, output: RequestOutput) -> None:
        """Takes the newest state of one of its prompts."""
        now = time.perf_counter()
        for completion in output.outputs:
            key, count = (stream, completion.index), len(completion.token_ids)
            before, then = self._last.get(key, (0, self.started))
            if count == before:
                continue
            if self.first is None:
                self.first = now
                self.metrics.first_token.observe(now - self.started)
            if before:
                for _ in range(count - before):
                    self.metrics.inter_token.observe((now - then) / (count - before))
            self._last[key] = (count, now)

    def end(self, reasons: Iterable[str]) -> None:
        """The request has ended, its completions for these reasons."""
        for reason in reasons:
            self.metrics.finished.labels(reason).inc()
        if self._last:
            self.metrics.duration.observe(max(now for _, now in self._last.values()) - self.started)
