"""Students of other classes in a vLLM engine beside them: float32, so that a mistake of a hundredth is seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig

from llmdistill.errors import UserError
from llmdistill.models.adapters import adapted
from llmdistill.texts import Prompt, Sampling
from tests import tiny
from tests.students.architectures import small

pytest.importorskip("vllm", reason="the vllm extra is not installed")

from llmdistill.rollouts import vllm as engines

pytestmark = pytest.mark.slow
PROMPTS = [Prompt(list(range(5, 5 + n)), str(n)) for n in (3, 20, 7)]
SIZES = {"head_dim": 32, "hidden_size": 128}  # the smallest that vLLM's CPU attention and expert kernels run
TOLERANCE = 2e-4  # as in tests/rollouts/test_vllm.py


@contextmanager
def engine_for(student: Any, **options: Any) -> Iterator[Any]:
    settings = {"dtype": "float32", "max_model_len": 64, "kv_cache_gib": 0.05, **options}
    engine = engines.VLLMRollouts(student, eos_ids=(1,), pad_id=0, **settings)
    try:
        yield engine
    finally:
        engine.close()


@torch.no_grad()
def distance(engine: Any, model: Any) -> float:
    """Largest difference of the engine's log-probs of what it writes from the model's."""
    rollout = engine.generate(PROMPTS, Sampling(8, temperature=0.0))
    output = model(input_ids=rollout.input_ids, attention_mask=rollout.attention_mask.long())
    logprobs = output.logits.float().log_softmax(-1)[:, :-1]
    chosen = logprobs.gather(2, rollout.input_ids[:, 1:, None]).squeeze(2)
    return float((chosen - rollout.behavior_logprobs[:, 1:])[rollout.completion_mask[:, 1:]].abs().max())


def randomised(student: Any, seed: int) -> Any:
    """The student with other adapters or, without any, other weights."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name or not hasattr(student, "peft_config"):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return student


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "gemma2", "olmo2"])
def test_pushes_arrive(architecture: str, lora: bool) -> None:
    """Experts are packed on a CPU; Gemma-2 has no head; OLMo-2 is made of transformers' own class."""
    student = small(architecture, **SIZES)
    if lora:
        student = adapted(student, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    with engine_for(student) as engine:
        for version in (1, 2):
            engine.sync(randomised(student, version), version)
            assert distance(engine, student) < TOLERANCE
        assert distance(engine, small(architecture, seed=5, **SIZES)) > 0.1  # it can tell


@pytest.mark.parametrize("loads", [True, False])
def test_an_engine_leaves_the_class_of_its_student_alone(loads: bool) -> None:
    student = small("olmo2", **SIZES)
    decoder = type(student.model)
    before = decoder.__bases__, dict(vars(decoder))
    expected = student(input_ids=torch.tensor([[4, 5, 6]])).logits
    if loads:
        with engine_for(student):
            assert torch.equal(student(input_ids=torch.tensor([[4, 5, 6]])).logits, expected)
    else:
        with pytest.raises(UserError, match="vLLM cannot load"), engine_for(student, kv_cache_gib=1e-7):
            pass
    assert (decoder.__bases__, dict(vars(decoder))) == before
    assert torch.equal(small("olmo2", **SIZES)(input_ids=torch.tensor([[4, 5, 6]])).logits, expected)


def test_an_engine_with_other_weights_is_refused_after_the_first_push(monkeypatch: pytest.MonkeyPatch) -> None:
    student, other = tiny.llama(1), tiny.llama(2)
    with engine_for(student) as engine:
        push = engine.engine.push
        monkeypatch.setattr(engine.engine, "push", lambda model: push(other))
        with pytest.raises(UserError, match="nats a token off the student's own"):
            engine.sync(student, 1)
