"""Which replica of a service gets a request, who is out, and how everything waits while nobody answers.

A replica that fails several times in a row is taken out. A thread of its own then asks it, after a cool-down, whether
it works again. Requests wait while no replica is left: one line says so, another every half minute, one at the end.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llmdistill.errors import UserError
from llmdistill.wire.addresses import LOOK_AGAIN_S
from llmdistill.wire.patience import Clock, Failed, Patience, again, jitter, who_waits

Status = Callable[[str], None]
Cancelled = Callable[[], bool]

UNREADABLE = (ValueError, LookupError, TypeError, RecursionError)  # of parsing, where an answer has another shape


class Gone(RuntimeError):
    """The one replica of a transport is none any more: its name does not lead there."""


@dataclass(eq=False)
class Replica:
    """One address of the service."""

    url: str
    up: bool = False
    asked: bool = False  # whether it has been probed at all
    reason: str = ""  # of its last failure
    failures: int = 0  # in a row
    failed_at: float = 0.0
    probes: int = 0  # in vain, since it last worked
    in_flight: int = 0
    taken_at: float = field(default_factory=lambda: -jitter(0, 1))  # clients that start together do not start here
    gone: bool = False  # its name does not lead there any more


class Replicas:
    """The replicas of one service. Threads may share it.

    Args:
        urls: as in the recipe, for messages.
        section: of the recipe, for messages.
        locate: urls of the machines these mean now; an OSError where that cannot be told.
        changes: whether that may become others.
        admit: asks one replica whether it may get requests; a UserError of it stops the run.
        on_status: gets one line when requests start to wait, every ``status_every_s`` and when they go on.
        clock: what waiting goes by.
    """

    def __init__(
        self,
        urls: Sequence[str],
        section: str,
        locate: Callable[[], Sequence[str]],
        changes: bool,
        admit: Callable[[Replica], None],
        patience: Patience,
        on_status: Status,
        clock: Clock,
    ) -> None:
        self.urls, self.section, self.patience, self.clock = tuple(urls), section, patience, clock
        self.changed = threading.Condition()  # replicas came or went, a request was cancelled, the end
        self.closed = False
        self.gone: Cancelled = lambda: False  # asked while something waits
        self.seconds_waited = 0.0
        self._admit, self._on_status, self._locate = admit, on_status, locate
        self._fatal: Exception | None = None
        self._down_since: float | None = None  # the first failure since anything worked
        self._announced: float | None = None
        self._all: list[Replica] = []
        try:
            self._are(locate())
        except OSError:  # connecting will say so
            self._are(self.urls)
        if changes:
            threading.Thread(target=self._follow, daemon=True).start()

    def up(self) -> list[Replica]:
        """Those that get requests."""
        with self.changed:
            return [r for r in self._all if r.up]

    def present(self) -> list[str]:
        """Urls of all there are."""
        with self.changed:
            return [r.url for r in self._all]

    def wait_ready(self) -> None:
        """Returns when one replica is admitted and every other has been asked once.

        Raises:
            UserError: none within ``max_outage_s``, or what ``admit`` raised.
        """
        since = self.clock.now()
        with self.changed:
            while not (self.up() and all(r.asked for r in self._all)):
                self._check(None)
                if self.up():
                    self.clock.wait(self.changed, self.patience.status_every_s)
                else:
                    self._wait(since)
            self._check(None)
            self._worked()

    def take(self, last: Replica | None, stay: bool, since: float | None, cancelled: Cancelled | None) -> Replica:
        """A replica for the next try of a request: the least busy one.

        Args:
            last: where the try before went; another one is better, unless it is the one to ``stay`` with.
            since: when the request began to fail.

        Raises:
            UserError: none within ``max_outage_s``.
        """
        began = self.clock.now()
        with self.changed:
            while True:
                self._check(cancelled)
                if up := self.up():
                    if last is None or not stay or last not in up:
                        others = [r for r in up if r is not last]
                        last = min(others or up, key=lambda r: (r.in_flight, r.taken_at))
                    last.in_flight, last.taken_at = last.in_flight + 1, self.clock.now()
                    self.seconds_waited += last.taken_at - began
                    return last
                self._wait(began if since is None else since)

    def release(self, replica: Replica, worked: bool = False) -> None:
        """The try has ended."""
        with self.changed:
            replica.in_flight -= 1
            if worked:
                replica.failures, replica.probes, replica.reason = 0, 0, ""
                self._worked()

    def failed(self, replica: Replica, failure: Failed, began: float) -> None:
        """The try that started at ``began`` has ended in vain."""
        with self.changed:
            now = self.clock.now()
            replica.in_flight -= 1
            replica.reason = failure.reason
            self._down_since = now if self._down_since is None else self._down_since
            if failure.busy or began < replica.failed_at:  # one event breaks every try that is under way
                return
            replica.failed_at, replica.failures = now, replica.failures + 1
            if replica.up and replica.failures >= self.patience.eject_after:
                replica.up = False
                replica.failures = self.patience.eject_after - 1  # when it is back, one more takes it out again
                self._nurse_in_thread(replica, self.patience.cool_down_s)

    def pause(self, seconds: float, since: float, cancelled: Cancelled | None) -> None:
        """Between two tries of a request that began to fail at ``since``.

        Raises:
            UserError: that is ``max_outage_s`` ago.
        """
        began = self.clock.now()
        with self.changed:
            while (now := self.clock.now()) < began + seconds or now >= since + self.patience.max_outage_s:
                self._check(cancelled)
                silent = self._down_since is not None and now - self._down_since >= self.patience.status_every_s
                self._wait(since, until=began + seconds, announce=silent)
            self.seconds_waited += now - began

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def _follow(self) -> None:
        """Looks whether names mean others by now."""
        while self._sleep(LOOK_AGAIN_S):
            with contextlib.suppress(OSError):
                self._are(self._locate())

    def _are(self, urls: Sequence[str]) -> None:
        """Those that there are now: others are let go of, with what they are at work with."""
        with self.changed:
            for replica in self._all:
                if replica.url not in urls:
                    replica.gone, replica.up = True, False
            new = [Replica(url) for url in urls if url not in {r.url for r in self._all}]
            self._all = [r for r in self._all if not r.gone] + new
            self.changed.notify_all()
        for replica in new:
            self._nurse_in_thread(replica, 0.0)

    def _nurse_in_thread(self, replica: Replica, delay: float) -> None:
        threading.Thread(target=self._nurse, args=(replica, delay), daemon=True).start()

    def _nurse(self, replica: Replica, delay: float) -> None:
        """Asks a replica until it is admitted."""
        while self._sleep(delay) and not replica.gone:
            reason = ""
            fatal: Exception | None = None
            try:
                self._admit(replica)
            except Failed as failure:
                reason = failure.reason
            except UserError as error:
                fatal = error
            except UNREADABLE as error:
                reason = f"says who it is in a way that cannot be read: {error or type(error).__name__}"
            except Exception as error:
                fatal = error
            with self.changed:
                self._fatal = self._fatal or fatal
                replica.reason = reason or replica.reason  # ready again, and yet a request may fail as before
                replica.asked, replica.up = True, not (reason or fatal or replica.gone)
                self.changed.notify_all()
                if not reason:
                    return
                replica.probes += 1
                longest = min(
                    self.patience.max_backoff_s, self.patience.cool_down_s * 2.0 ** min(replica.probes - 1, 30)
                )
            delay = longest * jitter(0.5, 1)

    def _sleep(self, delay: float) -> bool:
        end = self.clock.now() + delay
        with self.changed:
            while not self.closed and (now := self.clock.now()) < end:
                self.clock.wait(self.changed, end - now)
            return not self.closed

    def _wait(self, since: float, until: float = float("inf"), announce: bool = True) -> None:
        """Waits for a change, the time of a status line, or the end of patience. The lock is held."""
        now, end = self.clock.now(), since + self.patience.max_outage_s
        if now >= end:
            where = f" {self.urls[0]}" if len(self.urls) == 1 else ""  # the reasons name several
            raise UserError(
                f"{self.section}{where} gave no answer for {self.patience.max_outage_s:g} s: {self._reasons()}. "
                f"Fix: start the service, then {again(self.section)}; a longer max_outage_s waits longer."
            )
        every = self.patience.status_every_s
        self._down_since = now if self._down_since is None else self._down_since
        asked = all(r.asked for r in self._all)  # before that there is little to say
        if announce and asked and (self._announced is None or now - self._announced >= every):
            self._announced = now
            self._on_status(
                f"{self.section} {', '.join(self.urls)} unreachable since {now - self._down_since:.0f} s "
                f"({self._reasons()}); {who_waits(self.section)} waits, gives up after {self.patience.max_outage_s:g} s"
            )
        line = (self._announced if self._announced is not None else now) + every
        self.clock.wait(self.changed, max(min(end, until, line) - now, 0.001))

    def _worked(self) -> None:
        if self._announced is not None and self._down_since is not None:
            seconds = self.clock.now() - self._down_since
            self._on_status(f"{self.section} {', '.join(self.urls)} is back after {seconds:.0f} s")
        self._down_since = self._announced = None

    def _reasons(self) -> str:
        if len(self._all) == 1:
            return self._all[0].reason or "not asked yet"
        return "; ".join(f"{r.url}: {r.reason or 'no failure'}" for r in self._all)

    def _check(self, cancelled: Cancelled | None) -> None:
        if self._fatal is not None:
            raise self._fatal
        if self.gone():
            raise Gone(f"{self.section} {', '.join(self.urls)} is no replica any more")
        if self.closed or (cancelled is not None and cancelled()):
            raise RuntimeError("the transport was closed, or another request of the same call has failed")
