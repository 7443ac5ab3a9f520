"""Distillation in steps over the one loop: whose answers are learned, rounds, and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmdistill.diffusion import steps
from llmdistill.diffusion.backbone import MaskedDiffusionLM
from llmdistill.diffusion.losses import without_mask_token
from llmdistill.diffusion.step_states import REVEALED, Rounds
from llmdistill.diffusion.steps_stage import StepDistillationConfig
from llmdistill.diffusion.steps_trainer import StepDistillationTrainer
from llmdistill.errors import UserError
from llmdistill.objectives.divergences import forward_kl, reverse_kl
from tests import tiny

from . import runs


def trainer(out: Path, **given: Any) -> Any:
    settings = {"first_step": 0.25, "round_steps": 2, "rounds": 2, "eval_dataset": None, **given}
    return runs.trainer(out, StepDistillationConfig, StepDistillationTrainer, **settings)


def denoiser_of(t: Any) -> MaskedDiffusionLM:
    d = t.denoiser
    return MaskedDiffusionLM(t.model, d.mask_token_id, shift=d.shift, block_size=d.block_size, probe=False)


def text_of(t: Any) -> Any:
    return t.draw(runs.examples(t, 4))["main"]


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jeffreys"])
def test_the_loss_is_the_librarys_on_the_two_states(divergence: Any, tmp_path: Path) -> None:
    """Streamed, in micro-batches, against mcd_loss on whole logits; the teacher is another model than the student."""
    t = trainer(tmp_path, divergence=divergence, teacher_temperature=0.8)
    other = dict(tiny.llama(7).named_parameters())
    for name, value in t.judges["teacher"].average.items():
        value.copy_(other[name].detach())
    text = text_of(t)
    noise, steps_BT = text.rollout.noise, text.rollout.step_map
    clean, masked_t = text.rollout.input_ids, noise.masked
    masked_s = masked_t & (steps_BT != REVEALED)
    assert bool((masked_t & ~masked_s).any()) and bool(masked_s.any())
    mask, mask_id = text.rollout.attention_mask, t.denoiser.mask_token_id
    model = denoiser_of(t).eval()
    with torch.no_grad():
        student = model(clean.masked_fill(masked_t, mask_id), attention_mask=mask)
        with t.judges["teacher"]._as_judge():
            teacher = model(clean.masked_fill(masked_s, mask_id), attention_mask=mask)
        kinds = {"reverse_kl": (reverse_kl,), "forward_kl": (forward_kl,), "jeffreys": (reverse_kl, forward_kl)}
        options = {"teacher_temperature": 0.8}
        losses = [
            steps.mcd_loss(student, teacher, clean, masked_t, masked_s, divergence=kind, **options)
            for kind in kinds[divergence]
        ]
        expected = torch.stack(losses).mean(0)[masked_t].sum() / noise.countable.sum()
    t.model.eval()
    found = [t.compute_loss(t.model, {"micro_batch": b}) for b in t.batches({"main": text}, 2)]
    assert float(sum(found).detach()) == pytest.approx(float(expected), rel=1e-4)


def test_masks_are_nested_and_as_often_as_the_schedule_says(tmp_path: Path) -> None:
    """Of a token masked at t the share that stays masked is (t - dt) / t: 0.61 for t uniform on [1/4, 1]; 4 standard
    errors of 1,000 tokens."""
    t = trainer(tmp_path, copies=40)
    text = text_of(t)
    noise, found = text.rollout.noise, text.rollout.step_map
    assert torch.equal(found >= 0, noise.masked) and torch.equal(noise.no_suffix, found >= 1)
    assert not bool((noise.masked & ~text.rollout.completion_mask).any())
    masked = float(noise.masked.sum() / noise.countable.sum())
    stays = float((found == 1).sum() / noise.countable.sum())
    count = int(noise.countable.sum())
    assert count > 1000 and masked == pytest.approx(0.625, abs=4 * 0.5 / count**0.5)
    assert stays == pytest.approx(0.375, abs=4 * 0.5 / count**0.5)


def test_a_teacher_of_sub_steps_says_what_was_said_when_a_token_came(tmp_path: Path) -> None:
    """SDTT: tokens of the first sub-step hear the answer at t; the others what is said after those have been written,
    by the teacher's draw."""
    t = trainer(tmp_path, algorithm="sdtt")
    judge, text = t.judges["teacher"], text_of(t)
    rollout = text.rollout
    at, steps_N = rollout.completion_mask, rollout.step_map[rollout.completion_mask]
    (logits,) = judge.dense(rollout).chunk(slice(0, rollout.num_rows), None)
    mask_id, model = t.denoiser.mask_token_id, denoiser_of(t).eval()
    with torch.no_grad():
        noisy = rollout.input_ids.masked_fill(rollout.noise.masked, mask_id)
        before = model(noisy, attention_mask=rollout.attention_mask)[at]
    assert bool((steps_N == 0).any()) and bool((steps_N > 0).any())
    heard = without_mask_token(logits, mask_id)
    torch.testing.assert_close(heard[steps_N == 0], before[steps_N == 0], rtol=1e-3, atol=1e-4)
    moved = (heard - before).nan_to_num().abs().amax(-1)[steps_N > 0]
    alone = torch.tensor([not bool((rollout.step_map[b] == 0).any()) for b in range(len(rollout))])
    b_N = at.nonzero()[:, 0][steps_N > 0]
    assert bool((moved[~alone[b_N]] > 1e-4).all()) and bool((moved[alone[b_N]] < 1e-4).all())
    again = judge.dense(rollout).chunk(slice(0, rollout.num_rows), None)[0]
    assert torch.equal(again, logits), "the draw is the text's own"


def test_rounds_double_and_their_teachers_are_the_students_of_their_beginnings(tmp_path: Path) -> None:
    rounds = Rounds(3, 5, 1 / 8, (0.96, 0.75))
    assert [rounds.dt(s) for s in (0, 4, 5, 10, 99)] == [1 / 8, 1 / 8, 1 / 4, 1 / 2, 1 / 2]
    assert [rounds.temperature(s) for s in (0, 5, 10)] == pytest.approx([0.96, 0.855, 0.75])
    assert [s for s in range(20) if rounds.begins(s)] == [5, 10]
    t = trainer(tmp_path, max_steps=3)
    start = {name: p.detach().clone() for name, p in t.model.named_parameters()}
    asked: list[dict[str, Tensor]] = []
    dense = t.judges["teacher"].dense

    def noted(rollout: Any) -> Any:
        asked.append({name: value.clone() for name, value in t.judges["teacher"].average.items()})
        return dense(rollout)

    t.judges["teacher"].dense = noted
    t.train()
    dts = [line["rollout/masked_share"] for line in t.state.log_history if "rollout/masked_share" in line]
    assert len(dts) == 3 and len(asked) == 3
    assert all(torch.equal(asked[1][name], start[name]) for name in asked[1])
    assert not all(torch.equal(asked[2][name], start[name]) for name in asked[2])


def test_a_run_that_is_resumed_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    """In the middle of the second round: the teacher of then is in the checkpoint, bit for bit."""
    whole = trainer(tmp_path / "a", max_steps=4, save_strategy="steps", save_steps=3)
    whole.train()
    resumed = trainer(tmp_path / "b", max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-3"))
    pairs = zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)
    teachers = (t.judges["teacher"].average for t in (whole, resumed))
    first, second = teachers
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"first_step": 0.5}, "in the last round dt must be below 1"),
        ({"algorithm": "sdtt", "block_size": 4}, "in the clean text of later blocks"),
        ({"teacher_decay": 1.5}, "teacher_decay is 1.5"),
        ({"weighting": "cart"}, "there are two"),
        ({"teacher": "other"}, "another was given"),
    ],
)
def test_what_cannot_be_distilled_is_refused(settings: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, **settings)
