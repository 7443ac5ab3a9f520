"""Weights to two vLLM replicas by one broadcast, of which one is killed and started again."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from llmdistill.rollouts.remote import RemoteRollouts
from llmdistill.teachers.fingerprint import weights_fingerprint
from llmdistill.texts import Sampling
from llmdistill.wire import protocol
from tests import tiny
from tests.rollouts.test_remote import assert_samples_from
from tests.service.process import ServiceProcess

GREEDY = Sampling(8, temperature=0)
OPTIONS = ["--dtype", "float32", "--max_model_len", "128", "--kv_cache_gib", "0.05"]
OPTIONS += ["--updatable", "--transfer", "gloo"]


@pytest.mark.proof
def test_two_replicas_are_sent_to_at_one_time_and_one_comes_back(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="the vllm extra is not installed")
    model = tiny.saved(tmp_path)
    one, two = (ServiceProcess(model, *OPTIONS) for _ in range(2))
    try:
        for service in (one, two):
            service.start(wait=False)
        for service in (one, two):
            service.wait()
        where = {"timeout_s": 120.0, "max_outage_s": 200.0}
        engine = RemoteRollouts([one.url, two.url], eos_ids=(1,), pad_id=0, transfer="gloo", **where)

        def push(step: int) -> None:
            student, began = tiny.llama(2 + step, hidden=64, tied=True), time.monotonic()
            engine.sync(student, step)
            assert engine._transfers is not None and engine._transfers._sender is not None  # not over HTTP
            print(f"step {step}: {time.monotonic() - began:.2f} s")
            for service in (one, two):
                info = httpx.get(service.url + protocol.INFO)
                assert info.json()["teacher"] == weights_fingerprint(student)
                assert info.headers["x-policy-version"] == str(step)
            assert_samples_from(engine, student, GREEDY)

        for step in range(3):
            push(step)
        two.kill()
        threading.Timer(1.0, two.start).start()
        push(3)
        push(4)
        engine.close()
    finally:
        one.kill()
        two.kill()


@pytest.mark.proof
def test_a_student_in_shards_is_sent_by_all_its_ranks(tmp_path: Path) -> None:
    """FSDP2 over two processes: each tensor is gathered by both and sent by one."""
    pytest.importorskip("vllm", reason="the vllm extra is not installed")
    model = tiny.saved(tmp_path)
    ranks = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29741"]
    with ServiceProcess(model, *OPTIONS) as service:
        command = [*ranks, "-m", "tests.service.sharded_sender", service.url]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    print(ended.stdout)
    assert ended.returncode == 0 and ended.stdout.count("both pushes came") == 2, ended.stderr[-3000:]
