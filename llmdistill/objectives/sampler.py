"""Log-probs of sampled tokens, under the student's softmax and under the sampler that drew them.

A sampler with a temperature, min_p, top_k or top_p draws from another distribution than the student's softmax: from
S_{tau,K}, softmax(z / tau) restricted to a nucleus K and renormalised over it. A policy gradient is unbiased only with
the log-probs of the distribution that drew the tokens. With those of the whole softmax, tokens outside K keep the
gradient S_j E[A] that no sample ever balances, and mass drifts to tokens that cannot be drawn.
"""

import math

import torch
from torch import Tensor

from llmdistill.objectives.fused import check_temperature, compute_dtype

_FIRST_CANDIDATES = 1024


def token_logprobs(logits: Tensor, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[token] -> [...] in float32, for logits [..., V] and token_ids [...]
    int64.

    Gathers before it normalises, so no [..., V] log-softmax is kept. Raises ValueError for temperature <= 0.
    """
    scaled = _scaled(logits, temperature)
    return _gathered(scaled, token_ids) - scaled.logsumexp(-1)


def sampler_logprobs(
    student_logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """log S_{tau,K}(token) -> [...], for logits [..., V] and token_ids [...]; `token_logprobs` at min_p 0, top_k 0,
    top_p 1.

    K is `nucleus` and the token itself, which another engine's rounding may have put just outside. Which tokens belong
    to K carries no gradient: logits outside K get exactly none. Raises ValueError for temperature <= 0, top_k < 0,
    top_p outside (0, 1] or min_p outside [0, 1].
    """
    check_truncation(top_k, top_p, min_p)
    if not (top_k or top_p < 1.0 or min_p):
        return token_logprobs(student_logits, token_ids, temperature)
    scaled = _scaled(student_logits, temperature)
    kept = nucleus(scaled.detach(), top_k=top_k, top_p=top_p, min_p=min_p).scatter(-1, token_ids.unsqueeze(-1), True)
    return _gathered(scaled, token_ids) - scaled.masked_fill(~kept, -torch.inf).logsumexp(-1)


def nucleus(scaled_logits: Tensor, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """Which tokens a sampler may draw -> bool [..., V], from logits [..., V] already divided by its temperature.

    As vLLM does it: tokens with at least min_p of the likeliest one's probability (arXiv 2407.01082), of those
    the top_k likeliest (0: all), and of those, renormalised, the smallest set that reaches top_p. Tokens equal to the
    last one kept are kept too: which of them an engine keeps is chance.
    """
    check_truncation(top_k, top_p, min_p)
    vocab_size = scaled_logits.shape[-1]
    width = min(top_k, vocab_size) if top_k else vocab_size
    kept = torch.ones_like(scaled_logits, dtype=torch.bool)
    if top_k:
        kept = ~(scaled_logits < scaled_logits.topk(width).values[..., -1:])  # NaN is kept: a diverged model must show
    if min_p:
        kept = kept & ~(scaled_logits < scaled_logits.amax(-1, keepdim=True) + math.log(min_p))
    if top_p < 1.0:
        total = scaled_logits.masked_fill(~kept, -torch.inf).logsumexp(-1, keepdim=True)
        kept = kept & ~(scaled_logits < _last_of_mass(scaled_logits, total, top_p, width))
    return kept


def _last_of_mass(scaled_logits: Tensor, total: Tensor, top_p: float, width: int) -> Tensor:
    """The smallest logit of the smallest set that reaches top_p -> [..., 1], among the `width` largest.

    Most sets are small: a thousand candidates first, and all of a large vocabulary only where they do not reach top_p.
    Sorting 150k columns takes ten times as long and more.
    """
    candidates = min(width, _FIRST_CANDIDATES)
    while True:
        ranked = scaled_logits.topk(candidates).values
        probability = (ranked - total).exp()
        mass = probability.cumsum(-1)
        if candidates == width or bool((mass[..., -1] >= top_p).all()):
            return ranked.masked_fill(mass - probability >= top_p, torch.inf).amin(-1, keepdim=True)
        candidates = min(width, 8 * candidates)


def check_truncation(top_k: int, top_p: float, min_p: float = 0.0) -> None:
    """Raises ValueError for top_k < 0, top_p outside (0, 1] or min_p outside [0, 1]."""
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}; it is the number of tokens a sampler may draw, or 0 for all")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p is {top_p}; it is the mass a sampler draws from and must lie in (0, 1]")
    if not 0.0 <= min_p <= 1.0:
        raise ValueError(f"min_p is {min_p}; it is a share of the likeliest token's probability and lies in [0, 1]")


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    check_temperature(temperature)
    scaled = logits.to(compute_dtype(logits))
    return scaled if temperature == 1.0 else scaled / temperature


def _gathered(scaled: Tensor, token_ids: Tensor) -> Tensor:
    return scaled.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
