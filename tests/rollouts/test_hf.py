"""Sampling with transformers: a random stream per request, the right distribution, filters, the ending eos."""

from __future__ import annotations

import pytest
import torch

from llmdistill.errors import UserError
from llmdistill.models.generation import _Draw, generate
from llmdistill.texts import Prompt, Sampling
from tests import tiny

PROMPTS = [Prompt([40 + i, 41, 42 + i] * (1 + i % 3), "") for i in range(5)]


def completions(prompts: list[Prompt], sampling: Sampling, seed: int = 1) -> list[list[int]]:
    rollout = generate(tiny.llama(seed), prompts, sampling, eos_ids=[1], pad_id=0)
    return [row[mask].tolist() for row, mask in zip(rollout.input_ids, rollout.completion_mask, strict=True)]


def test_what_a_request_draws_does_not_depend_on_its_company() -> None:
    together = completions(PROMPTS, Sampling(8, seed=4))
    assert completions(PROMPTS[:1], Sampling(8, seed=4)) == together[:1]
    two = completions(PROMPTS, Sampling(8, seed=4, samples_per_prompt=2))
    assert two[0::2] == together and two[1::2] != together
    assert completions(PROMPTS, Sampling(8, seed=5)) != together


def test_a_part_of_a_call_draws_what_the_whole_call_would() -> None:
    model, sampling = tiny.llama(1), Sampling(8, seed=4, samples_per_prompt=2)
    whole = completions(PROMPTS, sampling)
    part = generate(model, PROMPTS[3:], sampling, eos_ids=[1], pad_id=0, rows=[3, 4])
    assert [r[m].tolist() for r, m in zip(part.input_ids, part.completion_mask, strict=True)] == whole[6:]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_behavior_logprobs_are_those_of_the_distribution_drawn_from(temperature: float) -> None:
    model = tiny.llama(1)
    rollout = generate(model, PROMPTS, Sampling(8, temperature, seed=2), eos_ids=[1], pad_id=0)
    logits = model(rollout.input_ids, attention_mask=rollout.attention_mask).logits[:, :-1] / (temperature or 1.0)
    expected = logits.log_softmax(-1).gather(-1, rollout.input_ids[:, 1:, None]).squeeze(-1)
    counted = rollout.completion_mask[:, 1:]
    assert (expected - rollout.behavior_logprobs[:, 1:])[counted].abs().max() < 1e-4
    assert (rollout.behavior_logprobs[~rollout.completion_mask] == 0).all()


def test_draws_follow_the_distribution() -> None:
    """20,000 requests over 5 tokens, one of them impossible: counts within 5 sigma (false failures below 1e-5)."""
    n, logits = 20_000, torch.tensor([2.0, 0.0, -torch.inf, 1.0, -3.0])
    scores = _Draw(Sampling(1, seed=1), [(i, 0) for i in range(n)])(torch.zeros(n, 1), logits.expand(n, 5))
    counts, p = scores.argmax(-1).bincount(minlength=5).double(), logits.double().softmax(-1)
    assert counts[2] == 0
    assert ((counts - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt()).all()


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_filters_that_leave_one_token_are_greedy(filters: dict[str, float]) -> None:
    greedy = completions(PROMPTS, Sampling(8, temperature=0))
    assert completions(PROMPTS, Sampling(8, seed=3, **filters)) == greedy  # type: ignore[arg-type]
    assert completions(PROMPTS, Sampling(8, seed=3)) != greedy


def test_the_ending_eos_counts_and_nothing_after_it() -> None:
    model = tiny.llama(5)
    with torch.no_grad():
        model.get_output_embeddings().weight[1] *= 3  # makes the end likely
    rollout = generate(model, PROMPTS, Sampling(30, seed=1, samples_per_prompt=4), eos_ids=[1], pad_id=0)
    assert {"stop"} <= set(rollout.finish)
    for row, mask, finish in zip(rollout.input_ids, rollout.completion_mask, rollout.finish, strict=True):
        ids = row[mask].tolist()
        assert (ids[-1] == 1) == (finish == "stop") and 1 not in ids[:-1]
        assert finish == "stop" or len(ids) == 30


def test_exploded_weights_are_named_before_torch_fails() -> None:
    model = tiny.llama(1)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite.*learning_rate"):
        generate(model, PROMPTS, Sampling(4), eos_ids=[1], pad_id=0)
