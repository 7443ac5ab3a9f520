"""One idempotent request to a service, answered whatever happens on the way.

Retried: refused and broken connections, time-outs, half answers, 5xx, 429, answers that cannot be read. All tries of a
request carry one ``X-Request-Id``, so a service that kept the answer does not compute it again; a caller that has it
says so with its next request. A replica that is silent for a request and yet ``/ready`` is slow, not dead: the request
waits for it there. HTTP 500 three times to one request is a fault that trying again does not mend, and stops the run.
Which replica gets a try, and what happens while none works, is in :mod:`llmdistill.wire.replicas`; how often may be
tried again in :mod:`llmdistill.wire.patience`. Other 4xx are mistakes that a retry would repeat: they stop the run.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import httpx

from llmdistill.errors import UserError
from llmdistill.wire.addresses import located, may_change
from llmdistill.wire.exchange import JSON_BYTES, Exchange, Get, Refused, json_object, split_urls
from llmdistill.wire.patience import Budget, Clock, Failed, Patience, again
from llmdistill.wire.protocol import JSON_TYPE, READY
from llmdistill.wire.replicas import UNREADABLE, Cancelled, Gone, Replica, Replicas, Status

__all__ = ["Ask", "Counters", "Get", "Gone", "Refused", "Request", "Transport", "json_object", "split_urls"]

T = TypeVar("T")
R = TypeVar("R", covariant=True)
Ask = Callable[["Request[Any]"], Any]  # another request, to the same replica

_PROBE_TIMEOUT_S = 10.0  # readiness and identity are answered from memory
_DONE_IDS = 32  # in one header
_logger = logging.getLogger(__name__)


class Reader(Protocol[R]):
    """Takes the body of an answer in parts, as they come, and makes something of it."""

    def feed(self, part: bytes) -> None: ...

    def finish(self) -> R: ...


@dataclass(frozen=True)
class Request(Generic[T]):
    """A request that may be sent any number of times.

    Args:
        parse: reads the answer; a ValueError, LookupError or TypeError means that it came damaged and is fetched again,
            a UserError stops.
        reader: instead of it, makes what reads an answer while it is being written; its errors mean the same.
        body: bytes, or a function that gives them anew for every try; then ``length`` is how many there are.
        answer_type: media type of an answer; another one counts as damage.
        max_bytes: of the answer, as much as the request can need.
        already: asked before every try, with a way to send the same replica another request: an answer that is there
            without this one having to be sent, or None.
    """

    path: str
    parse: Callable[[httpx.Response], T] | None = None
    method: str = "POST"
    body: bytes | Callable[[], Iterable[bytes]] = b""
    length: int | Callable[[], int] | None = None
    body_type: str = JSON_TYPE
    answer_type: str = JSON_TYPE
    params: Mapping[str, str] = field(default_factory=dict)
    max_bytes: int = JSON_BYTES
    already: Callable[[Ask], T | None] | None = None
    reader: Callable[[], Reader[T]] | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def size(self) -> int:
        """Of the body, in bytes."""
        if isinstance(self.body, bytes):
            return len(self.body)
        return (self.length() if callable(self.length) else self.length) or 0


@dataclass
class Counters:
    """What a transport has done so far."""

    requests: int = 0  # that were answered
    retries: int = 0  # tries that came to nothing
    reattached: int = 0  # tries that ended before a slow answer was there, and were taken up again
    bytes_sent: int = 0  # bodies of tries that were answered
    bytes_received: int = 0  # bodies, as they came over the wire
    seconds_waited: float = 0.0  # of all requests together: between tries, or without a replica


class Transport:
    """Sends requests to one or several replicas of a service. Threads may share it.

    Args:
        urls: of the replicas: a list, or one string with commas. A trailing ``/v1`` is understood. Every address of a
            name is a replica (:mod:`llmdistill.wire.addresses`), those that it gets later too.
        token: sent as ``Authorization: Bearer``; see :mod:`llmdistill.wire.tokens`.
        section: of the recipe, for messages.
        admit: called with a function that GETs a path from one replica, before the replica gets its first request and
            again before it comes back; returning admits it, a UserError stops the run. None: ``/ready`` has to be 200.
        timeout_s: longest silence of the service within one try.
        in_flight: requests under way at one time, over all replicas.
        keeps_answers: whether the service goes on with a request whose caller hung up, and has its answer when it comes
            back. Where not, a request that timed out is given twice the time at its next try.
        clock: what waiting goes by.
        named: the url with the name, where ``urls`` is one of its addresses.
        patience: the fields of :class:`~llmdistill.wire.patience.Patience`.

    Raises:
        UserError: not an http(s) url, or a token for other hosts.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        token: str | None = None,
        section: str = "teacher",
        admit: Callable[[Get], None] | None = None,
        timeout_s: float = 120.0,
        connect_timeout_s: float = 5.0,
        in_flight: int = 8,
        keeps_answers: bool = True,
        on_status: Status = _logger.warning,
        clock: Clock | None = None,
        named: str = "",
        **patience: Any,
    ) -> None:
        self.urls, self.section = split_urls(urls, section), section
        self._settings = {"token": token, "section": section, "admit": admit, "timeout_s": timeout_s, **patience}
        self._settings |= {"connect_timeout_s": connect_timeout_s, "in_flight": in_flight, "clock": clock}
        self._settings |= {"keeps_answers": keeps_answers, "on_status": on_status}
        self.in_flight, self.timeout_s, self.keeps_answers = in_flight, timeout_s, keeps_answers
        self._connect_timeout_s = connect_timeout_s
        self._admit, self._counters, self.clock = admit, Counters(), clock or Clock()
        names = (named,) if named else self.urls
        self._exchange = Exchange(names, token, section, timeout=self._timeout(), connections=in_flight + len(names))
        if named:
            self._exchange.knows(self.urls[0], named)
        self._slots = threading.BoundedSemaphore(in_flight)
        told = Patience(**patience)
        self._budget = Budget(told, self.clock)
        self._done: dict[str, deque[str]] = defaultdict(deque)  # url -> ids whose answers need not be kept
        changes = any(may_change(url) for url in self.urls)
        self._replicas = Replicas(self.urls, section, self._locate, changes, self._ask, told, on_status, self.clock)

    @property
    def counters(self) -> Counters:
        self._counters.seconds_waited = self._replicas.seconds_waited
        return self._counters

    def wait_ready(self) -> None:
        """Returns when one replica is admitted and every other has been asked once.

        Raises:
            UserError: none within ``max_outage_s``, or what ``admit`` raised.
        """
        self._replicas.wait_ready()

    def replicas(self) -> list[str]:
        """Urls of all machines that the urls mean now: a name may be several."""
        return self._replicas.present()

    def only(self, url: str) -> Transport:
        """A transport of its own to one of them. What it sends raises :class:`Gone` once that is none any more."""
        one = Transport(url, named=self._exchange.name_of(url), **self._settings)
        one._replicas.gone = lambda: url not in self.replicas()
        return one

    def admitted(self) -> list[str]:
        """Urls of the replicas that get requests now."""
        return [r.url for r in self._replicas.up()]

    def send(self, request: Request[T], cancelled: Cancelled | None = None) -> T:
        """The parsed answer.

        Raises:
            Refused: the service will not serve it.
            UserError: no answer within ``max_outage_s`` of the first failure, HTTP 500 again and again, or what
                ``parse`` raised.
        """
        with self._slots:
            return _Sending(self, request, cancelled).answer()

    def send_all(self, requests: Sequence[Request[T]], at_once: int | None = None) -> list[T]:
        """The answers in the order of the requests; up to ``in_flight`` are under way, the first ones first.

        Args:
            at_once: fewer of them.

        Raises:
            UserError: of the first request that cannot be answered; the others are given up.
        """
        if len(requests) <= 1:
            return [self.send(r) for r in requests]
        batch = _Batch(requests)
        # Daemons, not a pool: Ctrl-C has to end the process without waiting for answers that are on their way.
        for _ in range(min(self.in_flight, at_once or self.in_flight, len(requests))):
            threading.Thread(target=self._work, args=(batch,), daemon=True).start()
        changed = self._replicas.changed
        try:
            with changed:
                changed.wait_for(lambda: batch.error is not None or batch.missing == 0)
        finally:
            with changed:
                batch.cancelled = True
                changed.notify_all()
        if batch.error is not None:
            raise batch.error
        return batch.answers

    def close(self) -> None:
        """Ends what is waiting. Closing twice is harmless."""
        self._replicas.close()
        self._exchange.close()

    def _work(self, batch: _Batch) -> None:
        changed = self._replicas.changed
        while True:
            with changed:
                index = next(batch.indices, None)
            if index is None or batch.cancelled:
                return
            try:
                answer = self.send(batch.requests[index], lambda: batch.cancelled)
            except BaseException as error:
                with changed:
                    batch.error = batch.error or error
                    changed.notify_all()
                return
            with changed:
                batch.answers[index] = answer
                batch.missing -= 1
                changed.notify_all()

    def _timeout(self, doublings: int = 0) -> httpx.Timeout:
        return httpx.Timeout(self.timeout_s * 2.0 ** min(doublings, 20), connect=self._connect_timeout_s, pool=None)

    def _locate(self) -> list[str]:
        found = {place: url for url in self.urls for place in located(url)}
        for place, url in found.items():
            self._exchange.knows(place, url)
        return list(found)

    def _ask(self, replica: Replica) -> None:
        def get(path: str, body: bytes | None = None) -> httpx.Response:
            if body is None:
                return self._exchange.send(replica.url, "GET", path, timeout=_PROBE_TIMEOUT_S)
            headers = {"Content-Type": JSON_TYPE}
            return self._exchange.send(
                replica.url, "POST", path, content=body, headers=headers, timeout=self._timeout()
            )

        if self._admit is None:
            get(READY)
        else:
            self._admit(get)

    def _alive(self, replica: Replica) -> bool:
        """Whether a replica that is silent for one request answers another: then it is only slow."""
        try:
            self._exchange.send(replica.url, "GET", READY, timeout=_PROBE_TIMEOUT_S)
        except Failed as failure:
            return failure.busy
        except Refused:  # a server that knows no such path
            return True
        return True

    def _try(self, replica: Replica, request: Request[T], doublings: int = 0) -> T:
        if request.already is not None:
            found = request.already(lambda other: self._try(replica, other))
            if found is not None:
                return found
        size = request.size()
        headers = {"X-Request-Id": request.id, "Content-Type": request.body_type, "Content-Length": str(size)}
        if request.method == "POST" and (done := self._take_done(replica.url)):
            headers["X-Request-Done"] = ",".join(done)
        reader, received = request.reader() if request.reader is not None else None, 0

        def read(answer: httpx.Response, parts: Iterator[bytes]) -> None:
            nonlocal received
            _check_type(answer, request)
            for part in parts:
                received += len(part)
                reader.feed(part)  # type: ignore[union-attr]

        try:
            response = self._exchange.send(
                replica.url,
                request.method,
                request.path,
                max_bytes=request.max_bytes,
                content=request.body if isinstance(request.body, bytes) else request.body(),
                params=request.params,
                headers=headers,
                timeout=self._timeout(doublings),
                read=None if reader is None else read,
            )
            _check_type(response, request)
            self._count(bytes_sent=size, bytes_received=len(response.content) + received)
            if reader is not None:
                return reader.finish()
            assert request.parse is not None
            return request.parse(response)
        except (UserError, Failed):
            raise
        except UNREADABLE as error:
            raise Failed(f"answer to {request.path} is damaged: {error or type(error).__name__}", True) from error

    def _let_go(self, url: str, request: Request[Any]) -> None:
        """The replica need not keep the answer, nor go on working it out: told with the next request it gets."""
        if self.keeps_answers and request.method == "POST":
            with self._replicas.changed:
                self._done[url].append(request.id)

    def _take_done(self, url: str) -> list[str]:
        with self._replicas.changed:
            ids = self._done[url]
            return [ids.popleft() for _ in range(min(len(ids), _DONE_IDS))]

    def _count(self, **more: int) -> None:
        with self._replicas.changed:
            for name, value in more.items():
                setattr(self._counters, name, getattr(self._counters, name) + value)


def _check_type(response: httpx.Response, request: Request[Any]) -> None:
    kind = response.headers.get("content-type", "").split(";")[0].strip()
    if kind != request.answer_type:
        raise Failed(f"{request.path} answered {kind or 'no content type'} instead of {request.answer_type}", True)


class _Sending(Generic[T]):
    """One request on its way: its tries so far."""

    def __init__(self, transport: Transport, request: Request[T], cancelled: Cancelled | None) -> None:
        self.transport, self.request, self.cancelled = transport, request, cancelled
        self.replicas, self.patience = transport._replicas, transport._replicas.patience
        self.since: float | None = None  # it fails
        self.last: Replica | None = None
        self.stay = False  # with the last replica
        self.tries = self.broken = self.late = 0

    def answer(self) -> T:
        while True:
            replica = self.replicas.take(self.last, self.stay, self.since, self.cancelled)
            if self.last is not None and self.last is not replica:
                self.transport._let_go(self.last.url, self.request)
            began = self.transport.clock.now()
            try:
                answer = self.transport._try(replica, self.request, 0 if self.transport.keeps_answers else self.late)
            except Failed as failure:
                if failure.late and self.transport._alive(replica):
                    replica.reason = failure.reason
                    self._reattach(replica)
                else:
                    self._failed(replica, failure, began)
            except BaseException:
                self.replicas.release(replica)
                raise
            else:
                self.replicas.release(replica, worked=True)
                self.transport._let_go(replica.url, self.request)
                self.transport._count(requests=1)
                with self.replicas.changed:
                    self.transport._budget.answered()
                return answer

    def _reattach(self, replica: Replica) -> None:
        """The replica is slow: neither a failure of its nor a reason to have another compute the same."""
        self.replicas.release(replica)
        self.transport._count(reattached=1)
        self.last, self.stay, self.late = replica, True, self.late + 1
        self.since = self.transport.clock.now() if self.since is None else self.since
        try:
            self.replicas.pause(0.0, self.since, self.cancelled)
        except BaseException:
            self.transport._let_go(replica.url, self.request)
            raise

    def _failed(self, replica: Replica, failure: Failed, began: float) -> None:
        self.replicas.failed(replica, failure, began)
        self.transport._count(retries=1)
        # Where the answer may be ready by now, it is fetched from where it was computed: once.
        self.stay, self.last = failure.may_be_done and self.last is not replica, replica
        self.since = self.transport.clock.now() if self.since is None else self.since
        self.broken += failure.broken
        if self.broken >= self.patience.broken_tries:
            raise UserError(
                f"{self.transport.section} {replica.url} fails at {self.request.path}, {self.broken} times now "
                f"({failure.reason}). Fix: the service's log says why; then {again(self.transport.section)}."
            )
        wait = failure.delay(self.patience.backoff(self.tries))
        if not failure.busy:
            with self.replicas.changed:
                wait = max(wait, self.transport._budget.spend())
        self.tries += 1
        try:
            self.replicas.pause(wait, self.since, self.cancelled)
        except BaseException:
            if failure.may_be_done:
                self.transport._let_go(replica.url, self.request)
            raise


class _Batch:
    """What the threads of one ``send_all`` share, under the lock of the replicas."""

    def __init__(self, requests: Sequence[Request[Any]]) -> None:
        self.requests, self.indices = requests, iter(range(len(requests)))
        self.answers: list[Any] = [None] * len(requests)
        self.missing, self.cancelled = len(requests), False
        self.error: BaseException | None = None
