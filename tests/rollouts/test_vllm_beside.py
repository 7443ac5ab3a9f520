"""The vLLM engine beside training: weights by its transfer API, sleep between uses, LoRA as an adapter.

All of it runs on a CPU but what only a GPU does: there vLLM's sleep frees nothing (its calls and their order are real).
Not run: memory that is given back and comes back, `enable_sleep_mode`, captured graphs over weights that were replaced.
"""

import inspect

import pytest
import torch

from llmdistill.errors import UserError
from llmdistill.models.weights import named_weights
from llmdistill.texts import Sampling
from tests.rollouts.test_vllm import PROMPTS, assert_samples_from, distance, engine_for
from tests.test_weights import lora
from tests.tiny import llama, tokenizer

pytest.importorskip("vllm", reason="the vllm extra is not installed")

from llmdistill.compat.vllm_transfer import takes_transfer, transfer
from llmdistill.compat.vllm_weights import forget_prefixes


@pytest.fixture(scope="module")
def by_transfer():
    engine = engine_for(llama(0, hidden=64), transfer=True)
    engine.sync(llama(0, hidden=64), 0)  # whichever test comes first on its worker
    yield engine
    engine.close()


def test_after_a_push_by_vllms_transfer_api_the_engine_is_the_student(by_transfer):
    assert takes_transfer(by_transfer.engine.llm)
    old, new = llama(1, hidden=64), llama(2, hidden=64)
    by_transfer.sync(old, 1)
    assert_samples_from(by_transfer, old)
    by_transfer.sync(new, 2)
    assert_samples_from(by_transfer, new)
    assert distance(by_transfer, old) > 0.1


def test_buckets_may_part_a_layer(by_transfer):
    """A tensor at a time: vLLM holds what it has of a layer until it has all."""
    model = llama(3, hidden=64)
    transfer(by_transfer.engine.llm, named_weights(model), bucket_bytes=1)
    assert_samples_from(by_transfer, model)


def test_a_merged_lora_goes_the_same_way(by_transfer):
    adapted = lora(llama(5, hidden=64), target_modules="all-linear")
    by_transfer.sync(adapted, 1)
    assert_samples_from(by_transfer, adapted)


def test_a_head_that_is_the_embedding_matrix_is_new_too():
    """On a CPU it is packed for itself, also where nothing comes under its own name."""
    old, new = llama(1, hidden=64, tied=True), llama(2, hidden=64, tied=True)
    engine = engine_for(old, transfer=True)
    try:
        engine.sync(old, 1)
        transfer(engine.engine.llm, (pair for pair in named_weights(new) if pair[0] != "lm_head.weight"))
        forget_prefixes(engine.engine.llm)
        assert_samples_from(engine, new)
    finally:
        engine.close()


def test_an_engine_that_sleeps_is_awake_when_it_is_asked(by_transfer):
    inner, model = by_transfer.engine, llama(4, hidden=64)
    inner.sleeps = True
    try:
        inner.sleep()
        assert inner.llm.llm_engine.is_sleeping()
        by_transfer.sync(model, 1)
        assert inner.llm.llm_engine.is_sleeping()  # its cache is: only the weights are there
        assert_samples_from(by_transfer, model)
        assert inner.llm.llm_engine.is_sleeping()
        with pytest.raises(UserError):
            by_transfer.generate(PROMPTS, Sampling(1000))
        assert_samples_from(by_transfer, model)  # a refused round leaves it as it was
    finally:
        inner.wake()
        inner.sleeps = False


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made = tmp_path_factory.mktemp("base")
    llama(6, hidden=64).save_pretrained(made)
    tokenizer().save_pretrained(made)
    return made


def test_an_adapter_is_handed_over_alone_and_replaced(checkpoint):
    adapted = lora(
        type(llama(6, hidden=64)).from_pretrained(checkpoint, dtype=torch.float32), target_modules="all-linear"
    )
    engine = engine_for(adapted, as_adapter=True)
    try:
        engine.sync(adapted, 1)
        assert_samples_from(engine, adapted)
        with torch.no_grad():
            for name, p in adapted.named_parameters():
                if "lora_" in name:
                    p.mul_(-0.7)
        assert distance(engine, adapted) > 0.1
        engine.sync(adapted, 2)
        assert_samples_from(engine, adapted)
    finally:
        engine.close()


def test_what_vllm_does_not_run_as_an_adapter_is_refused(checkpoint):
    adapted = lora(type(llama(6, hidden=64)).from_pretrained(checkpoint, dtype=torch.float32), use_dora=True)
    engine = engine_for(adapted, as_adapter=True)
    try:
        with pytest.raises(UserError, match="DoRA.*rollouts.lora merged"):
            engine.sync(adapted, 1)
    finally:
        engine.close()


def test_an_adapter_needs_an_adapter_and_a_checkpoint():
    with pytest.raises(UserError, match="the student has none"):
        engine_for(llama(0, hidden=64), as_adapter=True)
    with pytest.raises(UserError, match="made in memory"):
        engine_for(lora(llama(0, hidden=64)), as_adapter=True)


def test_an_engine_of_two_processes_is_none_of_one():
    with pytest.raises(UserError, match="tensor_parallel_size is 2, and 1 processes train"):
        engine_for(llama(0, hidden=64), tensor_parallel_size=2)


def test_the_calls_are_those_of_the_installed_vllm():
    """What a GPU needs of them and nothing here runs: names and arguments."""
    import vllm
    from vllm import EngineArgs
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.v1.worker.gpu_worker import Worker

    def arguments(call):
        return list(inspect.signature(call).parameters)

    assert arguments(vllm.LLM.sleep)[:2] == ["self", "level"]
    assert arguments(vllm.LLM.wake_up) == ["self", "tags"]
    assert arguments(vllm.LLM.update_weights) == ["self", "request"]
    assert arguments(vllm.LLM.start_weight_update) == ["self"]
    assert arguments(Worker.sleep) == ["self", "level"] and arguments(Worker.wake_up) == ["self", "tags"]
    assert {"enable_sleep_mode", "weight_transfer_config", "tensor_parallel_size"} <= set(arguments(EngineArgs))
    needed = {"init_transfer_engine", "start_weight_update", "finish_weight_update", "receive_weights", "shutdown"}
    assert needed == WeightTransferEngine.__abstractmethods__
    assert {"nccl", "ipc"} <= set(WeightTransferEngineFactory._registry)
