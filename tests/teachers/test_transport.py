"""Requests against a service that breaks in every way a network knows: the evidence is what it would have been."""

import os
import signal
import threading
import time
import warnings
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
import torch

from llmdistill.errors import UserError
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.remote import RemoteTeacher
from llmdistill.texts import collate
from llmdistill.wire import protocol
from llmdistill.wire.transport import Refused, Request, Transport, json_object, split_urls
from tests.service.faulty import FAULTS, Faulty, randomly
from tests.service.small import Answer, Seen, error
from tests.tiny import llama, tokenizer

# Waits of milliseconds instead of seconds; a stalled answer is given up after 1 s.
QUICK = {"timeout_s": 1.0, "backoff_s": 0.01, "max_backoff_s": 0.05, "cool_down_s": 0.02, "max_outage_s": 5.0}


@pytest.fixture(scope="module")
def local():
    return LocalTeacher(llama(2), tokenizer())


@pytest.fixture
def service(local):
    with Faulty(local) as made:
        yield made


@pytest.fixture
def ctrl_c():
    """Ctrl-C as a terminal gives it: what a shell starts in the background ignores the signal, and so would a test."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    signal.signal(signal.SIGINT, before)


class Echo:
    """Answers a POST with its body, at once."""

    def __init__(self, status=200, message=""):
        self.status, self.message = status, message

    def answer(self, seen: Seen) -> Answer:
        if seen.method == "POST" and self.status != 200:
            return error(self.status, self.message, "sequences[0]")
        return Answer(200, seen.body or b"{}")


def asking(number=0):
    return Request("/echo", lambda r: json_object(r)["number"], body=b'{"number": %d}' % number)


def rollout(count=6):
    return collate([[5 + i, 60, 61] for i in range(count)], [[70 + i, 80, 90 + i] for i in range(count)], pad_id=0)


def assert_same(blocks, others):
    for block, other in zip(blocks, others, strict=True):
        assert block.positions == other.positions and block.header == other.header
        assert torch.equal(block.token_logprobs, other.token_logprobs)
        assert torch.equal(block.topk_ids, other.topk_ids)
        assert torch.equal(block.topk_logprobs, other.topk_logprobs)


def wait_for(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


# -------------------------------------------------------------------- one request


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_ends_with_the_evidence_of_the_undisturbed_request(service, fault):
    """Twice in a row, and the service has computed it once: later tries find the answer that it kept."""
    teacher = RemoteTeacher(service.url, **QUICK)
    undisturbed = teacher.score(rollout(1), 5)
    service.next(fault, fault)
    assert_same(teacher.score(rollout(1), 5), undisturbed)
    tries = [fault] if fault == "slow" else [fault, fault, None]
    assert [s.fault for s in service.posts()] == [None, *tries]
    assert len({s.id for s in service.posts()[1:]}) == 1 != len({s.id for s in service.posts()[:2]})
    assert set(service.computed.values()) == {1}
    counters = teacher.transport.counters
    assert counters.retries + counters.reattached == len(tries) - 1
    teacher.close()


def test_a_storm_of_faults_changes_nothing_and_computes_nothing_twice(local):
    """24 requests, four at a time, 40 % of the tries disturbed in one of seven ways."""
    kinds = ("500", "503", "reset", "reset_after", "half", "corrupt", "wrong_type")
    with Faulty(local, limits={"sequences": 1}) as calm, Faulty(local, limits={"sequences": 1}) as storm:
        storm.plan = randomly(dict.fromkeys(kinds, 0.4 / 7), seed=3)
        quiet = RemoteTeacher(calm.url, **QUICK)
        teacher = RemoteTeacher(storm.url, **QUICK, in_flight=4)
        assert_same(teacher.score(rollout(24), 8), quiet.score(rollout(24), 8))
        assert sum(s.fault is not None for s in storm.posts()) == teacher.transport.counters.retries > 5
        assert len(storm.computed) == 24 and set(storm.computed.values()) == {1}
        quiet.close()
        teacher.close()


def test_retry_after_is_waited_for(service):
    service.retry_after = "0.4"
    teacher = RemoteTeacher(service.url, **QUICK)
    service.next("429")
    began = time.monotonic()
    teacher.score(rollout(1), 0)
    assert 0.4 <= time.monotonic() - began < 2
    service.retry_after = format_datetime(
        datetime.now(UTC) + timedelta(seconds=2), usegmt=True
    )  # whole seconds: 1 to 2
    service.next("503")
    began = time.monotonic()
    teacher.score(rollout(1), 0)
    assert 0.5 <= time.monotonic() - began < 3.5
    teacher.close()


def test_a_full_queue_is_no_reason_to_leave_a_replica(service):
    lines = []
    teacher = RemoteTeacher(service.url, **{**QUICK, "cool_down_s": 1.0}, on_status=lines.append)
    service.next(*["429"] * 8)
    teacher.score(rollout(1), 0)
    assert teacher.transport.counters.retries == 8 and not lines
    teacher.close()


@pytest.mark.parametrize("status", [400, 404, 409, 413, 422])
def test_a_mistake_is_not_repeated(status):
    with Faulty(small=Echo(status, "is 3; at most 2")) as service:
        transport = Transport(service.url, **QUICK)
        with pytest.raises(Refused, match=rf"teacher {service.url} refuses /echo with HTTP {status}: is 3; at most 2"):
            transport.send(asking())
        assert len(service.posts("/echo")) == 1
        transport.close()


def test_a_wrong_token_stops_at_once_and_says_where_the_token_comes_from(local):
    with Faulty(local, token="right") as service:
        with pytest.raises(
            UserError,
            match="HTTP 401: the token is wrong. Fix: set the variable that teacher.token_env names .*LLMDISTILL_TOKEN",
        ):
            RemoteTeacher(service.url, token="wrong", **QUICK)
        teacher = RemoteTeacher(service.url, token="right", **QUICK)
        assert len(teacher.score(rollout(2), 1)) == 2
        teacher.close()


def test_a_token_over_plain_http_is_warned_about_once():
    patience = {**QUICK, "max_outage_s": 0.0}
    with pytest.warns(UserWarning, match="teacher's token is sent to http://teacher.invalid:1 unencrypted"):
        Transport("http://teacher.invalid:1", token="t", **patience).close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Transport("http://teacher.invalid:1", token="t", **patience).close()
        Transport("http://127.0.0.1:1", token="t", **patience).close()
        Transport("https://teacher.invalid:1", token="t", **patience).close()


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with Faulty(small=Echo()) as service:
        transport = Transport(service.url, **{**QUICK, "max_outage_s": 1.0})
        assert transport.send(asking(3)) == 3
        transport.close()


@pytest.mark.parametrize("url", ["", " , ", "localhost:8000", "ftp://host", "http://", ["http://ok", "http//no"]])
def test_urls_that_are_none_are_refused(url):
    with pytest.raises(UserError, match="teacher.url is .*http://HOST:PORT"):
        split_urls(url)


def test_urls_may_have_a_slash_a_version_and_company():
    assert split_urls("http://a:1/, https://b/v1 ,http://a:1") == ("http://a:1", "https://b")


# -------------------------------------------------------------------- many requests


def test_answers_come_in_the_order_of_the_requests_and_few_are_under_way(service):
    with Faulty(small=Echo(), plan=randomly({"slow": 0.3, "429": 0.2}, seed=0), stall_s=0.5) as service:
        transport = Transport(service.url, **QUICK, in_flight=3)
        assert transport.send_all([asking(i) for i in range(30)]) == list(range(30))
        assert service.most_at_once == 3
        counters = transport.counters
        assert counters.requests == 30 and counters.bytes_received == counters.bytes_sent > 30 * len(b'{"number": 0}')
        assert counters.seconds_waited > 0 and counters.retries > 0
        transport.close()


def test_the_first_mistake_ends_the_call():
    with Faulty(small=Echo(400, "no")) as service:
        transport = Transport(service.url, **QUICK, in_flight=2)
        with pytest.raises(Refused, match="no"):
            transport.send_all([asking(i) for i in range(50)])
        time.sleep(0.1)
        assert len(service.posts("/echo")) <= 4  # what was under way
        transport.close()


def test_ctrl_c_does_not_wait_for_answers(ctrl_c):
    with Faulty(small=Echo(), plan=lambda seen: "stall", stall_s=5.0) as service:
        transport = Transport(service.url, **{**QUICK, "timeout_s": 10.0})
        began = time.monotonic()
        ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            transport.send_all([asking(i) for i in range(4)])
        assert time.monotonic() - began < 1
        transport.close()


def test_ctrl_c_ends_the_wait_for_a_service_that_is_not_there(ctrl_c):
    with Faulty(small=Echo()) as service:
        service.stop()
        transport = Transport(service.url, **QUICK)
        began = time.monotonic()
        ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            transport.send(asking())
        assert time.monotonic() - began < 1
        transport.close()


# -------------------------------------------------------------------- outages


def test_requests_wait_for_a_service_that_comes_back(service):
    """Killed with requests under way: they say so, wait, and go on when there is one on the port again."""
    lines = []

    def told(line):
        lines.append(line)
        if len(lines) == 5:
            service.start()

    teacher = RemoteTeacher(service.url, **QUICK, status_every_s=0.1, on_status=told)
    undisturbed = teacher.score(rollout(12), 5)
    service.stop()
    assert_same(teacher.score(rollout(12), 5), undisturbed)
    start = f"teacher {service.url} unreachable since 0 s (cannot connect: "
    assert lines[0].startswith(start) and lines[0].endswith("); training waits, gives up after 5 s")
    assert lines[-1] == f"teacher {service.url} is back after {lines[-1].split()[-2]} s"
    assert teacher.transport.counters.seconds_waited > 0.4  # five lines, 0.1 s apart
    teacher.close()


def test_a_killed_service_has_to_be_back_in_time(service):
    teacher = RemoteTeacher(service.url, **{**QUICK, "max_outage_s": 0.3}, on_status=lambda line: None)
    service.stop()
    began = time.monotonic()
    with pytest.raises(
        UserError, match=r"teacher \S+ gave no answer for 0.3 s: cannot connect: .*Fix: start the service"
    ):
        teacher.score(rollout(), 5)
    assert 0.3 <= time.monotonic() - began < 1.5
    teacher.close()


@pytest.mark.parametrize("fault", ["503", "429", "corrupt"])
def test_a_service_that_answers_but_never_well_is_given_up_too(service, fault):
    lines = []
    service.plan = lambda seen: fault
    options = {**QUICK, "max_outage_s": 0.5, "status_every_s": 0.2}
    teacher = RemoteTeacher(service.url, **options, on_status=lines.append)
    reason = "answer to /v1/score is damaged: " if fault == "corrupt" else f"HTTP {fault}: injected {fault}"
    with pytest.raises(UserError, match=rf"teacher \S+ gave no answer for 0.5 s: {reason}"):
        teacher.score(rollout(1), 5)
    assert any(reason in line for line in lines)
    teacher.close()


def test_the_reasons_of_all_replicas_are_told():
    with Faulty(small=Echo()) as one, Faulty(small=Echo(), plan=lambda seen: "503") as other:
        one.stop()
        options = {**QUICK, "max_outage_s": 0.5}
        transport = Transport([one.url, other.url], **options, on_status=lambda line: None)
        with pytest.raises(UserError, match=f"{one.url}: cannot connect: .*; {other.url}: HTTP 503: injected 503"):
            transport.send(asking())
        transport.close()


def test_one_event_that_breaks_every_try_is_one_failure():
    """Eight tries broken at one time do not make three failures in a row."""
    with Faulty(small=Echo()) as service:
        gate = threading.Barrier(8, timeout=5)
        service._worker._max_workers = 8
        once = threading.Event()

        def together(seen):
            if not once.is_set():
                gate.wait()
                once.set()
            return Answer(200, seen.body or b"{}")

        lines = []
        transport = Transport(service.url, **QUICK, in_flight=8, on_status=lines.append)
        transport.wait_ready()
        service.small.answer = together
        service.next(*["reset_after"] * 8)
        assert transport.send_all([asking(i) for i in range(8)]) == list(range(8))
        assert transport.counters.retries == 8 and not lines
        transport.close()


# -------------------------------------------------------------------- replicas


def test_a_replica_that_fails_is_left_and_taken_back():
    with Faulty(small=Echo()) as good, Faulty(small=Echo()) as bad:
        lines = []
        transport = Transport(f"{good.url},{bad.url}", **QUICK, in_flight=2, on_status=lines.append)
        transport.wait_ready()
        assert transport.admitted() == [good.url, bad.url]
        bad.stop()
        assert transport.send_all([asking(i) for i in range(30)]) == list(range(30))
        assert transport.admitted() == [good.url]
        assert len(good.posts("/echo")) == 30 and not lines  # nobody had to wait
        bad.start()
        wait_for(lambda: transport.admitted() == [good.url, bad.url])
        for i in range(20):
            transport.send(asking(i))
        assert len(bad.posts("/echo")) == 10  # an equal share: not the thirty that it has missed
        transport.close()


def test_a_replica_that_is_back_gets_one_failure_more_not_three():
    with Faulty(small=Echo()) as good, Faulty(small=Echo(), plan=lambda seen: "500") as bad:
        transport = Transport([good.url, bad.url], **{**QUICK, "max_backoff_s": 0.02}, in_flight=1)
        transport.wait_ready()
        for i in range(6):
            assert transport.send(asking(i)) == i
        assert len(bad.posts("/echo")) == 3
        wait_for(lambda: len(transport.admitted()) == 2)
        for i in range(2):
            transport.send(asking(i))
        assert len(bad.posts("/echo")) == 4 and transport.admitted() == [good.url]
        transport.close()


def test_the_less_busy_replica_gets_the_request():
    with Faulty(small=Echo()) as fast, Faulty(small=Echo(), plan=lambda seen: "slow", stall_s=2.0) as slow:
        transport = Transport([fast.url, slow.url], **QUICK, in_flight=2)
        transport.wait_ready()
        transport.send_all([asking(i) for i in range(40)])
        assert len(slow.posts("/echo")) <= 4 and len(fast.posts("/echo")) >= 36
        transport.close()


def test_an_answer_that_got_lost_is_fetched_where_it_was_computed():
    with Faulty(small=Echo()) as one, Faulty(small=Echo()) as other:
        transport = Transport([one.url, other.url], **QUICK)
        transport.wait_ready()
        one.next("half")
        other.next("half")
        assert transport.send(asking(1)) == 1
        asked = one.posts("/echo") + other.posts("/echo")
        assert len(asked) == 2 and len({s.id for s in asked}) == 1
        assert sorted([len(one.posts("/echo")), len(other.posts("/echo"))]) == [0, 2]
        one._queue.clear(), other._queue.clear()
        one.next("503")
        other.next("503")
        transport.send(asking(2))  # refused by one, then by the other, then not
        assert {len(one.posts("/echo")), len(other.posts("/echo"))} & {1, 2, 3} and transport.counters.retries == 3
        transport.close()


def test_a_replica_need_not_be_there_at_the_start():
    with Faulty(small=Echo()) as there, Faulty(small=Echo()) as late:
        late.stop()
        transport = Transport([late.url, there.url], **QUICK)
        transport.wait_ready()
        assert transport.admitted() == [there.url]
        late.start()
        wait_for(lambda: len(transport.admitted()) == 2)
        transport.close()


def test_readiness_is_what_the_service_says(local):
    """A service that is still loading, or draining, gets nothing."""
    with Faulty(local, ready=False) as service:
        lines = []

        def told(line):
            lines.append(line)
            service.small.ready = len(lines) == 3

        transport = Transport(service.url, **QUICK, status_every_s=0.1, on_status=told)
        info = transport.send(Request(protocol.INFO, json_object, method="GET"))
        assert info["protocol"] == protocol.PROTOCOL_VERSION and "HTTP 503: starting" in lines[0]
        assert [s.path for s in service.seen].index(protocol.INFO) > 2
        transport.close()
