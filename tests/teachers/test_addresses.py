"""A name with several addresses is a fleet: every machine gets requests, and machines come and go."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from llmdistill.wire import addresses, replicas
from llmdistill.wire.addresses import located
from llmdistill.wire.transport import Gone, Transport
from tests.service.faulty import Faulty
from tests.teachers.test_storms import QUICK, Echo, asking

Names = dict[str, list[str]]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """What a name server says; there is none here."""
    known: Names = {}

    def look_up(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        if host not in known:
            raise socket.gaierror(f"{host}: unknown")
        return [
            (socket.AF_INET6 if ":" in a else socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in known[host]
        ]

    monkeypatch.setattr(addresses, "getaddrinfo", look_up)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return known


def test_where_a_url_leads(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    names["fleet"] = ["10.0.0.2", "10.0.0.1", "10.0.0.2", "fd00::1"]
    names["one"] = ["10.0.0.9", "fd00::9"]
    names["six"] = ["fd00::2", "fd00::1"]
    assert located("http://fleet:8100") == ["http://10.0.0.1:8100", "http://10.0.0.2:8100"]
    assert located("https://fleet/teacher") == ["https://10.0.0.1/teacher", "https://10.0.0.2/teacher"]
    assert located("http://six:1") == ["http://[fd00::1]:1", "http://[fd00::2]:1"]
    # one machine, whatever its address families; addresses; this machine
    for same in ("http://one:8100", "http://10.0.0.7:8100", "http://localhost:8100", "http://[::1]:8100"):
        assert located(same) == [same]
    with pytest.raises(OSError):
        located("http://nowhere:8100")
    monkeypatch.setenv("http_proxy", "http://10.1.1.1:3128")  # which looks names up itself
    assert located("http://fleet:8100") == ["http://fleet:8100"]
    monkeypatch.setenv("no_proxy", "fleet")
    assert len(located("http://fleet:8100")) == 2


class Two:
    """Two services on one port of two loopback addresses."""

    def __init__(self) -> None:
        self.one, self.two = Faulty(small=Echo()), Faulty(small=Echo(), host="127.0.0.2")
        self.two.port = self.one.port

    def __enter__(self) -> Two:
        self.one.start()
        self.two.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.one.__exit__(*error)
        self.two.__exit__(*error)


def test_every_address_of_a_name_gets_requests_under_that_name(names: Names) -> None:
    with Two() as fleet:
        names["fleet"] = ["127.0.0.1", "127.0.0.2"]
        transport = Transport(f"http://fleet:{fleet.one.port}", token="s3cret@fleet", **QUICK, in_flight=1)
        transport.wait_ready()
        assert transport.send_all([asking(i) for i in range(8)]) == list(range(8))
        for service in (fleet.one, fleet.two):
            posts = service.posts("/echo")
            assert len(posts) == 4
            assert {p.headers["host"] for p in posts} == {f"fleet:{fleet.one.port}"}
            assert {p.headers["authorization"] for p in posts} == {"Bearer s3cret"}
        transport.close()


def test_machines_come_and_go(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "LOOK_AGAIN_S", 0.02)
    with Two() as fleet:
        one, two, three = (f"http://127.0.0.{i}:{fleet.one.port}" for i in (1, 2, 3))  # where there is nothing
        names["fleet"] = ["127.0.0.2", "127.0.0.3"]
        transport = Transport(f"http://fleet:{fleet.one.port}", **QUICK, in_flight=1)
        names["fleet"] = ["127.0.0.1", "127.0.0.2"]
        _until(transport, lambda: sorted(transport.admitted()) == [one, two])
        assert sorted(transport.replicas()) == [one, two]
        assert [transport.send(asking(i)) for i in range(4)] == [0, 1, 2, 3]
        assert len(fleet.one.posts("/echo")) == len(fleet.two.posts("/echo")) == 2
        only = transport.only(two)
        assert only.send(asking(5)) == 5 and len(fleet.two.posts("/echo")) == 3
        del names["fleet"]  # the name server has a bad moment: who is there stays
        names["fleet"] = ["127.0.0.1", "127.0.0.3"]
        fleet.two.stop()
        _until(transport, lambda: sorted(transport.replicas()) == [one, three])
        assert transport.send(asking(6)) == 6
        with pytest.raises(Gone, match="is no replica any more"):
            only.send(asking(7))
        only.close()
        transport.close()


def _until(transport: Transport, ready: Callable[[], bool]) -> None:
    changed = transport._replicas.changed
    with changed:
        assert changed.wait_for(ready, 30)
