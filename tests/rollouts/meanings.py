"""What settings of sampling mean, whichever engine draws: checked against forward passes of the model itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from llmdistill.objectives.sampler import sampler_logprobs
from llmdistill.texts import Prompt, Rollout, Sampling
from tests import tiny

PROMPTS = [Prompt([40 + i, 41, 42 + i] * (1 + i % 3), "") for i in range(4)]
SAMPLED = Sampling(12, samples_per_prompt=2, seed=4)
TOLERANCE = 1e-3  # nats, of engines in float32


def completions(rollout: Rollout) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(rollout.input_ids, rollout.completion_mask, strict=True)]


@torch.no_grad()
def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    """[T, V] of one sequence alone."""
    return model(input_ids=torch.tensor([ids])).logits[0].float()


def assert_same(one: Rollout, other: Rollout) -> None:
    assert completions(one) == completions(other) and one.finish == other.finish
    torch.testing.assert_close(one.behavior_logprobs, other.behavior_logprobs, rtol=0, atol=TOLERANCE)


def assert_min_p(engine: Any, model: Any) -> None:
    """Drawn tokens have the share of the likeliest one; log-probs are those that the estimators reckon with."""
    sampling = replace(SAMPLED, temperature=1.3, min_p=0.2, top_p=0.9)
    rollout, narrowed = engine.generate(PROMPTS, sampling), 0
    for b, drawn in enumerate(completions(rollout)):
        prompt = PROMPTS[b // 2].ids
        rows = logits_of(model, [*prompt, *drawn])[len(prompt) - 1 : -1] / 1.3
        share = (rows.gather(1, torch.tensor(drawn)[:, None])[:, 0] - rows.amax(1)).exp()
        assert float(share.min()) >= 0.2 - TOLERANCE
        expected = sampler_logprobs(rows, torch.tensor(drawn), min_p=0.2, top_p=0.9)
        found = rollout.behavior_logprobs[b][rollout.completion_mask[b]]  # type: ignore[index]
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
        narrowed += int((expected - rows.log_softmax(-1).gather(1, torch.tensor(drawn)[:, None])[:, 0] > 0.01).sum())
    assert narrowed > 10


def assert_repetition_penalty(engine: Any, model: Any) -> None:
    """Greedy, by hand: what stands in prompt or completion is penalised, and padding is neither."""
    penalty, eos = 1.7, 1
    found = completions(engine.generate(PROMPTS, Sampling(12, temperature=0.0, repetition_penalty=penalty)))
    assert found != completions(engine.generate(PROMPTS, Sampling(12, temperature=0.0)))
    for prompt, drawn in zip(PROMPTS, found, strict=True):
        expected: list[int] = []
        while len(expected) < 12 and expected[-1:] != [eos]:
            row = logits_of(model, [*prompt.ids, *expected])[-1]
            seen = torch.tensor(sorted({*prompt.ids, *expected}))
            row[seen] = torch.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
            expected.append(int(row.argmax()))
        assert drawn == expected


def assert_stops(engine: Any) -> None:
    """The draw is that without stop strings up to the token that completes one, which stays; it ended by itself."""
    tokenizer = tiny.tokenizer()
    whole = completions(engine.generate(PROMPTS, SAMPLED))
    texts = [tokenizer.decode(ids) for ids in whole]
    stop = next(text[i : i + 2] for text in texts for i in range(3, len(text) - 1) if text[i : i + 2].isascii())
    rollout = engine.generate(PROMPTS, replace(SAMPLED, stop=(stop, "never said")))
    found, ended = completions(rollout), 0
    for ids, drawn, finish in zip(whole, found, rollout.finish, strict=True):
        ends = [n for n in range(1, len(ids) + 1) if stop in tokenizer.decode(ids[:n])]
        assert drawn == (ids[: ends[0]] if ends else ids)
        assert finish == ("stop" if ends or ids[-1] == 1 else "length")
        ended += bool(ends) and len(drawn) < 12
    assert ended and any(len(ids) == 12 for ids in found)


def assert_ignore_eos(engine: Any) -> None:
    """Nothing ends it, and up to the first end the draw is the same."""
    many = replace(SAMPLED, samples_per_prompt=4, max_new_tokens=20)
    usual, endless = engine.generate(PROMPTS, many), engine.generate(PROMPTS, replace(many, ignore_eos=True))
    assert set(endless.finish) == {"length"} and "stop" in usual.finish
    for short, long in zip(completions(usual), completions(endless), strict=True):
        assert len(long) == 20 and long[: len(short)] == short


def assert_parts(engine: Any, bounded: Any) -> None:
    """What a bound on the tokens splits draws what one call would, and so does a call for the later samples alone."""
    many = replace(SAMPLED, samples_per_prompt=3)
    whole = engine.generate(PROMPTS, many)
    assert_same(bounded.generate(PROMPTS, many), whole)
    later = engine.generate(PROMPTS, replace(many, samples_per_prompt=1, first_sample=2))
    assert completions(later) == completions(whole)[2::3]


def stopping_model(seed: int, **options: Any) -> Any:
    """A model that writes its end now and then."""
    model = tiny.llama(seed, **options)
    with torch.no_grad():
        model.get_output_embeddings().weight[1] *= 2
    return model
