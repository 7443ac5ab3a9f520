"""Reinforcement over the one loop: whose states are read, what counts, and that a reward is learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmdistill import RolloutConfig
from llmdistill.diffusion.losses import token_ce, without_mask_token
from llmdistill.diffusion.reinforced import unwritten
from llmdistill.diffusion.rl_stage import DiffusionRLConfig
from llmdistill.diffusion.rl_trainer import DiffusionRLTrainer
from llmdistill.diffusion.slicing import NEVER
from llmdistill.errors import UserError
from tests import tiny

from . import runs

PROMPTS = [{"prompt": "add", "answer": "e"}] * 16


def ending(seed: int) -> Any:
    """A Llama that writes an end somewhere in eight tokens more often than not."""
    model = tiny.llama(seed, tied=False)
    with torch.no_grad():
        model.lm_head.weight[1] *= 1.6
    return model


def has_letter(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [float(any(c in "aeiou" for c in text)) for text in completions]


def is_short(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [float(len(text) < 4) for text in completions]


def is_even(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(ord, text)) % 2 == 0) for text in completions]


def trainer(out: Path, reward: Any = is_short, **given: Any) -> Any:
    given = {"samples": 8, "model": ending(1), "train_dataset": PROMPTS, "eval_dataset": None, **given}
    own = {"reward": reward, "process_reward": given.pop("process_reward", None)}

    class WithReward(DiffusionRLTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **own, **kwargs)

    return runs.trainer(out, DiffusionRLConfig, WithReward, **given)


@pytest.fixture(scope="module", params=[None, 4], ids=["full", "blocks"])
def drawn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trainer and a round of its slices."""
    settings = {"writing": {"block_length": 4}} if request.param is None else {"block_size": request.param}
    t = trainer(tmp_path_factory.mktemp("rl"), is_even, keep_low=0.0, keep_high=1.0, **settings)
    t.sync_engine()
    return t, t.draw(runs.examples(t, 4))["main"]


def logps(t: Any, text: Any) -> Tensor:
    """Of the rows, by the streaming head on the noised views."""
    from llmdistill.models.heads import head_of
    from llmdistill.models.passes import metrics_at_head
    from llmdistill.objectives.rows import TokenRows
    from llmdistill.texts.batches import Passes

    batches = ((part, TokenRows(part.token_rows())) for part in Passes(16).of(text.rollout, "cpu"))

    def of(logits: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        return {"lp": -token_ce(without_mask_token(logits, t.denoiser.mask_token_id), tokens)}

    return metrics_at_head(t.model, head_of(t.model), batches, of, chunk_tokens=64)["lp"]


def test_slices_are_the_states_that_the_sampler_drew_in(drawn: Any) -> None:
    """Row 21 through the trainer: the student's log-probs on its slices are those that the sampler recorded, with
    canvases of full attention whose later blocks are masked, and with blocks behind the clean text."""
    t, text = drawn
    assert "stop" in text.rollout.finish and "length" in text.rollout.finish
    source = t.method.texts["main"]
    t.rollout_engine.sync(t.model, 0)
    written = t._student_samples(runs.examples(t, 4), t._sampling(0))
    assert written.behavior_logprobs is not None
    recorded = written.behavior_logprobs[written.completion_mask]
    assert text.rollout.num_rows == len(recorded), "every counted token is a row of one slice"
    found = logps(t, text)
    torch.testing.assert_close(found.sort().values, recorded.sort().values, rtol=1e-3, atol=2e-4)
    assert source.numbers()["slices"] > 1


def test_rows_weigh_their_sequences_advantage(drawn: Any) -> None:
    """Within a prompt's samples, sums of rewards' z-scores are 0, and what was cut off counts as wrong."""
    _, text = drawn
    noise = text.rollout.noise
    rows = text.rollout.completion_mask
    cut = torch.tensor([f == "length" for f in text.rollout.finish])
    assert float(noise.weight[rows].abs().sum()) > 0 and float(noise.weight[~rows].abs().sum()) == 0
    assert bool((noise.weight[cut][rows[cut]] <= 0).all()) and bool((noise.weight[~cut][rows[~cut]] > 0).any())


def test_what_was_never_written_is_masked_and_nothing_else() -> None:
    from llmdistill.texts.rollout import collate

    made = collate([[5, 6]], [[7, 8, 9, 0, 0]], pad_id=0)
    steps = torch.tensor([[NEVER, NEVER, 1, 0, 2, NEVER, NEVER]])
    from dataclasses import replace

    assert unwritten(replace(made, step_map=steps)).tolist() == [[False] * 5 + [True] * 2]


@pytest.mark.parametrize("slicing", ["random", "coupled", "full"])
def test_baselines_are_in_the_same_loop(slicing: str, tmp_path: Path) -> None:
    """Slices of states that were not visited; what stands behind an end is masked in them."""
    t = trainer(tmp_path, slicing=slicing, keep_low=0.0, keep_high=1.0, max_steps=1, **_share(slicing))
    t.sync_engine()
    text = t.draw(runs.examples(t, 2))["main"]
    noise, rows = text.rollout.noise, text.rollout.completion_mask
    assert len(text) == 16 * {"random": 1, "coupled": 3, "full": 1}[slicing]
    assert not bool((rows & ~noise.masked).any())
    if slicing == "full":
        prompt = noise.masked[:, : len(text.prompts[0].ids)]
        assert 0 < int(prompt.sum()) < prompt.numel(), "a share of the prompt"
        assert not bool(rows[:, : len(text.prompts[0].ids)].any())
    if slicing == "coupled":
        tokens = rows.view(16, 3, -1)
        assert torch.equal(tokens[:, 1] ^ tokens[:, 2], tokens[:, 0])
    t.train()
    assert t.state.global_step == 1


def _share(slicing: str) -> dict[str, float]:
    return {"prompt_share": 0.3} if slicing == "full" else {}


def test_groups_that_say_nothing_leave_the_weights_alone(tmp_path: Path) -> None:
    """All rewards equal: no group is kept, no row is made, and a step moves nothing."""
    t = trainer(tmp_path, lambda prompts, completions, **_: [0.0] * len(completions), max_steps=2, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in t.model.named_parameters()}
    t.train()
    assert all(torch.equal(before[name], p) for name, p in t.model.named_parameters())
    assert t.state.global_step == 2


@pytest.mark.slow
def test_a_reward_is_learned_with_and_without_values(tmp_path: Path) -> None:
    """Short completions are worth 1: their share rises from two thirds to nearly all (seeds fixed)."""
    for number, settings in enumerate(({}, {"value": True, "shrink": 2})):
        t = trainer(tmp_path / str(number), max_steps=10, learning_rate=1e-3, keep_low=0.05, keep_high=0.95, **settings)
        t.train()
        right = [line["rollout/right"] for line in t.state.log_history if "rollout/right" in line]
        assert sum(right[-5:]) / 5 > 0.9 > sum(right[:2]) / 2 + 0.1, right
        if number:
            assert float(t.helpers["value"].head.weight.detach().abs().sum()) > 0
            assert not any("distillation_helpers" in name for name in saved(t, tmp_path))


def saved(t: Any, folder: Path) -> list[str]:
    from safetensors.torch import load_file

    t.save_model(str(folder / "student"))
    return list(load_file(folder / "student/model.safetensors"))


def test_values_and_rewards_of_steps_become_advantages_of_tokens(tmp_path: Path) -> None:
    """A value head from zero: advantages are z-scores; with a reward for each token, those to come by steps too."""
    plain, stepwise = (
        trainer(tmp_path / name, value=True, keep_low=0.0, keep_high=1.0, process_reward=reward)
        for name, reward in (("a", None), ("b", lambda p, c, tokens, **_: [[0.5] * n for n in tokens]))
    )
    texts = []
    for t in (plain, stepwise):
        t.sync_engine()
        texts.append(t.draw(runs.examples(t, 2)))
    for one in texts:
        torch.testing.assert_close(
            one["main"].rollout.noise.weight, one["values"].rollout.noise.weight, rtol=0, atol=1e-6
        )
    weights = [one["main"].rollout.noise.weight for one in texts]
    rows = texts[0]["main"].rollout.completion_mask
    more = (weights[1] - weights[0])[rows]
    assert bool((more > 0.49).all()) and float(more.max()) > 1.0, "half a point for every step that was still to come"
    with pytest.raises(UserError, match="one number for each token"):
        t = trainer(tmp_path / "c", value=True, process_reward=lambda p, c, **_: [[0.5]] * len(c))
        t.sync_engine()
        t.draw(runs.examples(t, 2))


def test_several_updates_are_on_one_text_with_a_clipped_ratio(tmp_path: Path) -> None:
    """The first has ratio 1: its gradient is that of one update a text. The second is on the same slices; where the
    student has moved, its loss is the clipped surrogate and the KL of :mod:`~llmdistill.diffusion.policy`."""
    from llmdistill.diffusion import policy

    settings: dict[str, Any] = {"keep_low": 0.0, "keep_high": 1.0}
    once, several = (trainer(tmp_path / str(n), is_even, updates=n, **settings) for n in (1, 3))
    texts = []
    for t in (once, several):
        t.sync_engine()
        texts.append(t.draw(runs.examples(t, 4)))
    runs.gradients(once, 1, texts[0])
    runs.gradients(several, 1, texts[1])
    for a, b in zip(once.model.parameters(), several.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    several.state.global_step = 1
    again = several.draw(runs.examples(several, 4))["main"]
    assert torch.equal(again.rollout.input_ids, texts[1]["main"].rollout.input_ids)
    with torch.no_grad():
        for parameter in several.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    rows = again.rollout.completion_mask
    old, weight, now = again.rollout.behavior_logprobs[rows], again.rollout.noise.weight[rows], logps(several, again)
    assert float((now - old).abs().max()) > 0.3, "some ratios are clipped"
    expected = -policy.clipped_surrogate(now, old, weight).mean()
    several.model.eval()
    found = sum(several.compute_loss(several.model, {"micro_batch": b}) for b in several.batches({"main": again}, 2))
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.slow
def test_a_run_that_is_resumed_between_updates_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    """Step 3 of 4, with 3 updates a text: what is held is in the checkpoint."""
    settings: dict[str, Any] = {"updates": 3, "max_steps": 4, "beta": 0.05, "reward": is_even}
    whole = trainer(tmp_path / "a", save_strategy="steps", save_steps=2, **settings)
    whole.train()
    resumed = trainer(tmp_path / "b", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    pairs = zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"beta": 0.1}, "the KL is 0"),
        ({"value": True, "updates": 2}, "values are of fresh text"),
        ({"samples": 1}, "samples_per_prompt is 1"),
        ({"keep_low": 0.9}, "no group is kept"),
        ({"slicing": "full", "value": True}, "values and rewards of steps"),
        ({"reward": None}, "nothing else says what a completion is worth"),
    ],
)
def test_what_cannot_be_reinforced_is_refused(settings: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, **settings)


def test_rewards_are_those_of_the_text_up_to_its_end(tmp_path: Path) -> None:
    seen: list[str] = []

    def noted(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        seen.extend(completions)
        return has_letter(prompts, completions)

    t = trainer(tmp_path, noted)
    t.sync_engine()
    t.draw(runs.examples(t, 2))
    written = t._student_samples(runs.examples(t, 2), t._sampling(0))
    lengths = [sum(1 for i in ids[mask].tolist() if i > 3) for ids, mask in zip(*parts(written), strict=True)]
    assert len(seen) == 16 and min(map(len, seen)) < 8
    assert all(len(text) <= n for text, n in zip(seen, lengths, strict=True))


def parts(rollout: Any) -> tuple[Tensor, Tensor]:
    return rollout.input_ids, rollout.completion_mask


def test_settings_are_rollouts_and_writing() -> None:
    args = DiffusionRLConfig(output_dir="run", rollouts=RolloutConfig(samples_per_prompt=4, max_new_tokens=8))
    assert args.whole_blocks and args.stage == "rl"
