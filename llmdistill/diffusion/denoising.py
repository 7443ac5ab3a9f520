"""The training loss of a masked diffusion model on clean text: full attention, blocks, and causal models on their way.

One time a sequence, or one a block: a block then reads the clean text of those before it, in one pass over
[clean | noisy]. The bound is ``weighting: elbo``; ``uniform`` drops its 1/t, ``cart`` is Dream's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmdistill.diffusion import attention
from llmdistill.diffusion.backbone import MaskedDiffusionLM
from llmdistill.diffusion.losses import cart_weight, token_ce, weighted_nll
from llmdistill.diffusion.mask_token import check_no_mask
from llmdistill.diffusion.masking import check_maskable, corrupt, times_of_blocks
from llmdistill.diffusion.schedules import EPS, sample_times, schedule
from llmdistill.errors import UserError
from llmdistill.recipe.settings import check_settings, setting


@dataclass(frozen=True)
class DenoisingConfig:
    """Settings of :func:`denoising_loss`."""

    schedule: str = setting("linear", "of the masked share: a schedule of diffusion.schedules")
    weighting: str = setting("elbo", "elbo (-alpha' / (1 - alpha)), uniform, or cart")
    norm: str = setting("token", "token, sequence, batch or masked: see losses.weighted_nll")
    low: float = setting(EPS, "least time; with high the clipped schedule of BD3-LM", above=0, below=1)
    high: float = setting(1.0, "largest time", above=0, at_most=1)
    antithetic: bool = setting(True, "times of a batch cover the interval")
    anneal_steps: int = setting(0, "steps over which attention turns from causal to full; 0: full at once", at_least=0)


@dataclass(frozen=True)
class Denoised:
    """The loss with its gradient, and what it is made of, [B, L] each."""

    loss: Tensor
    ce: Tensor
    masked: Tensor


def denoising_loss(
    model: MaskedDiffusionLM,
    ids: Tensor,
    maskable: Tensor,
    attention_mask: Tensor | None = None,
    config: DenoisingConfig | None = None,
    *,
    step: int = 0,
    prompt_lengths: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Denoised:
    """Noises the maskable tokens of clean text and asks the model for them.

    Args:
        ids: [B, L]. maskable: [B, L] bool: completions; a prompt and padding never.
        attention_mask: [B, L], 0 on padding.
        step: of training, for ``anneal_steps``.
        prompt_lengths: [B], of block models: the prompt is then a block of its own, as it is when they write.

    Raises:
        UserError: a sequence without a maskable token, mask tokens in clean text, settings out of range.
    """
    config = config or DenoisingConfig()
    check_settings(config, "diffusion")
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    maskable = maskable & mask.bool()
    if model.shift:  # nothing predicts the first token
        maskable = maskable & (mask.long().cumsum(-1) > 1)
    check_maskable(maskable)
    check_no_mask(ids, model.mask_token_id, mask)
    alphas, options = schedule(config.schedule), {"generator": generator, "device": ids.device}
    blocks = None if model.block_size is None else attention.block_ids(mask, model.block_size, prompt_lengths)
    times = _times(config, ids, blocks, options)
    u = torch.rand(ids.shape, dtype=torch.float64, generator=generator, device=ids.device)
    noisy, masked = corrupt(ids, maskable, alphas.alpha(times), model.mask_token_id, u)
    logits = _logits(model, ids, noisy, mask, blocks, config, step, options)
    ce = token_ce(logits, ids).masked_fill(~masked, 0.0)
    loss = weighted_nll(ce, _weight(config, alphas.weight(times), masked).to(ce.dtype), masked, maskable, config.norm)
    return Denoised(loss, ce.detach(), masked)


def _times(config: DenoisingConfig, ids: Tensor, blocks: Tensor | None, options: dict) -> Tensor:
    """[B, 1], or [B, L] with one time for each block."""
    drawn = {"low": config.low, "high": config.high, "antithetic": config.antithetic, **options}
    if blocks is None:
        return sample_times((len(ids), 1), **drawn)
    number = int(blocks.max()) + 1
    return times_of_blocks(sample_times((len(ids), number), **drawn), number, 1).gather(-1, blocks.clamp_min(0))


def _weight(config: DenoisingConfig, elbo: Tensor, masked: Tensor) -> Tensor:
    if config.weighting == "elbo":
        return elbo
    if config.weighting == "uniform":
        return torch.ones_like(elbo)
    if config.weighting == "cart":
        return cart_weight(masked)
    raise UserError(f"diffusion.weighting is {config.weighting!r}; there are elbo, uniform, cart. Fix: elbo.")


def _logits(
    model: MaskedDiffusionLM,
    ids: Tensor,
    noisy: Tensor,
    mask: Tensor,
    blocks: Tensor | None,
    config: DenoisingConfig,
    step: int,
    options: dict,
) -> Tensor:
    if blocks is not None:
        return of_noisy_copy(model, ids, noisy, mask, blocks)
    if step + 1 < config.anneal_steps:
        u = torch.rand(ids.shape[1], ids.shape[1], **options)
        allowed = attention.annealed(ids.shape[1], (step + 1) / config.anneal_steps, u)
        bias = attention.additive(allowed & attention.full(mask))
        return model(noisy, attention_mask=mask, bias=bias)  # type: ignore[no-any-return]
    return model(noisy, attention_mask=mask)  # type: ignore[no-any-return]


def of_noisy_copy(model: MaskedDiffusionLM, clean: Tensor, noisy: Tensor, mask: Tensor, blocks: Tensor) -> Tensor:
    """Logits [B, L, V] of every noisy block behind the clean text of those before it, in one pass.

    A shifted model's logits of the first token of a block are those of the clean copy's token before it.
    """
    length = clean.shape[1]
    positions = (mask.long().cumsum(-1) - 1).clamp_min(0).repeat(1, 2)
    bias = attention.additive(attention.noisy_and_clean(blocks))
    both = torch.cat([clean, noisy], 1)
    if not model.shift:
        return model(both, position_ids=positions, bias=bias)[:, length:]  # type: ignore[no-any-return]
    logits = model.unshifted(both, None, positions, bias)
    before_clean = torch.cat([logits[:, :1], logits[:, : length - 1]], 1)
    before_noisy = torch.cat([logits[:, length : length + 1], logits[:, length:-1]], 1)
    begins = torch.cat([torch.ones_like(blocks[:, :1]).bool(), blocks[:, 1:] != blocks[:, :-1]], 1)
    chosen = torch.where(begins.unsqueeze(-1), before_clean, before_noisy).float()
    column = torch.arange(chosen.shape[-1], device=chosen.device) == model.mask_token_id
    return chosen.masked_fill(column, -torch.inf)
