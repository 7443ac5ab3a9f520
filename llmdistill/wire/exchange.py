"""One HTTP exchange with one replica: a bounded answer comes back, or a word for what went wrong.

An answer is read as it comes and given up when it is larger than the request can need; it is never decompressed,
since a few hundred kilobytes may become gigabytes. The token is shown to the hosts of the recipe's urls, and redirects
are not followed.
"""

from __future__ import annotations

import json
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, Protocol

import httpx

from llmdistill.errors import UserError
from llmdistill.wire.addresses import is_loopback
from llmdistill.wire.patience import Failed
from llmdistill.wire.tokens import token_for

JSON_BYTES = 1 << 20  # of an answer that is only read for its fields
_ERROR_BYTES = 1 << 16  # of one that says what is wrong
_warned: set[str] = set()


class Refused(UserError):
    """The service understood the request and will not serve it: a 4xx that trying again would not change."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Exchange:
    """A connection pool to some urls. Threads may share it.

    Args:
        urls: of the replicas.
        token: as :mod:`llmdistill.wire.tokens` has it.
        connections: that are kept open.

    Raises:
        UserError: a token that is for other hosts only.
    """

    def __init__(
        self, urls: Sequence[str], token: str | None, section: str, *, timeout: httpx.Timeout, connections: int
    ) -> None:
        self.section = section
        self._tokens = {url: token_for(token, url, section) for url in urls}
        self._names: dict[str, httpx.URL] = {}  # of urls with an address in place of their name
        _warn_of_plain_token([url for url, secret in self._tokens.items() if secret], section)
        # of one client among those whom the service is shared out to
        headers = {"Accept-Encoding": "identity", "X-Client-Id": uuid.uuid4().hex}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=connections)

        def client(*direct: str) -> httpx.Client:
            mounts: Any = dict.fromkeys(direct)  # None: never through a proxy that the environment names
            return httpx.Client(headers=headers, timeout=timeout, limits=limits, follow_redirects=False, mounts=mounts)

        self._client = client(*(f"all://{httpx.URL(url).netloc.decode()}" for url in urls if is_loopback(url)))
        self._direct = client("all://", "http://", "https://")  # to addresses, whose names no proxy is there for

    def send(
        self,
        url: str,
        method: str,
        path: str,
        *,
        max_bytes: int = JSON_BYTES,
        headers: Mapping[str, str] | None = None,
        content: bytes | Iterable[bytes] | None = None,
        params: Mapping[str, str] | None = None,
        timeout: Any = httpx.USE_CLIENT_DEFAULT,
        read: Callable[[httpx.Response, Iterator[bytes]], None] | None = None,
    ) -> httpx.Response:
        """A 2xx of at most ``max_bytes``.

        Args:
            read: takes the body of a 2xx in parts, as they come; the answer that is returned has none then. What it
                raises is raised here.

        Raises:
            Failed: another try may do better.
            Refused: it would not.
        """
        shown = {"Authorization": f"Bearer {token}"} if (token := self._tokens[url]) else {}
        client, extensions = self._client, dict[str, Any]()
        if (named := self._names.get(url)) is not None:
            shown["Host"] = named.netloc.decode()
            client, extensions = self._direct, {"sni_hostname": named.host}  # which the certificate is for
        try:
            with client.stream(
                method,
                url + path,
                headers={**(headers or {}), **shown},
                content=content,
                params=params,
                timeout=timeout,
                extensions=extensions,
            ) as answer:
                parts = _parts(answer, path, max_bytes if answer.is_success else _ERROR_BYTES)
                body = b""
                if read is None or not answer.is_success:
                    body = b"".join(parts)
                else:
                    read(answer, parts)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Failed(f"cannot connect: {error or type(error).__name__}") from error
        except httpx.ReadTimeout as error:
            allowed = error.request.extensions["timeout"]["read"]
            raise Failed(f"no answer to {path} within {allowed:g} s", may_be_done=True, late=True) from error
        except httpx.RequestError as error:
            raise Failed(f"connection lost: {error or type(error).__name__}", may_be_done=True) from error
        response = httpx.Response(answer.status_code, headers=_plain(answer.headers), content=body)
        if response.is_success:
            return response
        status, told, wait = response.status_code, _told(response), _retry_after(response.headers)
        # 409 with a time: the replica has not got the weights yet that another one has
        if status >= 500 or status in (408, 425, 429) or (status == 409 and wait is not None):
            raise Failed(f"HTTP {status}: {told}", busy=status in (409, 429), broken=status == 500, retry_after=wait)
        if status == 401:
            name = f"{self.section}.token_env names (by itself LLMDISTILL_TOKEN)"
            told += f". Fix: set the variable that {name} to the service's token"
        if response.is_redirect:
            told += f" to {response.headers.get('location', '?')[:200]}, which is not followed. Fix: name that url"
        raise Refused(f"{self.section} {url} refuses {path} with HTTP {status}: {told}", status)

    def name_of(self, url: str) -> str:
        """The url of the start that ``url`` is an address of."""
        return str(self._names.get(url, url)).rstrip("/")

    def knows(self, url: str, name: str) -> None:
        """``url`` has one of the addresses of ``name``, one of the urls of the start, and is spoken to as that."""
        if url != name:
            self._names[url], self._tokens[url] = httpx.URL(name), self._tokens[name]

    def close(self) -> None:
        self._client.close()
        self._direct.close()


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


class Get(Protocol):
    """A GET of a path of one replica; with a body, a POST."""

    def __call__(self, path: str, body: bytes | None = None, /) -> httpx.Response: ...


def _parts(answer: httpx.Response, path: str, most: int) -> Iterator[bytes]:
    """The body as it comes over the wire.

    Raises:
        Failed: it is compressed, or larger than ``most``.
    """
    if (coding := answer.headers.get("content-encoding", "identity").strip().lower()) not in ("", "identity"):
        raise Failed(f"{path} answered compressed ({coding[:20]}), which was not asked for", may_be_done=True)
    size = 0
    for part in answer.iter_raw():
        size += len(part)
        if size > most:
            if not answer.is_success:  # enough of it to say what is wrong
                yield part[: len(part) - (size - most)]
                return
            raise Failed(f"answer to {path} is larger than {most} bytes, all that was asked for", may_be_done=True)
        yield part


def _plain(headers: httpx.Headers) -> dict[str, str]:
    left_out = ("content-encoding", "transfer-encoding", "content-length")
    return {name: value for name, value in headers.items() if name.lower() not in left_out}


def _warn_of_plain_token(urls: Sequence[str], section: str) -> None:
    for url in urls:
        if httpx.URL(url).scheme == "http" and not is_loopback(url) and url not in _warned:
            _warned.add(url)
            warnings.warn(
                f"{section}'s token is sent to {url} unencrypted; use https, or an ssh tunnel to a loopback port",
                stacklevel=5,
            )


def _told(response: httpx.Response) -> str:
    """What an error answer says, in one line: our service, vLLM or a proxy's page."""
    try:
        error = json_object(response).get("error")
    except (ValueError, RecursionError):
        error = None
    if not isinstance(error, dict):
        return " ".join(response.text.split())[:200] or response.reason_phrase
    extra = [f"{name}: {error[name]}" for name in ("field", "limit") if error.get(name) is not None]
    return str(error.get("message"))[:500] + (f" ({', '.join(extra)})" if extra else "")


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
