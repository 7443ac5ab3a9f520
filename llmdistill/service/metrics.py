"""What the service counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """A registry of its own: the engine's library may have others."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # memory, CPU time, open files
        self.requests = Counter("llmdistill_requests", "Answered", ["endpoint", "status"], registry=registry)
        self.seconds = Histogram(
            "llmdistill_request_seconds", "From arrival to answer", ["endpoint"], buckets=SECONDS, registry=registry
        )
        self.positions = Counter("llmdistill_scored_positions", "Scored, replays not counted", registry=registry)
        self.generated = Counter("llmdistill_generated_tokens", "Sampled, replays not counted", registry=registry)
        self.evidence = Counter("llmdistill_evidence_bytes", "Bytes of score blocks sent", registry=registry)
        self.replayed = Gauge("llmdistill_replayed_requests", "Answered from what was kept", registry=registry)
        self.kept = Gauge("llmdistill_kept_answer_bytes", "Held for requests sent again", registry=registry)
        self.in_house = Gauge("llmdistill_requests_in_house", "Waiting or at work", registry=registry)
        self.tokens = Gauge("llmdistill_tokens_in_house", "Tokens of those", registry=registry)
        self.version = Gauge("llmdistill_policy_version", "Of the weights that answer", registry=registry)

    def text(self) -> bytes:
        return generate_latest(self.registry)
