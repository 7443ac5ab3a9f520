"""What the service counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    ProcessCollector,
    generate_latest,
)

LAGS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """A registry of its own: the engine's library may have others."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self._longest = 0.0
        ProcessCollector(registry=registry)  # memory, CPU time, open files
        self.requests = Counter("llmdistill_requests", "Answered", ["endpoint", "status"], registry=registry)
        self.seconds = Histogram(
            "llmdistill_request_seconds", "From arrival to answer", ["endpoint"], buckets=SECONDS, registry=registry
        )
        self.positions = Counter("llmdistill_scored_positions", "Scored, replays not counted", registry=registry)
        self.generated = Counter("llmdistill_generated_tokens", "Sampled, replays not counted", registry=registry)
        self.evidence = Counter("llmdistill_evidence_bytes", "Bytes of score blocks sent", registry=registry)
        self.given_up = Gauge("llmdistill_given_up_requests", "Cancelled: nobody waited any more", registry=registry)
        self.lag = Histogram(
            "llmdistill_loop_lag_seconds", "How late the event loop was", buckets=LAGS, registry=registry
        )
        self.longest_lag = Gauge("llmdistill_longest_loop_lag_seconds", "Since the last time asked", registry=registry)
        self.replayed = Gauge("llmdistill_replayed_requests", "Answered from what was kept", registry=registry)
        self.kept = Gauge("llmdistill_kept_answer_bytes", "Held for requests sent again", registry=registry)
        self.in_house = Gauge("llmdistill_requests_in_house", "Waiting or at work", registry=registry)
        self.tokens = Gauge("llmdistill_tokens_in_house", "Tokens of those", registry=registry)
        self.waiting = Gauge("llmdistill_requests_waiting", "That the engine has not got yet", registry=registry)
        self.pushed_out = Gauge(
            "llmdistill_pushed_out_requests", "Gave their place to a client that had less", registry=registry
        )
        self.version = Gauge("llmdistill_policy_version", "Of the weights that answer", registry=registry)

    def late(self, seconds: float) -> None:
        """The event loop ran something so much later than it was to."""
        self.lag.observe(seconds)
        self._longest = max(self._longest, seconds)

    def text(self) -> bytes:
        self.longest_lag.set(self._longest)
        self._longest = 0.0
        return generate_latest(self.registry)


def engine_metrics() -> bytes:
    """What the engine's library counts in the registry of this process: vLLM's queue, cache, preemptions, latencies."""
    return generate_latest(_OfTheEngine())  # type: ignore[arg-type]


class _OfTheEngine:
    """The process's registry without what is in it by itself (memory, Python), which ours has too."""

    def collect(self) -> Iterator[Metric]:
        return (metric for metric in REGISTRY.collect() if metric.name.startswith("vllm:"))
