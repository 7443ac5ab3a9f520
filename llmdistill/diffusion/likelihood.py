"""How likely a text is under a masked diffusion model: the evidence bound, in three forms of equal expectation.

    -log p(x) <= E_t[w(t) sum_masked CE] = E_l E_{|S| = l}[(L / l) sum_S CE] = E_order[sum_k -log D(x_k | x_<k)]

t uniform on (0, 1), l uniform on 1..L, S a uniform subset of that size (LLaDA, arXiv 2502.09992, appendix A; Ou et al.,
arXiv 2406.03736). The middle one, the count form, is the default: it draws how many tokens are masked in place of how
many may be, and has a small part of the variance. The bound is tight where the denoiser is exact; else it is Jensen's
against the mixture over orders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmdistill.diffusion.losses import token_ce
from llmdistill.diffusion.mask_token import check_no_mask
from llmdistill.diffusion.masking import check_maskable, corrupt, count_masks
from llmdistill.diffusion.schedules import linear, sample_times
from llmdistill.errors import UserError

Model = Callable[..., Tensor]  # ids [B, L], attention_mask=[B, L] -> logits [B, L, V]; has mask_token_id


@dataclass(frozen=True)
class Bound:
    """An estimated bound on -log p(x) in nats, and its standard error, [B] each; and the tokens it is a sum over."""

    nats: Tensor
    error: Tensor
    tokens: Tensor


@torch.no_grad()
def elbo(
    model: Any,
    ids: Tensor,
    maskable: Tensor | None = None,
    *,
    n: int = 128,
    estimator: str = "count",
    attention_mask: Tensor | None = None,
    batch_size: int = 32,
    generator: torch.Generator | None = None,
) -> Bound:
    """An upper bound on -log p of the maskable tokens given the others, of every sequence.

    Args:
        model: a :class:`~llmdistill.diffusion.backbone.MaskedDiffusionLM`, or what is called like one.
        ids: [B, L] clean. maskable: [B, L] bool: what the likelihood is of; all that is not padding.
        n: masks drawn per sequence; 1 is enough, and taken, where one token is maskable.
        estimator: ``count``: one mask for each of n stratified counts; with n a multiple of the maskable tokens every
            count comes equally often. ``time``: n times on (0, 1], antithetic.
        attention_mask: [B, L], 0 on padding.

    Raises:
        UserError: no maskable token, a mask token in clean text, n < 1, an unknown estimator.
    """
    if n < 1:
        raise UserError(f"n is {n}; a bound is a mean over at least 1 mask. Fix: 128.")
    if estimator not in ("count", "time"):
        raise UserError(f"estimator is {estimator!r}; there are count and time. Fix: count.")
    attention_mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    maskable = attention_mask.bool() if maskable is None else maskable & attention_mask.bool()
    check_maskable(maskable)
    check_no_mask(ids, model.mask_token_id, attention_mask)
    draw = _by_count if estimator == "count" else _by_time
    nats, errors = [], []
    for row in range(len(ids)):
        number = n if int(maskable[row].sum()) > 1 else 1
        values = []
        masked, weight = draw(maskable[row], number, generator)
        for start in range(0, number, batch_size):
            part = slice(start, min(start + batch_size, number))
            clean = ids[row].expand(part.stop - part.start, -1)
            noisy = clean.masked_fill(masked[part], model.mask_token_id)
            mask = attention_mask[row].expand(part.stop - part.start, -1)
            ce = token_ce(model(noisy, attention_mask=mask), clean).masked_fill(~masked[part], 0.0)
            values.append(ce.double().sum(-1) * weight[part])
        drawn = torch.cat(values)
        nats.append(drawn.mean())
        errors.append(drawn.std() / math.sqrt(number) if number > 1 else drawn.new_zeros(()))
    return Bound(torch.stack(nats), torch.stack(errors), maskable.sum(-1))


def loglikelihood(model: Any, prompt: Tensor, answer: Tensor, **options: Any) -> tuple[float, float]:
    """A lower bound on log p(answer | prompt) in nats and its standard error, of ids [P] and [A]. The prompt is never
    masked. ``options`` as :func:`elbo`'s."""
    ids = torch.cat([prompt, answer]).unsqueeze(0)
    maskable = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0) >= len(prompt)
    bound = elbo(model, ids, maskable, **options)
    return -float(bound.nats[0]), float(bound.error[0])


@dataclass(frozen=True)
class Perplexity:
    """exp of the bound per token over a data set; and beside it the entropy of what the model writes, which a bound
    alone does not show: text that repeats itself is cheap."""

    perplexity: float
    error: float  # standard error of the bound, in nats per token
    tokens: int
    sample_entropy: float | None


def perplexity(model: Any, sequences: Iterable[Tensor], samples: Tensor | None = None, **options: Any) -> Perplexity:
    """Of sequences of ids [L], each a text of its own; ``samples`` [B, L] are of the model, for their entropy."""
    nats = variance = tokens = 0.0
    for ids in sequences:
        bound = elbo(model, ids.unsqueeze(0), **options)
        nats, tokens = nats + float(bound.nats[0]), tokens + int(bound.tokens[0])
        variance += float(bound.error[0]) ** 2
    if not tokens:
        raise UserError("a perplexity was asked of no sequences. Fix: a data set with at least one text.")
    entropy = None if samples is None else float(sample_entropy(samples).mean())
    return Perplexity(math.exp(nats / tokens), math.sqrt(variance) / tokens, int(tokens), entropy)


def sample_entropy(ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Entropy in nats of the tokens' frequencies within each sequence [B, L] -> [B] (MDLM's measure beside generative
    perplexity, arXiv 2409.02908)."""
    entropies = []
    for row, sequence in enumerate(ids):
        tokens = sequence if mask is None else sequence[mask[row]]
        shares = torch.unique(tokens, return_counts=True)[1].double() / max(tokens.numel(), 1)
        entropies.append(-(shares * shares.log()).sum())
    return torch.stack(entropies)


@torch.no_grad()
def exact_bound(model: Any, ids: Tensor, maskable: Tensor | None = None) -> Tensor:
    """The bound of one sequence [L] without sampling, by all 2^L masks.

    Raises:
        UserError: more than 12 maskable tokens.
    """
    maskable = torch.ones_like(ids, dtype=torch.bool) if maskable is None else maskable
    where = maskable.nonzero().flatten()
    if not 1 <= len(where) <= 12:
        raise UserError(f"{len(where)} tokens are maskable; all masks are enumerated for 1 to 12. Fix: elbo.")
    subsets = torch.arange(1, 1 << len(where), device=ids.device).unsqueeze(-1) >> torch.arange(
        len(where), device=ids.device
    )
    masked = torch.zeros(len(subsets), len(ids), dtype=torch.bool, device=ids.device)
    masked[:, where] = (subsets & 1).bool()
    clean = ids.expand(len(subsets), -1)
    ce = token_ce(model(clean.masked_fill(masked, model.mask_token_id)), clean).masked_fill(~masked, 0.0)
    counts = masked.sum(-1)
    subsets_of_count = torch.tensor([math.comb(len(where), int(c)) for c in counts], device=ids.device)
    return (ce.double().sum(-1) / counts / subsets_of_count).sum()


def _by_count(maskable: Tensor, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """n masks [n, L] of stratified counts, and L / l [n]: LLaDA's l_j = k + j L / n wrapped into 1..L, k uniform."""
    length, device = int(maskable.sum()), maskable.device
    k = torch.rand((), dtype=torch.float64, generator=generator, device=device) * length
    steps = torch.arange(n, dtype=torch.float64, device=device) * length / n
    counts = ((k + steps) % length).floor().long() + 1
    u = torch.rand(n, len(maskable), dtype=torch.float64, generator=generator, device=device)
    return count_masks(maskable.expand(n, -1), counts, u), length / counts.double()


def _by_time(maskable: Tensor, n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """n masks [n, L] at times of the linear schedule on (0, 1], and 1 / t [n]."""
    times = sample_times((n, 1), low=1e-9, antithetic=n > 1, generator=generator, device=maskable.device)
    u = torch.rand(n, len(maskable), dtype=torch.float64, generator=generator, device=maskable.device)
    allowed = maskable.expand(n, -1)
    _, masked = corrupt(torch.zeros_like(u, dtype=torch.long), allowed, linear.alpha(times), 1, u)
    return masked, linear.weight(times).squeeze(-1)
