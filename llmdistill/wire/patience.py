"""How failures are answered: how long a run waits, how often it tries again, and the clock all of that goes by."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass

_jitter = random.Random()  # not the global state: a resumed run has to find that undisturbed


def who_waits(section: str) -> str:
    """What stands still while a service does not answer, by the section of settings that names its url."""
    return "the evaluation" if section == "eval" else "training"


def again(section: str) -> str:
    """How to go on once the service is back."""
    if section == "eval":
        return "run the same command again, which keeps what was drawn"
    return "run again (training: with --resume)"


class Clock:
    """Time and waiting. Tests have one that does not wait."""

    def now(self) -> float:
        return time.monotonic()

    def wait(self, changed: threading.Condition, seconds: float) -> None:
        """Until ``changed``, whose lock is held, is notified, or so many seconds have gone by."""
        changed.wait(seconds)


@dataclass(eq=False)
class Failed(Exception):
    """One try came to nothing; another may not."""

    reason: str
    may_be_done: bool = False  # the service may have, or come to have, the answer
    busy: bool = False  # it works, only not for us now
    late: bool = False  # nothing came in time; it may be at work
    broken: bool = False  # it works and fails at this request: HTTP 500
    retry_after: float | None = None

    def delay(self, longest: float) -> float:
        """Seconds to the next try: full jitter, on top of what the service asked for."""
        drawn = jitter(0, longest)
        return drawn if self.retry_after is None else self.retry_after + min(drawn, self.retry_after / 4)


@dataclass(frozen=True)
class Patience:
    """How failures are answered. Times in seconds.

    Args:
        max_outage_s: how long a request keeps failing before the run stops.
        backoff_s, max_backoff_s: the n-th retry waits a random time up to ``backoff_s * 2**n``, at most the maximum.
        eject_after: failures in a row (those of overlapping tries count once) that take a replica out.
        cool_down_s: until a replica that was taken out is probed; doubles with every probe up to ``max_backoff_s``.
        status_every_s: between two lines that say what is waited for.
        broken_tries: HTTP 500 to one request, on different replicas where there are some, that stop the run.
        retries, retries_per_request, retries_per_s: all requests together may be tried again so often at once; the
            right to comes back with every request that is answered, and with time. Beyond that retries wait: what a
            struggling service needs least is the same work several times.
    """

    max_outage_s: float = 3600.0
    backoff_s: float = 0.25
    max_backoff_s: float = 15.0
    eject_after: int = 3
    cool_down_s: float = 1.0
    status_every_s: float = 30.0
    broken_tries: int = 3
    retries: int = 32
    retries_per_request: float = 0.2
    retries_per_s: float = 1.0

    def backoff(self, tries: int) -> float:
        return min(self.max_backoff_s, self.backoff_s * 2.0 ** min(tries, 30))


class Budget:
    """The right to try again, shared by all requests of a transport. Its owner holds a lock."""

    def __init__(self, patience: Patience, clock: Clock) -> None:
        self.patience, self.clock = patience, clock
        self._left, self._at = float(patience.retries), clock.now()

    def answered(self) -> None:
        self._refill(self.patience.retries_per_request)

    def spend(self) -> float:
        """Takes one, and says how many seconds it is until that was there to be taken."""
        self._refill(0.0)
        self._left -= 1
        return max(0.0, -self._left / self.patience.retries_per_s)

    def _refill(self, more: float) -> None:
        now = self.clock.now()
        more += (now - self._at) * self.patience.retries_per_s
        self._left, self._at = min(self._left + more, float(self.patience.retries)), now


def jitter(low: float, high: float) -> float:
    return _jitter.uniform(low, high)
