"""Slices and losses of reinforcement against the official functions, and what they are by construction."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmdistill.diffusion import policy
from llmdistill.diffusion.attention import block_ids
from llmdistill.diffusion.backbone import MaskedDiffusionLM
from llmdistill.diffusion.generation_config import DiffusionGenerationConfig
from llmdistill.diffusion.losses import token_ce
from llmdistill.diffusion.sampling import generate
from llmdistill.diffusion.slicing import NEVER, coupled_slices, full_slices, random_slices, shrink, trace_slices
from llmdistill.diffusion.value import DiffusionValue
from llmdistill.errors import UserError

from .exact import golden
from .test_backbone import MASK, made

SLICING, LOSS = golden("tracerl_slicing"), golden("tracerl_loss")


def test_steps_shrink_as_tracerls_do() -> None:
    for case in SLICING["expected"]["shrink"]:
        assert shrink(torch.tensor([case["step_map"]]), case["k"]).tolist() == [case["out"]]
    with pytest.raises(UserError, match="diffusion.shrink is 0"):
        shrink(torch.tensor([[0]]), 0)


@pytest.mark.parametrize("case", SLICING["expected"]["block_slices"], ids=lambda c: f"{c['step_map']}-{c['shrink']}")
def test_block_slices_are_tracerls(case: dict) -> None:
    inputs = SLICING["inputs"]
    steps = torch.tensor([case["step_map"]])
    blocks = torch.arange(inputs["L1"]).div(inputs["block_size"], rounding_mode="floor").unsqueeze(0)
    assert shrink(steps, case["shrink"], blocks).tolist() == [case["shrunk"]]
    slices = trace_slices(steps, torch.ones_like(steps).bool(), shrink_by=case["shrink"], blocks=blocks)
    clean = torch.tensor(inputs["input_ids"][inputs["L0"] :])
    assert len(slices) == len(case["rows"])
    for masked, target, row in zip(slices.masked, slices.target, case["rows"], strict=True):
        assert clean.masked_fill(masked, inputs["mask_id"]).tolist() == row["extended_input_ids"][-inputs["L1"] :]
        assert target.int().tolist() == row["p_mask"][inputs["L0"] :]


def test_block_attention_of_prompt_clean_and_noisy_is_tracerls() -> None:
    """The prompt as a block of its own; its noisy copy, which ours does not have, was never asked about."""
    from llmdistill.diffusion.attention import noisy_and_clean

    inputs = SLICING["inputs"]
    length = inputs["L0"] + inputs["L1"]
    blocks = block_ids(torch.ones(1, length), inputs["block_size"], torch.tensor([inputs["L0"]]))
    allowed = noisy_and_clean(blocks, torch.arange(inputs["L0"], length))[0]
    assert allowed.int().tolist() == SLICING["expected"]["block_attention_mask"]


@pytest.mark.parametrize("case", SLICING["expected"]["full_slices"], ids=lambda c: str(c["post_num"]))
def test_slices_of_full_attention_are_tracerls(case: dict) -> None:
    inputs = SLICING["inputs"]["full"]
    clean, start = torch.tensor([inputs["input_ids"]]), inputs["start_pos"]
    steps = torch.full_like(clean, NEVER)
    steps[0, start:] = torch.tensor(case["step_map"])
    padding = clean == inputs["pad_id"]
    valid = ~(padding & (padding.cumsum(-1) > case["post_num"])) & (steps != NEVER)
    slices = trace_slices(steps, valid, shrink_by=case["shrink"])
    mask_id = SLICING["inputs"]["mask_id"]
    assert slices.of_sequences(clean).masked_fill(slices.masked, mask_id).tolist() == case["noisy"]
    assert slices.target.int().tolist() == case["p_mask"]


@pytest.mark.parametrize("case", LOSS["expected"], ids=lambda c: f"{c['beta']}-{c['use_kl_estimator_k3']}")
def test_losses_are_tracerls(case: dict) -> None:
    inputs = LOSS["inputs"]
    start, kl = inputs["L0"], "k3" if case["use_kl_estimator_k3"] else "k1"
    extended, text, old, per_token = (
        torch.tensor(inputs[k], dtype=torch.float64)
        for k in ("logits_extended", "logits_text", "old_logp", "token_advantages")
    )
    labels, target = torch.tensor(inputs["labels"]), torch.tensor(inputs["p_mask"])
    advantages = torch.tensor(inputs["advantages"], dtype=torch.float64).unsqueeze(-1)
    options: dict[str, Any] = {"beta": case["beta"], "kl": kl, "eps": inputs["eps"]}
    noisy = extended[:, start + inputs["L1"] :]
    logps = -token_ce(noisy, labels[:, start:])
    response = (old[:, start:], advantages, target[:, start:])
    block = policy.policy_loss(logps, *response, norm="length", **options)
    assert float(block) == pytest.approx(case["block_loss"], abs=1e-6)
    tokens = policy.policy_loss(logps, response[0], per_token[:, start:], response[2], norm="length", **options)
    assert float(tokens) == pytest.approx(case["block_loss_token_advantages"], abs=1e-6)
    full = policy.policy_loss(-token_ce(text, labels), old, advantages, target, norm="targets", **options)
    assert float(full) == pytest.approx(case["full_attention_loss"], abs=1e-6)


def rollout(model: MaskedDiffusionLM) -> Any:
    prompt = torch.randint(60, (3, 4), generator=torch.Generator().manual_seed(0))
    config = DiffusionGenerationConfig(max_new_tokens=8, denoising_steps=4)
    return generate(model, prompt, config=config, generator=torch.Generator().manual_seed(1))


def test_every_token_is_the_target_of_one_slice_of_the_state_it_was_drawn_in() -> None:
    """Row 21: with shrink 1 the log-probs of slices are those that the sampler drew with, so the ratio is 1."""
    model = MaskedDiffusionLM(made("llama"), MASK)
    out = rollout(model)
    slices = trace_slices(out.step_map, out.completion_mask)
    assert len(slices) == 12
    counts = torch.zeros_like(out.step_map).index_add(0, slices.row, slices.target.long())
    assert torch.equal(counts, out.completion_mask.long())
    noisy = slices.of_sequences(out.sequences).masked_fill(slices.masked, MASK)
    logps = -token_ce(model(noisy), slices.of_sequences(out.sequences))
    old = slices.of_sequences(out.logps)
    torch.testing.assert_close(logps[slices.target], old[slices.target], rtol=1e-4, atol=1e-5)


def test_the_first_update_is_reinforce_on_the_slices() -> None:
    """Row 21: gradient of the surrogate at ratio 1 against that of minus A log p."""
    model = MaskedDiffusionLM(made("llama"), MASK)
    out = rollout(model)
    slices = trace_slices(out.step_map, out.completion_mask)
    ids, advantages = slices.of_sequences(out.sequences), slices.of_sequences(torch.tensor([[1.0], [-0.5], [0.25]]))
    weight = model.model.get_input_embeddings().weight

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, weight)[0]

    def logps() -> torch.Tensor:
        return -token_ce(model(ids.masked_fill(slices.masked, MASK)), ids)

    now = logps()
    surrogate = gradient(policy.policy_loss(now, now.detach(), advantages, slices.target, norm="length"))
    summed = torch.where(slices.target, logps() * advantages, 0.0).sum(-1).mean() / ids.shape[1]
    torch.testing.assert_close(surrogate, gradient(-summed), rtol=1e-4, atol=1e-7)


def test_baselines_ask_about_completions_only_and_coupled_parts_are_complementary() -> None:
    """Coupled-GRPO's mean weight of a token is (1 + t / t + (1 - t) / (1 - t)) / 2, whatever t: here exactly, with u on
    a grid of 100 cells."""
    valid = torch.tensor([False, True, True]).repeat(100, 1)
    u = ((torch.arange(100) + 0.5) / 100).unsqueeze(-1).expand(-1, 3)
    for u_time in (0.0, 0.5, 1.0):
        slices = coupled_slices(valid, u, torch.full((100,), u_time))
        mean = torch.zeros(100, 3).index_add(0, slices.row, slices.weight).mean(0)
        torch.testing.assert_close(mean, torch.tensor([0.0, 1.5, 1.5]), rtol=1e-5, atol=0)
        parts = slices.target.view(100, 3, 3)
        assert torch.equal(parts[:, 1] ^ parts[:, 2], valid) and torch.equal(parts[:, 0], valid)
    assert torch.equal(full_slices(valid).masked, valid)
    masked = random_slices(valid, u, torch.ones(100)).masked
    assert masked[:, 0].sum() == 0 and masked[:, 1].sum() == 90


def test_returns_by_steps_are_the_reward_to_come() -> None:
    """Row 20: gamma = lambda = 1: R = reward, A = R - V; lambda 0: A = r - V + V of the next step."""
    steps = torch.tensor([[NEVER, 2, 0, 1, 0]])
    valid = steps != NEVER
    rewards = policy.last_step_rewards(steps, valid, torch.tensor([0.7]))
    assert rewards.tolist() == [[0.0, pytest.approx(0.7), 0.0, 0.0, 0.0]]
    values = torch.tensor([[9.0, 0.1, 0.2, 0.3, 0.6]])
    returns, advantages = policy.step_gae(steps, rewards, values)
    torch.testing.assert_close(returns[valid], torch.full((4,), 0.7))
    torch.testing.assert_close(advantages[valid], (0.7 - values)[valid])
    _, advantages = policy.step_gae(steps, rewards, values, lam=0.0)
    expected = torch.tensor([[0.0, 0.7 - 0.1, 0.3 - 0.2, 0.1 - 0.3, 0.3 - 0.6]])
    torch.testing.assert_close(advantages, expected)


def test_groups_are_scored_and_filtered_and_what_was_cut_off_is_wrong() -> None:
    rewards = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    finished = torch.tensor([[True, True, True, True], [True, False, True, True]])
    advantages, kept = policy.group_advantages(rewards, finished)
    assert advantages[0].tolist() == [1, 1, -1, -1] and kept.tolist() == [True, True]
    assert float(advantages[1, 1]) == pytest.approx(-(3**0.5))
    same, kept = policy.group_advantages(rewards[1:], torch.ones(1, 4).bool())
    assert same.tolist() == [[0.0] * 4] and kept.tolist() == [False]


def test_a_value_model_begins_at_zero_and_its_loss_is_clipped() -> None:
    value = DiffusionValue(MaskedDiffusionLM(made("llama"), MASK))
    found = value(torch.arange(6).unsqueeze(0))
    assert found.shape == (1, 6) and float(found.detach().abs().sum()) == 0
    found.sum().backward()
    assert float(value.head.weight.grad.abs().sum()) > 0
    loss = policy.clipped_value_loss(torch.tensor(1.0), torch.tensor(0.0), torch.tensor(1.0))
    assert float(loss) == pytest.approx(0.5 * 0.8**2), "the step beyond the clip is not rewarded"


def test_unknown_kinds_are_refused() -> None:
    x, target = torch.zeros(1, 2), torch.ones(1, 2).bool()
    with pytest.raises(UserError, match="diffusion.kl is 'k2'"):
        policy.kl_estimate(x, x, "k2")
    with pytest.raises(UserError, match="diffusion.policy_norm"):
        policy.policy_loss(x, x, x, target, norm="token")


def test_a_sequence_without_a_valid_token_has_no_slice() -> None:
    steps = torch.full((2, 3), NEVER)
    slices = trace_slices(steps, torch.ones(2, 3).bool())
    assert len(slices) == 0 and slices.masked.shape == (0, 3)
