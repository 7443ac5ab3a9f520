"""Services that are slow, broken, hostile or gone: how often they are asked, and how much of an answer is read.

Time is injected where the client waits by itself; nothing here hopes that a machine is quick.
"""

import contextlib
import socket
import threading
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from llmdistill.errors import UserError
from llmdistill.wire import protocol
from llmdistill.wire.patience import Budget, Clock, Failed, Patience
from llmdistill.wire.tokens import secrets_of, token_for
from llmdistill.wire.transport import Refused, Request, Transport, json_object
from tests.service.faulty import Faulty
from tests.service.small import Answer

QUICK = {"timeout_s": 5.0, "backoff_s": 0.01, "max_backoff_s": 0.05, "cool_down_s": 0.02, "max_outage_s": 60.0}


class Hurried(Clock):
    """Waiting takes no time, and the clock says that it did."""

    def __init__(self):
        self.time, self._lock = 0.0, threading.Lock()

    def now(self):
        return self.time

    def wait(self, changed, seconds):
        with self._lock:
            self.time += seconds
        changed.wait(0.0005)  # lets go of the lock


class Echo:
    def answer(self, seen):
        return Answer(200, seen.body or b"{}")


def asking(number=0, **more):
    return Request("/echo", lambda r: json_object(r)["number"], body=b'{"number": %d}' % number, **more)


class Held(Echo):
    """Answers when every one of ``count`` requests has been asked for ``tries`` times."""

    def __init__(self, count, tries):
        self.count, self.tries, self.asked, self.enough = count, tries, {}, threading.Event()

    def plan(self, seen):
        self.asked[seen.id] = self.asked.get(seen.id, 0) + 1
        if len(self.asked) == self.count and min(self.asked.values()) >= self.tries:
            self.enough.set()

    def answer(self, seen):
        if seen.method == "POST":
            assert self.enough.wait(60)
        return super().answer(seen)


def held(count, tries):
    small = Held(count, tries)
    service = Faulty(small=small, plan=small.plan)
    service._worker = ThreadPoolExecutor(count + 2)  # /ready is answered while the work goes on
    return service


# -------------------------------------------------------------------- slow


def test_a_slow_replica_is_waited_for_where_it_computes():
    """Four requests, each asked for three times before it is answered: four computations, and no failure."""
    with held(4, 3) as slow, Faulty(small=Echo()) as other:
        lines = []
        transport = Transport([slow.url, other.url], **{**QUICK, "timeout_s": 0.1}, in_flight=4, on_status=lines.append)
        transport.wait_ready()
        other.plan = lambda seen: "503"  # so that all four go to the slow one, or would have to be moved
        other.stop()
        while transport.admitted() != [slow.url]:
            for replica in transport._replicas.up():
                if replica.url == other.url:
                    replica.up = False
        assert transport.send_all([asking(i) for i in range(4)]) == [0, 1, 2, 3]
        counters = transport.counters
        assert set(slow.computed.values()) == {1} and len(slow.computed) == 4
        assert counters.reattached >= 8 and transport.admitted() == [slow.url]
        assert not [seen for seen in other.seen if seen.method == "POST"]
        assert all(replica.failures == 0 for replica in transport._replicas.up())
        transport.close()


def test_a_server_that_keeps_no_answers_is_given_longer_each_time():
    """Hanging up ends its work: asked again with the same patience it would never be done."""
    allowed = []
    with held(1, 4) as slow:
        transport = Transport(slow.url, **{**QUICK, "timeout_s": 0.05}, keeps_answers=False)
        send = transport._exchange.send

        def watched(url, method, path, **options):
            if method == "POST":
                allowed.append(options["timeout"].read)
            return send(url, method, path, **options)

        transport._exchange.send = watched
        assert transport.send(asking(3)) == 3
        assert allowed[:4] == [0.05, 0.1, 0.2, 0.4]
        transport.close()


def test_a_replica_that_is_silent_and_not_ready_has_failed(monkeypatch):
    monkeypatch.setattr("llmdistill.wire.transport._PROBE_TIMEOUT_S", 0.1)
    stopped = threading.Event()

    class Stuck(Echo):
        stuck = False

        def answer(self, seen):
            if self.stuck:
                stopped.wait(60)
            return super().answer(seen)

    with Faulty(small=Stuck()) as stuck, Faulty(small=Echo()) as good:
        transport = Transport([stuck.url, good.url], **{**QUICK, "timeout_s": 0.1}, in_flight=1)
        transport.wait_ready()
        stuck.small.stuck = True
        assert [transport.send(asking(i)) for i in range(8)] == list(range(8))
        assert transport.counters.retries >= 1 and transport.counters.reattached == 0
        stopped.set()
        transport.close()


# -------------------------------------------------------------------- broken


def test_what_fails_the_same_way_three_times_on_two_replicas_stops_the_run():
    with Faulty(small=Echo(), plan=lambda seen: "500") as one, Faulty(small=Echo(), plan=lambda seen: "500") as two:
        transport = Transport([one.url, two.url], **QUICK)
        transport.wait_ready()
        with pytest.raises(
            UserError, match=r"fails at /echo, 3 times now \(HTTP 500: injected 500\). Fix: the service's"
        ):
            transport.send(asking())
        assert sorted([len(one.posts("/echo")), len(two.posts("/echo"))]) == [1, 2]
        transport.close()


def test_retries_of_all_requests_together_have_a_budget():
    """A service that refuses for ten minutes is not asked more than some 32 times at once and once a second."""
    clock = Hurried()
    with Faulty(small=Echo(), plan=lambda seen: "503", retry_after="0") as service:
        patience = {**QUICK, "max_outage_s": 600.0, "eject_after": 10**9, "status_every_s": 1e9}
        transport = Transport(service.url, **patience, in_flight=4, clock=clock)
        replicas = transport._replicas
        with replicas.changed:  # in real time: the clock would be past the outage before the service was probed once
            assert replicas.changed.wait_for(replicas.up, 30)
        with pytest.raises(UserError, match="gave no answer for 600 s"):
            transport.send_all([asking(i) for i in range(4)])
        tries = len(service.posts("/echo"))
        assert 32 < tries <= 4 + 32 + clock.now() * 1.0 + 8
        assert tries < 0.1 * clock.now() / 0.05  # what backing off alone, 0.05 s at most, would have made of it
        transport.close()


def test_a_budget_comes_back_with_answers_and_with_time():
    clock = Hurried()
    budget = Budget(Patience(retries=3, retries_per_request=0.5, retries_per_s=0.1), clock)
    assert [budget.spend() for _ in range(4)] == [0, 0, 0, 10.0]
    for _ in range(4):
        budget.answered()
    assert budget.spend() == 0.0
    clock.time += 1000
    assert [budget.spend() for _ in range(4)] == [0, 0, 0, 10.0]  # no more than it began with


def test_a_restart_of_every_replica_is_ridden_out_without_a_storm():
    """Forty requests while both replicas go away and come back: every answer once, few tries in vain."""
    with Faulty(small=Echo()) as one, Faulty(small=Echo()) as two:
        counted, lock = [0], threading.Lock()

        def plan(seen):
            with lock:
                counted[0] += 1
                if counted[0] == 10:
                    for service in (one, two):
                        threading.Thread(target=again, args=(service,)).start()

        def again(service):
            service.stop()
            service.start()

        one.plan = two.plan = plan
        transport = Transport([one.url, two.url], **QUICK, in_flight=4, on_status=lambda line: None)
        assert transport.send_all([asking(i) for i in range(40)]) == list(range(40))
        assert transport.counters.retries <= 32
        transport.close()


# -------------------------------------------------------------------- hostile


class Flood:
    """A server of one connection at a time that answers a POST with the same part again and again."""

    def __init__(self, head, part, count):
        self.head, self.part, self.count, self.sent, self.asked = head, part, count, 0, b""
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                with connection, contextlib.suppress(OSError):
                    while asked := connection.recv(1 << 16):
                        if asked.startswith(b"GET"):
                            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
                            continue
                        self.asked += asked
                        connection.sendall(self.head)
                        for _ in range(self.count):
                            connection.sendall(self.part)
                            self.sent += len(self.part)


@pytest.mark.parametrize("packed", [True, False])
def test_a_bomb_is_neither_unpacked_nor_read_to_its_end(packed):
    """A gibibyte for a request that needs a few bytes, or 128 MiB as 128 KiB of gzip."""
    kind, part = "Content-Type: application/json", b" " * (1 << 16)
    if packed:
        deflated = zlib.compressobj(9, zlib.DEFLATED, 31)
        part = b"".join(deflated.compress(b" " * (1 << 20)) for _ in range(1 << 7)) + deflated.flush()
    coding, count = ("Content-Encoding: gzip\r\n", 1) if packed else ("", 1 << 14)
    head = f"HTTP/1.1 200 OK\r\n{kind}\r\n{coding}Content-Length: {len(part) * count}\r\n\r\n".encode()
    flood = Flood(head, part, count)
    transport = Transport(flood.url, **QUICK)
    transport.wait_ready()
    (replica,) = transport._replicas.up()
    tracemalloc.start()
    reason = "compressed .gzip., which was not asked for" if packed else "larger than 1048576 bytes"
    with pytest.raises(Failed, match=reason):
        transport._try(replica, asking())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20 and flood.sent < 64 << 20
    assert b"accept-encoding: identity" in flood.asked.lower()
    transport.close()
    flood.socket.close()


def test_a_token_is_shown_to_no_other_host_than_the_url_names():
    with Faulty(small=Echo()) as other:

        class Elsewhere(Echo):
            def answer(self, seen):
                moved = Answer(307, b"", headers={"Location": other.url + seen.path})
                return moved if seen.method == "POST" else super().answer(seen)

        with Faulty(small=Elsewhere()) as service:
            transport = Transport(service.url, token="secret", **QUICK)
            with pytest.raises(Refused, match=f"HTTP 307: .* to {other.url}/echo, which is not followed"):
                transport.send(asking())
            assert service.posts("/echo")[0].headers["authorization"] == "Bearer secret"
            assert not other.seen
            transport.close()


def test_a_token_for_a_host_goes_to_that_host_only():
    both = "aa@one.example, bb@two.example:8100 cc@[::1]"
    assert token_for(both, "https://one.example:9", "teacher") == "aa"
    assert token_for(both, "http://TWO.example:8100", "teacher") == "bb"
    for url in ("http://two.example:1", "http://three.example"):
        with pytest.raises(UserError, match=r"teacher.url names \S+; the token is for one.example, two.example:8100"):
            token_for(both, url, "teacher")
    assert token_for("plain", "http://anywhere", "teacher") == "plain"
    assert token_for("plain aa@one.example", "http://one.example", "teacher") == "aa"
    assert token_for(None, "http://anywhere", "teacher") is None and token_for("", "http://a", "teacher") is None
    assert secrets_of(both) == ["aa", "bb", "cc"] and secrets_of("one,two") == ["one", "two"] and secrets_of(None) == []
    with pytest.raises(UserError, match="rollouts.url names 127.0.0.1:1; the token is for elsewhere only"):
        Transport("http://127.0.0.1:1", token="x@elsewhere", section="rollouts", **QUICK)


# -------------------------------------------------------------------- answers that need not be kept


def test_an_answer_that_has_come_is_acknowledged_with_the_next_request():
    with Faulty(small=Echo()) as service:
        transport = Transport(service.url, **QUICK, in_flight=1)
        transport.send_all([asking(i) for i in range(3)])
        ids = [seen.id for seen in service.posts("/echo")]
        told = [seen.headers.get("x-request-done") for seen in service.posts("/echo")]
        assert told == [None, ids[0], ids[1]]
        transport.close()


def test_work_that_was_moved_to_another_replica_is_called_off_at_the_first():
    with Faulty(small=Echo()) as one, Faulty(small=Echo()) as two:
        transport = Transport([one.url, two.url], **QUICK, in_flight=1)
        transport.wait_ready()
        one.next("half", "half")
        two.next("half", "half")
        transport.send(asking(1))
        moved = (one.posts("/echo") + two.posts("/echo"))[0].id
        for i in range(4):
            transport.send(asking(2 + i))
        told = {
            name: [
                done for seen in service.posts("/echo") for done in seen.headers.get("x-request-done", "").split(",")
            ]
            for name, service in (("one", one), ("two", two))
        }
        assert moved in told["one"] and moved in told["two"]
        transport.close()


def test_a_plain_server_is_told_nothing():
    with Faulty(small=Echo()) as service:
        transport = Transport(service.url, **QUICK, keeps_answers=False)
        for i in range(2):
            transport.send(asking(i))
        assert not any("x-request-done" in seen.headers for seen in service.seen)
        assert protocol.READY in [seen.path for seen in service.seen]
        transport.close()
