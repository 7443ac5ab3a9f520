"""Recurrent students: what they write in a batch is what they would write alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmdistill.errors import UserError
from llmdistill.models.generation import generate
from llmdistill.texts import Prompt, Sampling
from tests import tiny
from tests.students.architectures import small

PROMPTS = [Prompt(list(range(5, 5 + n)), str(n)) for n in (3, 12, 7)]
TOLERANCE = 1e-4  # float32 log-probs; sums in another order differ by 1e-6


@torch.no_grad()
def off_its_forward(model: Any, rollout: Any) -> float:
    """Largest difference of what was drawn with from a forward pass over each sequence alone."""
    worst = 0.0
    for b in range(len(rollout)):
        one = rollout.sequences([b])
        length = int(one.attention_mask.sum())
        logits = model(input_ids=one.input_ids[:, :length], use_cache=False).logits[0, :-1].float()
        said = logits.log_softmax(-1).gather(1, one.input_ids[0, 1:length, None]).squeeze(1)
        counted = one.completion_mask[0, 1:length]
        worst = max(worst, float((said - one.behavior_logprobs[0, 1:length])[counted].abs().max()))
    return worst


@pytest.mark.parametrize("architecture", ["rwkv", "recurrent_gemma", "mamba", "falcon_h1", "qwen3_next"])
def test_a_batch_writes_what_each_would_write_alone(architecture: str) -> None:
    model = small(architecture)
    torch.manual_seed(1)
    with torch.no_grad():  # as after training: nothing is 0 that padding would pass through
        for name, parameter in model.named_parameters():
            if "bias" in name or "embed" in name:
                parameter.normal_(std=0.3)
    sampling = Sampling(5, samples_per_prompt=2, seed=3)
    rollout = generate(model, PROMPTS, sampling, eos_ids=(1,), pad_id=2)
    assert off_its_forward(model, rollout) < TOLERANCE
    apart = [generate(model, [p], sampling, eos_ids=(1,), pad_id=2, rows=[i]) for i, p in enumerate(PROMPTS)]
    written = [ids[mask].tolist() for r in apart for ids, mask in zip(r.input_ids, r.completion_mask, strict=True)]
    together = [ids[mask].tolist() for ids, mask in zip(rollout.input_ids, rollout.completion_mask, strict=True)]
    assert together == written


def test_what_is_wrong_even_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that forgets its past while it generates."""
    model = tiny.llama(1)
    forward = type(model).forward

    def forgetful(self: Any, input_ids: Any, **kwargs: Any) -> Any:
        output = forward(self, input_ids=input_ids, **kwargs)
        if kwargs.get("past_key_values") is not None and input_ids.shape[1] == 1:
            output.logits = output.logits.flip(-1)
        return output

    monkeypatch.setattr(type(model), "forward", forgetful)
    with pytest.raises(UserError, match="LlamaForCausalLM cannot be sampled from"):
        generate(model, PROMPTS, Sampling(4), eos_ids=(1,), pad_id=0)


def test_trying_it_out_draws_no_random_number() -> None:
    before = torch.random.get_rng_state()
    generate(tiny.llama(1), PROMPTS, Sampling(4, seed=1), eos_ids=(1,), pad_id=0)
    assert torch.equal(before, torch.random.get_rng_state())
