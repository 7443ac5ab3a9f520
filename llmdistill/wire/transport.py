"""One idempotent request to a service, answered whatever happens on the way.

Retried: refused and broken connections, time-outs, half answers, 5xx, 429, answers that cannot be read. All tries of a
request carry one ``X-Request-Id``, so a service that kept the answer does not compute it again. Which replica gets a
try, and what happens while none works, is in :mod:`llmdistill.wire.replicas`. Other 4xx are mistakes that a retry
would repeat: they stop the run.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Generic, TypeVar

import httpx

from llmdistill.errors import UserError
from llmdistill.wire.protocol import READY
from llmdistill.wire.replicas import UNREADABLE, Cancelled, Failed, Patience, Replica, Replicas, Status

T = TypeVar("T")
Get = Callable[[str], httpx.Response]

_PROBE_TIMEOUT_S = 10.0  # readiness and identity are answered from memory
_logger = logging.getLogger(__name__)
_warned: set[str] = set()


class Refused(UserError):
    """The service understood the request and will not serve it: a 4xx that trying again would not change."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Request(Generic[T]):
    """A request that may be sent any number of times.

    Args:
        parse: reads the answer; a ValueError, LookupError or TypeError means that it came damaged and is fetched again,
            a UserError stops.
        body: bytes, or a function that gives them anew for every try; then ``length`` says how many there are.
        answer_type: media type of an answer; another one counts as damage.
    """

    path: str
    parse: Callable[[httpx.Response], T]
    method: str = "POST"
    body: bytes | Callable[[], Iterable[bytes]] = b""
    length: int | None = None
    body_type: str = "application/json"
    answer_type: str = "application/json"
    params: Mapping[str, str] = field(default_factory=dict)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass
class Counters:
    """What a transport has done so far."""

    requests: int = 0  # that were answered
    retries: int = 0  # tries that came to nothing
    bytes_sent: int = 0  # bodies of tries that were answered
    bytes_received: int = 0  # bodies, as they came over the wire
    seconds_waited: float = 0.0  # of all requests together: between tries, or without a replica


class Transport:
    """Sends requests to one or several replicas of a service. Threads may share it.

    Args:
        urls: of the replicas: a list, or one string with commas. A trailing ``/v1`` is understood.
        token: sent as ``Authorization: Bearer``.
        section: of the recipe, for messages.
        admit: called with a function that GETs a path from one replica, before the replica gets its first request and
            again before it comes back; returning admits it, a UserError stops the run. None: ``/ready`` has to be 200.
        timeout_s: longest silence of the service within one try.
        in_flight: requests under way at one time, over all replicas.
        patience: the fields of :class:`~llmdistill.wire.replicas.Patience`.

    Raises:
        UserError: not an http(s) url.
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
        on_status: Status = _logger.warning,
        **patience: Any,
    ) -> None:
        self.urls, self.section = split_urls(urls, section), section
        self.in_flight = in_flight
        self._admit, self._counters = admit, Counters()
        if token:
            _warn_of_plain_token(self.urls, section)
        local = {f"all://{httpx.URL(url).netloc.decode()}": None for url in self.urls if _is_loopback(url)}
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(timeout_s, connect=connect_timeout_s, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=in_flight + len(self.urls)),
            mounts=local,  # type: ignore[arg-type]  # None: never through a proxy that the environment names
        )
        self._slots = threading.BoundedSemaphore(in_flight)
        self._replicas = Replicas(self.urls, section, self._ask, Patience(**patience), on_status)

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

    def admitted(self) -> list[str]:
        """Urls of the replicas that get requests now."""
        return [r.url for r in self._replicas.up()]

    def send(self, request: Request[T], cancelled: Cancelled | None = None) -> T:
        """The parsed answer.

        Raises:
            Refused: the service will not serve it.
            UserError: no answer within ``max_outage_s`` of the first failure, or what ``parse`` raised.
        """
        replicas, since, last, stay, tries = self._replicas, None, None, False, 0
        with self._slots:
            while True:
                replica = replicas.take(last, stay, since, cancelled)
                began = time.monotonic()
                try:
                    answer = self._try(replica, request)
                except Failed as failure:
                    replicas.failed(replica, failure, began)
                    self._count(retries=1)
                    # Where the answer may be ready by now, it is fetched from where it was computed: once.
                    stay, last = failure.may_be_done and last is not replica, replica
                    since = time.monotonic() if since is None else since
                    replicas.pause(failure.delay(replicas.patience.backoff(tries)), since, cancelled)
                    tries += 1
                except BaseException:
                    replicas.release(replica)
                    raise
                else:
                    replicas.release(replica, worked=True)
                    self._count(requests=1)
                    return answer

    def send_all(self, requests: Sequence[Request[T]]) -> list[T]:
        """The answers in the order of the requests; up to ``in_flight`` are under way, the first ones first.

        Raises:
            UserError: of the first request that cannot be answered; the others are given up.
        """
        if len(requests) <= 1:
            return [self.send(r) for r in requests]
        batch = _Batch(requests)
        # Daemons, not a pool: Ctrl-C has to end the process without waiting for answers that are on their way.
        for _ in range(min(self.in_flight, len(requests))):
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
        self._client.close()

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

    def _ask(self, replica: Replica) -> None:
        def get(path: str) -> httpx.Response:
            return self._exchange(replica, "GET", path, timeout=_PROBE_TIMEOUT_S)

        if self._admit is None:
            get(READY)
        else:
            self._admit(get)

    def _try(self, replica: Replica, request: Request[T]) -> T:
        size = len(request.body) if isinstance(request.body, bytes) else request.length
        response = self._exchange(
            replica,
            request.method,
            request.path,
            content=request.body if isinstance(request.body, bytes) else request.body(),
            params=request.params,
            headers={"X-Request-Id": request.id, "Content-Type": request.body_type, "Content-Length": str(size)},
        )
        self._count(bytes_sent=size or 0, bytes_received=response.num_bytes_downloaded)
        kind = response.headers.get("content-type", "").split(";")[0].strip()
        if kind != request.answer_type:
            raise Failed(f"{request.path} answered {kind or 'no content type'} instead of {request.answer_type}", True)
        try:
            return request.parse(response)
        except UserError:
            raise
        except UNREADABLE as error:
            raise Failed(f"answer to {request.path} is damaged: {error or type(error).__name__}", True) from error

    def _exchange(self, replica: Replica, method: str, path: str, **options: Any) -> httpx.Response:
        """One try; a 2xx comes back."""
        try:
            response = self._client.request(method, replica.url + path, **options)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Failed(f"cannot connect: {error or type(error).__name__}") from error
        except httpx.ReadTimeout as error:
            allowed = error.request.extensions["timeout"]["read"]
            raise Failed(f"no answer to {path} within {allowed:g} s", True) from error
        except httpx.RequestError as error:
            raise Failed(f"connection lost: {error or type(error).__name__}", True) from error
        if response.is_success:
            return response
        status, told = response.status_code, _told(response)
        if status >= 500 or status in (408, 425, 429):
            wait = _retry_after(response.headers)
            raise Failed(f"HTTP {status}: {told}", busy=status == 429, retry_after=wait)
        if status == 401:
            told += f". Fix: set the variable that {self.section}.token_env names to the service's token"
        raise Refused(f"{self.section} {replica.url} refuses {path} with HTTP {status}: {told}", status)

    def _count(self, **more: int) -> None:
        with self._replicas.changed:
            for name, value in more.items():
                setattr(self._counters, name, getattr(self._counters, name) + value)


class _Batch:
    """What the threads of one ``send_all`` share, under the lock of the replicas."""

    def __init__(self, requests: Sequence[Request[Any]]) -> None:
        self.requests, self.indices = requests, iter(range(len(requests)))
        self.answers: list[Any] = [None] * len(requests)
        self.missing, self.cancelled = len(requests), False
        self.error: BaseException | None = None


def split_urls(urls: str | Sequence[str], section: str = "teacher") -> tuple[str, ...]:
    """Base urls of the replicas, without duplicates.

    Raises:
        UserError: none, or one that is not http or https.
    """
    parts = urls.split(",") if isinstance(urls, str) else list(urls)
    bases = [p.strip().rstrip("/").removesuffix("/v1") for p in parts if p.strip()]
    for base in bases or [""]:
        try:
            ok = httpx.URL(base).scheme in ("http", "https") and bool(httpx.URL(base).host)
        except httpx.InvalidURL:
            ok = False
        if not ok:
            raise UserError(
                f"{section}.url is {urls!r}; it must be http://HOST:PORT of the service, or several with commas. "
                f"Fix: --{section}.url http://HOST:PORT."
            )
    return tuple(dict.fromkeys(bases))


def json_object(response: httpx.Response) -> dict[str, Any]:
    """The JSON object of an answer.

    Raises:
        ValueError: it is something else.
    """
    body = json.loads(response.content)
    if not isinstance(body, dict):
        raise ValueError(f"a JSON object is needed, not {type(body).__name__}")
    return body


def _is_loopback(url: str) -> bool:
    host = httpx.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _warn_of_plain_token(urls: Sequence[str], section: str) -> None:
    for url in urls:
        if httpx.URL(url).scheme == "http" and not _is_loopback(url) and url not in _warned:
            _warned.add(url)
            warnings.warn(
                f"{section}'s token is sent to {url} unencrypted; use https, or an ssh tunnel to a loopback port",
                stacklevel=4,
            )


def _told(response: httpx.Response) -> str:
    """What an error answer says, in one line: our service, vLLM or a proxy's page."""
    try:
        error = json_object(response).get("error")
    except ValueError:
        error = None
    if not isinstance(error, dict):
        return " ".join(response.text.split())[:200] or response.reason_phrase
    extra = [f"{name}: {error[name]}" for name in ("field", "limit") if error.get(name) is not None]
    return str(error.get("message")) + (f" ({', '.join(extra)})" if extra else "")


def _retry_after(headers: httpx.Headers) -> float | None:
    """Seconds of a Retry-After header: a number or a date; of ours in milliseconds where there is one."""
    exact, value = headers.get("retry-after-ms", ""), headers.get("retry-after")
    if exact.isdecimal() and len(exact) < 9:
        return int(exact) / 1000
    if value is None:
        return None
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return None
