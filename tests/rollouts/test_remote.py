"""Rollouts from a service that gets the student's weights, against transformers with the student itself."""

import copy
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors.torch
import torch

from llmdistill.errors import UserError
from llmdistill.models.generation import HFRollouts
from llmdistill.rollouts.asking import pack
from llmdistill.rollouts.remote import RemoteRollouts
from llmdistill.teachers.fingerprint import weights_fingerprint
from llmdistill.teachers.local import LocalTeacher
from llmdistill.texts import Prompt, Sampling
from llmdistill.wire import protocol
from llmdistill.wire.tensors import safetensors_stream
from tests.service.faulty import FAULTS, Faulty
from tests.test_weights import lora
from tests.tiny import llama, tokenizer

PROMPTS = [Prompt(list(range(5, 5 + n)), str(n), domain=f"d{n}") for n in (3, 20, 12, 7)]
QUICK = {"timeout_s": 2.0, "backoff_s": 0.01, "max_backoff_s": 0.05, "cool_down_s": 0.02, "max_outage_s": 5.0}


def service_over(seed=9, **options):
    """A service that starts with weights of its own; pushed ones change its model, so each has one."""
    return Faulty(LocalTeacher(llama(seed), tokenizer()), **options)


@pytest.fixture
def service():
    with service_over() as made:
        yield made


def engine_for(service, **options):
    return RemoteRollouts(service.url, eos_ids=(1,), pad_id=0, **{**QUICK, **options})


def assert_samples_from(engine, model, sampling):
    exact = HFRollouts(eos_ids=(1,), pad_id=0)
    exact.sync(model, 0)
    mine, theirs = exact.generate(PROMPTS, sampling), engine.generate(PROMPTS, sampling)
    assert torch.equal(mine.input_ids, theirs.input_ids) and torch.equal(mine.completion_mask, theirs.completion_mask)
    assert mine.finish == theirs.finish and mine.domain == theirs.domain
    torch.testing.assert_close(mine.behavior_logprobs, theirs.behavior_logprobs, rtol=0, atol=2e-5)
    return theirs


SAMPLED = Sampling(6, samples_per_prompt=2, seed=4)


def pushes(service):
    return service.posts(protocol.WEIGHTS)


@pytest.mark.parametrize("tied", [True, False])
def test_after_a_push_the_service_samples_what_the_student_would(tied):
    teacher = LocalTeacher(llama(9, tied=tied), tokenizer())
    with Faulty(teacher) as service:
        engine = engine_for(service)
        for version in (3, 4):
            model = llama(version, tied=tied)
            engine.sync(model, version)
            assert assert_samples_from(engine, model, SAMPLED).policy_version == version
            assert teacher.info().fingerprint == weights_fingerprint(model)
        assert_samples_from(engine, model, Sampling(6, temperature=0.0))
        size = sum(p.nbytes for p in model.parameters())  # a tied matrix goes over the wire once
        assert all(size < len(s.body) < 1.05 * size for s in pushes(service))
        engine.close()


def test_weights_go_out_every_so_many_steps(service):
    engine = engine_for(service, push_every=3)
    versions = []
    for step in range(8):
        engine.sync(llama(step), step)
        versions.append(engine.generate(PROMPTS[:1], Sampling(1)).policy_version)
    assert versions == [0, 0, 0, 3, 3, 3, 6, 6]
    assert [s.query["policy_version"] for s in pushes(service)] == ["0", "3", "6"]
    engine.sync(llama(1), 1)  # an earlier step, as after a reload of a checkpoint
    assert engine.generate(PROMPTS[:1], Sampling(1)).policy_version == 1
    engine.close()


def test_what_is_not_trained_goes_out_once(service):
    model = llama(1)
    model.get_input_embeddings().weight.requires_grad_(False)
    model.model.layers[1].requires_grad_(False)
    engine = engine_for(service)
    engine.sync(model, 0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1.3)
    engine.sync(model, 1)
    assert_samples_from(engine, model, SAMPLED)
    first, second = pushes(service)
    assert "partial" not in first.query and second.query["partial"] == "true"
    assert set(safetensors.torch.load(second.body)) == {n for n, p in model.named_parameters() if p.requires_grad}
    engine.close()


def test_lora_students_are_pushed_merged(service):
    adapted = lora(llama(5), target_modules="all-linear")
    engine = engine_for(service)
    for step in range(2):
        engine.sync(adapted, step)
        assert_samples_from(engine, copy.deepcopy(adapted).merge_and_unload(), SAMPLED)
        with torch.no_grad():
            for name, p in adapted.named_parameters():
                if "lora_" in name:
                    p.mul_(-0.7)
    engine.close()


def test_weights_are_no_wider_than_the_service_holds_them(service, monkeypatch):
    told = service.small._info
    monkeypatch.setattr(service.small, "_info", lambda: {**told(), "dtype": "bfloat16"})
    engine = engine_for(service)
    engine.sync(llama(1), 0)
    (push,) = pushes(service)
    sent = safetensors.torch.load(push.body)
    assert {t.dtype for t in sent.values()} == {torch.bfloat16}
    assert torch.equal(sent["model.norm.weight"], llama(1).model.norm.weight.bfloat16())
    engine.close()


def test_a_service_started_again_gets_the_weights_again(service):
    """Between two calls: its own weights are refused by the request that names the student's."""
    model, engine = llama(1), engine_for(service)
    engine.sync(model, 7)
    service.small.restart(LocalTeacher(llama(9), tokenizer()))
    assert assert_samples_from(engine, model, SAMPLED).policy_version == 7
    assert len(pushes(service)) == 2
    engine.close()


def test_a_service_started_again_gets_all_weights_not_only_the_trained(service):
    model = llama(1)
    model.get_input_embeddings().weight.requires_grad_(False)
    engine = engine_for(service)
    engine.sync(model, 0)
    service.small.restart(LocalTeacher(llama(9), tokenizer()))
    engine.sync(model, 1)
    assert_samples_from(engine, model, SAMPLED)
    assert all("partial" not in s.query for s in pushes(service))
    engine.close()


def test_two_runs_on_one_service_are_told(service):
    engine, whole = engine_for(service), service.small.answer
    engine.sync(llama(1), 0)

    def answer(seen):
        if seen.path == protocol.GENERATE:  # another run pushes between our push and our request, every time
            service.small.restart(LocalTeacher(llama(2), tokenizer()))
        return whole(seen)

    service.small.answer = answer
    with pytest.raises(UserError, match="had other weights than were pushed, 3 times in one step. Fix: give every run"):
        engine.generate(PROMPTS, SAMPLED)
    engine.close()


def test_sharded_weights_are_not_pushed_in_the_middle_of_a_step(service):
    model, engine = llama(1), engine_for(service)
    engine.sync(model, 7)
    next(model.parameters()).ds_id = 0  # as ZeRO-3 marks what it shards
    service.small.restart(LocalTeacher(llama(9), tokenizer()))
    with pytest.raises(UserError, match="was started again and lost the student's weights; sharded ones .*--resume"):
        engine.generate(PROMPTS, SAMPLED)
    engine.close()


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_change_neither_weights_nor_samples(service, fault):
    service.stall_s = 1.2
    model, engine = llama(1), engine_for(service, timeout_s=1.0)
    service.next(fault, None, fault, None)
    engine.sync(model, 2)
    assert_samples_from(engine, model, SAMPLED)
    counters = engine.transport.counters
    assert counters.retries + counters.reattached == (0 if fault == "slow" else 2)
    assert set(service.computed.values()) == {1}
    engine.close()


def test_a_folder_that_both_can_read_carries_the_weights(service, tmp_path):
    model, engine = llama(1), engine_for(service, folder=tmp_path / "shared")
    for step in range(2):
        engine.sync(model, step)
        assert_samples_from(engine, model, SAMPLED)
        (written,) = (tmp_path / "shared").iterdir()  # that of the step before is gone
        stored = safetensors.torch.load_file(written / "model.safetensors")
        assert torch.equal(stored["model.norm.weight"], model.model.norm.weight)
    assert all(len(s.body) < 300 for s in pushes(service))
    engine.close()
    assert not list((tmp_path / "shared").iterdir())


def test_every_replica_gets_the_weights():
    with service_over(8) as one, service_over(9) as two:
        engine = RemoteRollouts([one.url, two.url], eos_ids=(1,), pad_id=0, **QUICK)
        model = llama(1)
        engine.sync(model, 0)
        assert_samples_from(engine, model, SAMPLED)
        for service in (one, two):
            assert len(pushes(service)) == 1
            assert len(service.posts(protocol.GENERATE)) == 2  # the comparison after the first push, and the samples
        engine.close()


def test_a_service_that_holds_another_model_after_the_push_is_refused(service, monkeypatch):
    engine = RemoteRollouts(service.url, eos_ids=(1,), pad_id=0, **QUICK)
    push = RemoteRollouts._weights
    monkeypatch.setattr(RemoteRollouts, "_weights", lambda self, model, *args, **kw: push(self, llama(9), *args, **kw))
    with pytest.raises(UserError, match="nats a token off the student's own"):
        engine.sync(llama(1), 0)
    engine.close()


def test_what_cannot_work_is_refused(service):
    service.small.weights = False
    with pytest.raises(UserError, match="rollouts.url .* takes no weights"):
        engine_for(service)
    service.small.weights = True
    engine = engine_for(service)
    with pytest.raises(UserError, match="rollouts http://.* refuses /v1/weights with HTTP 400: weights: "):
        engine.sync(llama(1, layers=3), 0)
    engine.sync(llama(1), 0)
    with pytest.raises(UserError, match="rollouts.max_new_tokens is 65"):
        engine.generate(PROMPTS, Sampling(65))
    engine.close()


def test_the_stream_is_a_safetensors_file(monkeypatch):
    monkeypatch.setattr("llmdistill.wire.tensors.CHUNK_BYTES", 10)
    tensors = {
        "a.weight": torch.arange(12.0).reshape(3, 4).t(),
        "half": torch.randn(5).half(),
        "brain": torch.randn(2, 3).bfloat16(),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "bits": torch.tensor([True, False]),
    }
    length, chunks = safetensors_stream(tensors)
    data = b"".join(chunks())
    assert len(data) == length and b"".join(chunks()) == data
    found = safetensors.torch.load(data)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype


def test_packing_keeps_the_order_and_every_bound():
    costs = [(1, 5), (1, 5), (1, 1), (1, 20), (1, 2), (1, 2), (1, 2)]
    assert pack(costs, (3, 10)) == [[0, 1], [2], [3], [4, 5, 6]]
    assert pack(costs, (1, 100)) == [[i] for i in range(7)] and pack([], (1,)) == []


@pytest.mark.slow
def test_the_first_rank_pushes_for_all_and_fails_for_all(tmp_path):
    """Two processes: one push; a push that is refused ends both with the same words."""
    program = tmp_path / "rank.py"
    program.write_text(
        textwrap.dedent(
            """
            import sys
            import torch
            from llmdistill.errors import UserError
            from llmdistill.texts import Prompt, Sampling
            from llmdistill.rollouts.remote import RemoteRollouts
            from tests.tiny import llama

            rank, url, store = int(sys.argv[1]), sys.argv[2], sys.argv[3]
            torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
            engine = RemoteRollouts(url, eos_ids=(1,), pad_id=0)
            engine.sync(llama(1), 5)
            print(engine.generate([Prompt([5, 6, 7], "")], Sampling(4, seed=rank)).policy_version)
            try:
                engine.sync(llama(1, layers=3), 6)
            except UserError as error:
                print(str(error)[:60])
            """
        )
    )
    with service_over() as service:
        command, env = [sys.executable, str(program)], {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        arguments = [[str(rank), service.url, str(tmp_path / "store")] for rank in range(2)]
        ranks = [subprocess.Popen([*command, *a], stdout=subprocess.PIPE, text=True, env=env) for a in arguments]
        told = [process.communicate(timeout=120)[0].splitlines() for process in ranks]
        assert told[0] == told[1] == ["5", f"rollouts {service.url} refuses /v1/weights with HTTP 400: "[:60]]
        # of each rank: the comparison after the first push, and the samples
        assert len(pushes(service)) == 2 and len(service.posts(protocol.GENERATE)) == 2 * 2
