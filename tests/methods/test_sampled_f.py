"""f-divergences from sampled tokens: what the trainer feeds the estimator, and what comes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.methods import rounds

# f(u) - u f'(u), less its value at u = 1
WEIGHTS = {
    "jensen_shannon": lambda u: -0.5 * ((1 + u) / 2).log(),  # f = (u log u - (1 + u) log((1 + u)/2)) / 2
    "squared_hellinger": lambda u: 1 - u.sqrt(),  # f = (sqrt u - 1)^2
    "kl_reverse": lambda u: -u.log(),  # f = -log u: - log u + 1 - 1
    "kl_forward": lambda u: 1 - u,  # f = u log u: -u + 1
}


def by_hand(student: Any, teacher: Any, name: str, cap: float, clip: float | None = None, tau: float = 1.0) -> Tensor:
    losses = []
    parts = zip(
        rounds.logps(student, temperature=tau),
        rounds.logps(student),
        rounds.logps(teacher),
        rounds.tokens(),
        rounds.drawn(),
        strict=True,
    )
    for drawn_from, s, t, y, behavior in parts:
        lp = rounds.pick(drawn_from, y)
        log_u = (rounds.pick(t, y) - rounds.pick(s, y)).detach() / tau
        u = (log_u if clip is None else log_u.clamp(-clip, clip)).exp()
        weight = (lp.detach() - behavior).exp().clamp(max=cap) if cap else 1.0
        losses.append(WEIGHTS[name](u) * lp * weight)
    return torch.cat(losses).mean()


@pytest.mark.parametrize("name", sorted(WEIGHTS))
@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_loss_and_gradients_equal_the_formula(tmp_path: Path, name: str, cap: float) -> None:
    """Every token with its own log-prob of the teacher and of who drew it; some ratios are above the cap."""
    student, teacher = tiny.llama(1), tiny.llama(2)
    t = rounds.make(tmp_path, "sampled_f", student=student, teacher=teacher, f=name, importance_cap=cap)
    rounds.assert_agree(t, rounds.text(left=1, right=2), student, by_hand(student, teacher, name, cap))


def test_the_clip_and_the_sampler_s_temperature_reach_the_loss(tmp_path: Path) -> None:
    student, teacher = tiny.llama(1), tiny.llama(2)
    options = {"f": "kl_forward", "log_ratio_clip": 0.7, "sampling": {"temperature": 0.8}}
    t = rounds.make(tmp_path, "sampled_f", student=student, teacher=teacher, **options)
    expected = by_hand(student, teacher, "kl_forward", 5.0, clip=0.7, tau=0.8)
    rounds.assert_agree(t, rounds.text(), student, expected)


def test_a_round_feeds_what_was_drawn(tmp_path: Path) -> None:
    """Ids, the engine's log-probs and the teacher's are those of the tokens that the student wrote."""
    t = rounds.make(tmp_path, "sampled_f")
    texts = t.draw(t.train_dataset[:3])
    (batch,) = t.batches(texts, 1)
    ids, teacher_lp, again, behavior = batch.slices[0].evidence.chunk(slice(0, batch.rollout.num_rows), None)
    rollout = texts["main"].rollout
    assert ids.tolist() == again.tolist() == rollout.token_rows().tolist()
    assert torch.equal(behavior, rollout.behavior_logprobs[:, 1:][rollout.completion_mask[:, 1:]])
    assert not behavior.isnan().any()
    with torch.no_grad():
        full = t.teacher.model(input_ids=rollout.input_ids, attention_mask=rollout.attention_mask).logits
    expected = full.log_softmax(-1)[:, :-1].gather(-1, rollout.input_ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(teacher_lp, expected[rollout.completion_mask[:, 1:]], rtol=1e-4, atol=1e-5)


def test_a_reward_is_only_compared_where_a_term_reads_its_advantage(tmp_path: Path) -> None:
    """It is logged; a group of one sample, which has no advantage, is none of this method's business."""
    reward = {"reward": lambda prompts, completions: [1.0] * len(prompts)}
    t = rounds.make(tmp_path, "sampled_f", trainer=reward, max_steps=1)
    t.train()
    assert [line["rollout/reward"] for line in t.state.log_history if "rollout/reward" in line] == [1.0]
