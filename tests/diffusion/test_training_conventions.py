"""Schedules, masks, weights and normalisers agree with the official code of those who defined them."""

from __future__ import annotations

import math

import pytest
import torch

from llmdistill.diffusion import losses, masking, schedules
from llmdistill.diffusion.attention import additive, annealed, block_ids, noisy_and_clean
from llmdistill.errors import UserError

from .exact import golden

LLADA = golden("llada_loss")
ADAPTATION = golden("ar_adaptation")
COUPLING = golden("mcd_coupling")
BLOCKS = golden("bd3lm_loss_and_mask")


def tensors(inputs: dict, *names: str) -> list[torch.Tensor]:
    found = [torch.tensor(inputs[name]) for name in names]
    return [
        torch.tensor(inputs[name], dtype=torch.float64) if x.is_floating_point() else x
        for name, x in zip(names, found, strict=True)
    ]


@pytest.mark.parametrize(
    "case", golden("dllm_mdlm_loss")["expected"], ids=lambda c: "-".join(map(str, list(c.values())[:4]))
)
def test_loss_is_dllms_under_every_schedule_norm_weight_and_shift(case: dict) -> None:
    inputs = golden("dllm_mdlm_loss")["inputs"]
    ids, labels, logits, u_t, u = tensors(inputs, "input_ids", "labels", "logits", "u_t", "u_mask")
    schedule, maskable = schedules.schedule(case["scheduler"]), labels != -100
    t = 1e-3 + (1 - 1e-3) * u_t.unsqueeze(-1)
    noisy, masked = masking.corrupt(ids, maskable, schedule.alpha(t), inputs["mask_id"], u)
    assert noisy.tolist() == case["noised_input_ids"]
    weight = schedule.weight(t) if case["loss_weight_type"] == "scheduler" else torch.ones_like(t)
    read = losses.shift_right(logits) if case["right_shift_logits"] else logits
    loss = losses.weighted_nll(losses.token_ce(read, ids), weight, masked, maskable, case["loss_norm_type"])
    # dllm adds 1e-6 to the denominator of the weight and computes alpha in float32
    assert float(loss) == pytest.approx(case["loss"], rel=2e-5)


def test_losses_are_lladas_in_pretraining_and_sft() -> None:
    ids, logits, u_t, u, prompt_lengths = tensors(
        LLADA["inputs"], "input_ids", "logits", "u_t", "u_mask", "prompt_lengths"
    )
    mask_id, t = LLADA["inputs"]["mask_id"], 1e-3 + (1 - 1e-3) * u_t.unsqueeze(-1)
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    noisy, masked = masking.corrupt(ids, everywhere, 1 - t, mask_id, u)
    expected = LLADA["expected"]["pretrain"]
    assert noisy.tolist() == expected["noisy"] and masked.tolist() == expected["masked"]
    ce = losses.token_ce(logits, ids)
    assert float(losses.weighted_nll(ce, 1 / t, masked, everywhere)) == pytest.approx(expected["loss"], abs=1e-9)
    answers = torch.arange(ids.shape[1]) >= prompt_lengths.unsqueeze(-1)
    _, masked = masking.corrupt(ids, answers, 1 - t, mask_id, u)
    assert masked.tolist() == LLADA["expected"]["sft"]["masked"], "a prompt is never masked"
    loss = losses.weighted_nll(ce, 1 / t, masked, answers, "sequence")
    assert float(loss) == pytest.approx(LLADA["expected"]["sft"]["loss"], abs=1e-9)


def test_block_loss_and_mask_are_bd3lms() -> None:
    inputs, expected = BLOCKS["inputs"], BLOCKS["expected"]
    ids, logits, t, mask = tensors(inputs, "input_ids", "logits", "t_per_token", "mask")
    times = masking.times_of_blocks(t[:, :: inputs["block_size"]], ids.shape[1], inputs["block_size"])
    assert times.tolist() == t.tolist(), "one time per block"
    ce = losses.token_ce(losses.without_mask_token(logits, inputs["mask_id"]), ids)
    weighted = (ce * schedules.linear.weight(times)).masked_fill(~mask, 0.0)
    torch.testing.assert_close(weighted, torch.tensor(expected["nll"]).double().abs(), rtol=1e-5, atol=1e-6)
    loss = losses.weighted_nll(ce, 1 / times, mask, torch.ones_like(mask))
    assert float(loss) == pytest.approx(expected["loss_mean"], rel=1e-5)
    for name, rows in expected["attention_masks"].items():  # theirs is [noisy | clean], ours [clean | noisy]
        n, block = (int(part[1:] if part[0] == "n" else part[2:]) for part in name.split("_"))
        allowed = noisy_and_clean(block_ids(torch.ones(1, n), block))[0]
        swapped = torch.cat([allowed[n:], allowed[:n]])
        swapped = torch.cat([swapped[:, n:], swapped[:, :n]], 1)
        assert swapped.int().tolist() == rows, name


def test_adaptation_is_diffullamas_and_cart_is_dreams() -> None:
    inputs, expected = ADAPTATION["inputs"], ADAPTATION["expected"]
    ids, logits, t, mask, u = tensors(inputs, "input_ids", "logits", "t", "mask", "anneal_uniform")
    for ratio, rows in expected["anneal_allowed"].items():
        assert annealed(len(u), float(ratio), u).int().tolist() == rows
    mask[:, 0] = False  # nothing predicts the first token
    ce = losses.token_ce(losses.shift_right(logits), ids)
    loss = losses.weighted_nll(ce, 1 / t.unsqueeze(-1), mask, mask, "masked")
    assert float(loss) == pytest.approx(expected["shift_loss"], rel=1e-6)
    weight = losses.cart_weight(torch.tensor(inputs["mask"]), inputs["cart_p"])
    torch.testing.assert_close(weight, torch.tensor(expected["cart_weight"]))


def test_coupled_masks_are_nested_and_the_gaussian_share_is_right() -> None:
    inputs, expected = COUPLING["inputs"], COUPLING["expected"]
    u, ids = tensors(inputs, "u", "x0")
    keep_t, keep_s = torch.full((2, 1), inputs["alpha_t"]), torch.full((2, 1), inputs["alpha_s"])
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    x_t, x_s, masked_t, masked_s = masking.couple(ids, everywhere, keep_t, keep_s, inputs["mask_id"], u)
    assert x_t.tolist() == expected["x_t"] and x_s.tolist() == expected["x_s"]
    assert not bool((masked_s & ~masked_t).any())
    for vocab, shares in expected["F_Y"].items():
        found = masking.keep_of_ratio(torch.tensor(inputs["y"]), int(vocab))
        torch.testing.assert_close(found, torch.tensor(shares, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_gaussian_latents_and_one_uniform_number_per_token_are_equal_in_law() -> None:
    """Row 8 of the derivation: F_Y(Y) is uniform (Kolmogorov-Smirnov at 1 %: 1.63 / sqrt n), seed fixed."""
    vocab, n = 6, 3000
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n, vocab, generator=generator, dtype=torch.float64)
    ids = torch.randint(vocab, (n,), generator=generator)
    ratio = masking.gaussian_latent(noise, ids)
    uniform = masking.keep_of_ratio(ratio, vocab).sort().values
    steps = torch.arange(1, n + 1) / n
    assert float((uniform - steps).abs().max()) < 1.63 / math.sqrt(n)
    for a in (-0.5, 0.7):  # the token is the arg-max of its latent exactly when a exceeds Y
        shown = (a * torch.nn.functional.one_hot(ids, vocab) + noise).argmax(-1) == ids
        assert torch.equal(shown, ratio < a)


@pytest.mark.parametrize("name", schedules.__all__)
def test_weight_is_the_derivative_over_what_is_masked(name: str) -> None:
    schedule, t = schedules.schedule(name), torch.linspace(0.05, 0.99, 7, dtype=torch.float64).requires_grad_()
    alpha = schedule.alpha(t)
    (slope,) = torch.autograd.grad(alpha.sum(), t)
    torch.testing.assert_close(schedule.weight(t), -slope / (1 - alpha))
    torch.testing.assert_close(schedule.time_of(alpha.detach()), t.detach())
    assert bool((slope < 0).all()) and 0.99 < float(schedule.alpha(torch.tensor(0.0))) <= 1.0011
    assert float(schedule.alpha(torch.tensor(1.0))) < 2e-3


def test_weight_of_the_linear_and_log_linear_schedule_is_one_over_t() -> None:
    t = torch.tensor([1e-3, 0.2, 1.0], dtype=torch.float64)
    for schedule in (schedules.linear, schedules.log_linear):
        torch.testing.assert_close(schedule.weight(t), 1 / t)


def test_times_cover_their_interval_and_others_are_refused() -> None:
    generator = torch.Generator().manual_seed(3)
    times = schedules.sample_times((5, 4), low=0.3, high=0.8, generator=generator)
    strata = ((times.flatten() - 0.3) / 0.5 * 20).floor().long()
    assert sorted(strata.tolist()) == list(range(20)), "antithetic: one in each twentieth"
    for low, high in ((0.0, 1.0), (0.5, 0.5), (0.1, 1.1)):
        with pytest.raises(UserError, match="diffusion.clip"):
            schedules.sample_times((1,), low=low, high=high)


def test_subs_gives_the_mask_no_mass_and_leaves_what_is_there() -> None:
    logits = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0))
    log_probs = losses.subs_log_probs(logits, torch.tensor([[4, 2, 4]]), 4)
    assert bool((log_probs[..., 4] == -torch.inf).all())
    assert log_probs[0, 1].tolist() == [-torch.inf, -torch.inf, 0.0, -torch.inf, -torch.inf]
    torch.testing.assert_close(log_probs[0, 0].exp().sum(), torch.tensor(1.0))


def test_a_bias_is_finite_where_nothing_may_be_seen() -> None:
    bias = additive(torch.zeros(1, 2, 2, dtype=torch.bool))
    assert bias.is_floating_point() and bool(bias.softmax(-1).isfinite().all())


def test_sequences_without_a_maskable_token_and_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="sequence 1 of the batch has no maskable token"):
        masking.check_maskable(torch.tensor([[True, False], [False, False]]))
    with pytest.raises(UserError, match="there are cosine"):
        schedules.schedule("polynomial")
    with pytest.raises(UserError, match="diffusion.norm"):
        losses.weighted_nll(*[torch.ones(1, 1)] * 2, *[torch.ones(1, 1, dtype=torch.bool)] * 2, norm="mean")
