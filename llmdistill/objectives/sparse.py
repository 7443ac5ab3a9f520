"""Divergences from the teacher's top-k log-probs: the functions of `divergences`, on K listed tokens and a
bucket.

Every function is `fn(student_logits [..., V], topk_ids [..., K], topk_logprobs [..., K], *, temperature=1.0,
tail="bucket", ...) -> [...]`, in nats per token, float32 (float64 student logits stay float64). Parameters
and their meaning are those of `divergences`. topk_ids are distinct within a row, padded with -1;
topk_logprobs, of any float dtype, are log-softmax over the FULL vocabulary at temperature 1.

- tail="bucket": one more bucket on both sides holds the rest of the mass. Coarsening both distributions alike
  leaves a divergence: >= 0, 0 only if the buckets agree, and, for every f-divergence (that is, all but
  `adaptive_kl`, whose weights move), never above the dense value; equal to it at K = V.
- tail="renormalize": both sides renormalised over the listed tokens. Moves no mass in or out of the list, is
  blind to the tail, and is identically 0 at K = 1.

Raise ValueError for temperature <= 0, temperature != 1 unless all V tokens are listed, an unknown tail, ids
and log-probs of different shape, rows that do not match the student's, or a parameter outside its range.
"""

from functools import partial

from torch import Tensor

from llmdistill.objectives import cores
from llmdistill.objectives.buckets import Tail, check_evidence, spread, student_buckets, teacher_buckets
from llmdistill.objectives.f_cores import f_divergence as f_divergence_core
from llmdistill.objectives.fused import check_temperature, compute_dtype, per_token, through_softmax


def forward_kl(
    student_logits: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    *,
    temperature: float = 1.0,
    tail: Tail = "bucket",
) -> Tensor:
    """KL(T || S) over the buckets; see the module and `divergences.forward_kl`."""
    return bucketed(cores.forward_kl, student_logits, topk_ids, topk_logprobs, temperature, tail)


def reverse_kl(
    student_logits: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    *,
    temperature: float = 1.0,
    tail: Tail = "bucket",
) -> Tensor:
    """KL(S || T) over the buckets; see the module and `divergences.reverse_kl`.

    It sees most of the dense value only if the list holds the student's likely tokens, so have the teacher
    score those.
    """
    return bucketed(cores.reverse_kl, student_logits, topk_ids, topk_logprobs, temperature, tail)


def jsd(
    student_logits: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    tail: Tail = "bucket",
) -> Tensor:
    """Generalised Jensen-Shannon over the buckets; see the module and `divergences.jsd`."""
    core = partial(cores.jsd, beta=beta)
    return bucketed(core, student_logits, topk_ids, topk_logprobs, temperature, tail)


def skew_forward_kl(
    student_logits: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    *,
    alpha: float = 0.1,
    temperature: float = 1.0,
    tail: Tail = "bucket",
) -> Tensor:
    """KL(T || alpha T + (1 - alpha) S) over the buckets; see the module and `divergences.skew_forward_kl`."""
    core = partial(cores.skew_forward_kl, alpha=alpha)
    return bucketed(core, student_logits, topk_ids, topk_logprobs, temperature, tail)


def skew_reverse_kl(
    student_logits: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    *,
    alpha: float = 0.1,
    temperature: float = 1.0,
    tail: Tail = "bucket",
) -> Tensor:
    """KL(S || (1 - alpha) T + alpha S) over the buckets; see the module and `divergences.skew_reverse_kl`."""
    core = partial(cores.skew_reverse_kl, alpha=alpha)
    return bucketed(core, student_logits, topk_ids, topk_logprobs, temperature, tail)


def total_variation(
    student_logits: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    *,
    temperature: float = 1.0,
    tail: Tail = "bucket",
) -> Tensor:
    """sum |S - T| / 2 over the buckets; see the module and `divergences.total_variation`."""
    return bucketed(cores.total_variation, student_logits, topk_ids, topk_logprobs, temperature, tail)


def adaptive_kl(
    student_logits: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    *,
    head_mass: float = 0.5,
    temperature: float = 1.0,
    tail: Tail = "bucket",
) -> Tensor:
    """AKL over the buckets, the tail ranked like a token; see the module and `divergences.adaptive_kl`."""
    core = partial(cores.adaptive_kl, head_mass=head_mass)
    return bucketed(core, student_logits, topk_ids, topk_logprobs, temperature, tail)


def f_divergence(
    student_logits: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    *,
    name: str,
    temperature: float = 1.0,
    tail: Tail = "bucket",
) -> Tensor:
    """D_f(T || S) for the generator `name` over the buckets; see `divergences.f_divergence`."""
    core = partial(f_divergence_core, name=name)
    return bucketed(core, student_logits, topk_ids, topk_logprobs, temperature, tail)


def bucketed(
    core: cores.Core,
    student_logits: Tensor,
    topk_ids: Tensor,
    topk_logprobs: Tensor,
    temperature: float,
    tail: Tail,
) -> Tensor:
    check_temperature(temperature)
    check_evidence(student_logits, topk_ids, topk_logprobs, tail)
    dtype = compute_dtype(student_logits)
    log_t = teacher_buckets(
        topk_ids, topk_logprobs.to(dtype), student_logits.shape[-1], tail=tail, temperature=temperature
    )

    def compute(logits: Tensor) -> tuple[Tensor, Tensor]:
        log_s, unlisted = student_buckets(logits.to(dtype), topk_ids, tail=tail, temperature=temperature)
        s = log_s.exp()
        value, slope = core(log_s, log_t, s)
        return value, spread(through_softmax(slope, s), topk_ids, unlisted).div_(temperature)

    return per_token(student_logits, compute)
