"""What one service takes on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of one request and of all that are in the house. A request past them costs its sender an error."""

    top_k: int = 128  # listed tokens a position, the caller's included
    sequence_tokens: int = 4096  # one sequence, prompt and completion
    sequences: int = 512  # sequences (or samples) of one request
    positions: int = 131072  # scored positions of one request
    new_tokens: int = 32768  # of one completion
    body_bytes: int = 64 << 20
    json_bytes: int = 1 << 20  # of a body that is JSON: parsing it stops everything else in the process
    body_s: float = 120.0  # for a body to arrive
    silence_s: float = 30.0  # between two parts of an upload
    bodies_bytes: int = 512 << 20  # of all bodies that are being read
    in_flight: int = 256  # requests in the house, waiting ones included
    callers_per_request: int = 4  # that may be answered, told to wait included, for each of those
    queue_tokens: int = 1 << 20  # tokens of all requests in the house
    answers_bytes: int = 256 << 20  # kept for requests that are sent again
    answers_s: float = 600.0  # and for how long
    abandoned_s: float = 30.0  # that work goes on whose callers have all hung up
    adapters: int = 4  # loaded at one time

    @property
    def callers(self) -> int:
        """Requests that are answered at one time, if only by being told to wait; probes come on top."""
        return self.callers_per_request * self.in_flight

    @property
    def connections(self) -> int:
        """Open at one time: more than callers, so that one that is idle can be closed for a new one."""
        return 2 * self.callers + 64
