"""Weights on their way to a rollout service: no more of them than it needs, from one rank, in a form that it takes."""

import copy
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from llmdistill.errors import UserError
from llmdistill.rollouts.remote import RemoteRollouts
from llmdistill.teachers.local import LocalTeacher
from llmdistill.texts import Prompt, Sampling
from llmdistill.wire import protocol
from tests.rollouts.test_remote import QUICK, SAMPLED, assert_samples_from, engine_for, pushes, service_over
from tests.test_weights import lora
from tests.tiny import llama, tokenizer


@pytest.fixture
def service():
    with service_over() as made:
        yield made


def partly_frozen(seed=1):
    model = llama(seed)
    model.model.layers[1].requires_grad_(False)
    return model


def tuned(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1.3)


@pytest.mark.parametrize("kind", ["frozen", "lora"])
def test_an_engine_that_takes_no_part_gets_all_of_them_every_time(service, kind):
    """A vLLM engine on a GPU: the second push, of the trained weights alone, used to end it for everybody."""
    service.small.partial_weights = False
    model = partly_frozen() if kind == "frozen" else lora(llama(5), target_modules="all-linear")
    engine = engine_for(service)
    for step in range(2):
        engine.sync(model, step)
        tuned(model)
    assert len(pushes(service)) == 2 and all("partial" not in seen.query for seen in pushes(service))
    engine.close()


def test_of_several_replicas_one_that_takes_no_part_decides():
    with service_over() as whole, service_over() as part:
        whole.small.partial_weights = False
        engine = RemoteRollouts([part.url, whole.url], eos_ids=(1,), pad_id=0, **QUICK)
        model = partly_frozen()
        for step in range(2):
            engine.sync(model, step)
            tuned(model)
        for service in (whole, part):
            assert len(pushes(service)) == 2 and all("partial" not in seen.query for seen in pushes(service))
        engine.close()


def test_an_upload_whose_answer_was_lost_is_not_sent_again(service):
    """The service is asked first, before every try."""
    model, engine = llama(1), engine_for(service)
    service.next(None, "reset_after")  # the offer goes through; the answer to the upload is lost
    engine.sync(model, 2)
    assert len(pushes(service)) == 1 and len(service.posts(protocol.OFFER)) == 2
    assert_samples_from(engine, model, SAMPLED)
    engine.close()


def test_after_a_restart_one_rank_uploads_and_the_others_ask(service):
    """Three ranks of one run, whose service comes back with weights of its own."""
    model = llama(1)
    ranks = [engine_for(service) for _ in range(3)]
    ranks[0].sync(model, 4)
    for rank in ranks[1:]:  # as the first one tells them
        rank._model, rank.policy_version = model, 4
        rank._digest, rank._fingerprint = ranks[0]._digest, ranks[0]._fingerprint
    service.small.restart(LocalTeacher(llama(9), tokenizer()))
    before = len(pushes(service))
    for rank in ranks:
        assert_samples_from(rank, model, SAMPLED)
    assert len(pushes(service)) - before == 1
    for rank in ranks:
        rank.close()


def test_replicas_are_pushed_to_at_one_time():
    """Each upload waits until the other has begun: one after the other they would wait for ever."""
    both = threading.Barrier(2, timeout=60)

    def plan(seen):
        if seen.path == protocol.WEIGHTS:
            both.wait()

    with service_over() as one, service_over() as two:
        one.plan = two.plan = plan
        engine = RemoteRollouts([one.url, two.url], eos_ids=(1,), pad_id=0, **QUICK)
        engine.sync(llama(1), 0)
        assert len(pushes(one)) == len(pushes(two)) == 1
        engine.close()


def test_a_push_that_is_refused_is_an_error_and_the_service_lives(service):
    engine = engine_for(service)
    with pytest.raises(UserError, match="refuses /v1/weights with HTTP 400"):
        engine.sync(llama(1, layers=3), 0)
    engine.sync(llama(1), 1)
    assert engine.generate([Prompt([5, 6], "")], Sampling(2)).policy_version == 1
    engine.close()


@pytest.mark.slow
def test_an_error_of_the_first_rank_before_the_push_reaches_all(tmp_path):
    """It asks whether the service still has its weights; that fails, and the other rank does not wait for ever."""
    program = tmp_path / "rank.py"
    program.write_text(
        textwrap.dedent(
            """
            import sys
            import torch
            from llmdistill.errors import UserError
            from llmdistill.rollouts.remote import RemoteRollouts
            from tests.rollouts.test_pushes import partly_frozen

            rank, url, store = int(sys.argv[1]), sys.argv[2], sys.argv[3]
            torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
            engine = RemoteRollouts(url, eos_ids=(1,), pad_id=0)
            model = partly_frozen()
            engine.sync(model, 0)

            def fail():
                assert rank == 0
                raise UserError("the service is gone")

            engine._has_ours = fail
            try:
                engine.sync(model, 1)
            except UserError as error:
                print(error)
            """
        )
    )
    with service_over() as service:
        command, env = [sys.executable, str(program)], {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        arguments = [[str(rank), service.url, str(tmp_path / "store")] for rank in range(2)]
        ranks = [subprocess.Popen([*command, *a], stdout=subprocess.PIPE, text=True, env=env) for a in arguments]
        told = [process.communicate(timeout=180)[0].splitlines() for process in ranks]
        assert told == [["the service is gone"]] * 2


@pytest.mark.parametrize("kind", ["whole", "frozen", "lora"])
def test_a_snapshot_is_what_is_sampled_from_while_training_goes_on(service, kind):
    """Also by a service that is started again afterwards: it gets the weights of then, and all of them."""
    model = {"whole": llama, "frozen": partly_frozen, "lora": lambda: lora(llama(5), target_modules="all-linear")}[kind]
    model = model(1) if kind == "whole" else model()
    engine = engine_for(service)
    engine.sync(model, 0)
    tuned(model)
    then = copy.deepcopy(model).merge_and_unload() if kind == "lora" else copy.deepcopy(model)
    snapshot = engine.snapshot(model, 1)
    tuned(model)
    engine.install(snapshot)
    assert assert_samples_from(engine, then, SAMPLED).policy_version == 1
    assert ("partial" in pushes(service)[-1].query) == (kind != "whole")
    tuned(model)
    service.small.restart(LocalTeacher(llama(9), tokenizer()))
    assert assert_samples_from(engine, then, SAMPLED).policy_version == 1
    engine.install(snapshot)  # it is there
    assert len(pushes(service)) == 3
    engine.close()
