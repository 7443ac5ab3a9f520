"""What the service counts, for Prometheus."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

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
from prometheus_client.multiprocess import MultiProcessCollector

LAGS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

FILES = "PROMETHEUS_MULTIPROC_DIR"  # set before a process that counts in files imports the library
OLDEST = ("_created", "_start_time_seconds", "_max_fds")
LARGEST = ("llmdistill_longest_loop_lag_seconds", "llmdistill_policy_version")


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

    def now(self) -> CollectorRegistry:
        self.longest_lag.set(self._longest)
        self._longest = 0.0
        return self.registry


def engine_metrics() -> bytes:
    """What the engine's library counts: vLLM's queue, cache, preemptions, latencies. In the registry of this process,
    or in the files of all of them where these count in files."""
    if FILES not in os.environ:
        return generate_latest(_OfTheEngine(REGISTRY))  # type: ignore[arg-type]
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(_OfTheEngine(registry))  # type: ignore[arg-type]


class _OfTheEngine:
    """A registry without what is in it by itself (memory, Python), which ours has too."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry

    def collect(self) -> Iterator[Metric]:
        return (metric for metric in self.registry.collect() if metric.name.startswith("vllm:"))


Told = list[tuple[str, str, str, list[tuple[str, dict[str, str], float]]]]  # name, help, type, samples


def told(registry: CollectorRegistry) -> Told:
    """What a registry holds, to be sent to another process."""
    return [
        (m.name, m.documentation, m.type, [(s.name, dict(s.labels), s.value) for s in m.samples])
        for m in registry.collect()
    ]


def added_up(parts: list[Told]) -> bytes:
    """The metrics of several processes as those of one: sums, but for what is one thing in all of them."""
    families: dict[str, Metric] = {}
    values: dict[tuple[str, str, tuple[tuple[str, str], ...]], float] = {}
    for part in parts:
        for name, documentation, kind, samples in part:
            families.setdefault(name, Metric(name, documentation, kind))
            for sample, labels, value in samples:
                key = name, sample, tuple(sorted(labels.items()))
                if sample.endswith(OLDEST):
                    values[key] = min(value, values.get(key, value))
                elif sample in LARGEST:
                    values[key] = max(value, values.get(key, value))
                else:
                    values[key] = value + values.get(key, 0.0)
    for (name, sample, items), value in values.items():
        families[name].add_sample(sample, dict(items), value)
    return generate_latest(_Families(families.values()))  # type: ignore[arg-type]


class _Families:
    def __init__(self, families: Iterable[Metric]) -> None:
        self.families = families

    def collect(self) -> Iterator[Metric]:
        return iter(self.families)
