"""What to watch while distilling, per token: the callables of `streaming.streamed(metrics=...)`.

Each takes what an objective takes and returns {name: [...]} without gradient, at temperature 1, divergences
and entropy in nats. The same names mean the same in both, so logs of dense and sparse runs can be compared.
"""

import torch
from torch import Tensor

from llmdistill.objectives.buckets import check_evidence, student_buckets, teacher_buckets
from llmdistill.objectives.cores import kl_terms
from llmdistill.objectives.fused import compute_dtype
from llmdistill.objectives.taid import towards


@torch.no_grad()
def dense_metrics(student_logits: Tensor, teacher_logits: Tensor) -> dict[str, Tensor]:
    """reverse_kl, forward_kl, acceptance, entropy, top1_agreement [...] from two [..., V] rows of logits.

    acceptance = sum min(S, T) = 1 - TV: how often speculative decoding would keep the student's draft token.
    entropy is the student's.
    """
    dtype = compute_dtype(student_logits)
    log_s, log_t = student_logits.log_softmax(-1, dtype=dtype), teacher_logits.log_softmax(-1, dtype=dtype)
    s, t = log_s.exp(), log_t.exp()
    return {
        **_divergences(log_s, log_t, s, t),
        "entropy": _entropy(log_s, s),
        "top1_agreement": (student_logits.argmax(-1) == teacher_logits.argmax(-1)).to(dtype),
    }


@torch.no_grad()
def sparse_metrics(student_logits: Tensor, topk_ids: Tensor, topk_logprobs: Tensor) -> dict[str, Tensor]:
    """The metrics of `dense_metrics`, and tail_mass, from [..., V] logits and the teacher's top-k [..., K].

    reverse_kl and forward_kl are over K tokens and a tail bucket: lower bounds of the dense values;
    acceptance is an upper bound for the same reason. tail_mass is the teacher's probability outside the list.
    top1_agreement compares with the likeliest listed token. entropy is the student's over the full
    vocabulary.
    """
    check_evidence(student_logits, topk_ids, topk_logprobs, "bucket")
    dtype = compute_dtype(student_logits)
    log_s = student_logits.log_softmax(-1, dtype=dtype)
    log_t_buckets = teacher_buckets(topk_ids, topk_logprobs.to(dtype), student_logits.shape[-1])
    log_s_buckets, _ = student_buckets(log_s, topk_ids)
    s_buckets, t_buckets = log_s_buckets.exp(), log_t_buckets.exp()
    best = log_t_buckets[..., :-1].argmax(-1, keepdim=True)
    teacher_top1 = topk_ids.gather(-1, best).squeeze(-1)
    return {
        **_divergences(log_s_buckets, log_t_buckets, s_buckets, t_buckets),
        "tail_mass": t_buckets[..., -1],
        "entropy": _entropy(log_s, log_s.exp()),
        "top1_agreement": (student_logits.argmax(-1) == teacher_top1).to(dtype),
    }


@torch.no_grad()
def sampled_metrics(student_logits: Tensor, token_ids: Tensor, teacher_lp: Tensor) -> dict[str, Tensor]:
    """What can be watched with the teacher's log-prob of the sampled token only.

    reverse_kl is the k1 estimate log S(y) - log T(y): unbiased for y ~ student, negative at single tokens.
    """
    log_s = student_logits.log_softmax(-1, dtype=compute_dtype(student_logits))
    log_s_y = log_s.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return {"reverse_kl": kl_k1(log_s_y, teacher_lp), "entropy": _entropy(log_s, log_s.exp())}


@torch.no_grad()
def chunk_metrics(
    student_logits: Tensor, token_ids: Tensor, teacher_share: Tensor, chunks: Tensor, *_: Tensor
) -> dict[str, Tensor]:
    """{"reverse_kl", "entropy"} of tokens in chunks -> [...] each.

    reverse_kl is log S(y) less the token's share of its chunk's log T: over the tokens of a chunk they add up to the k1
    estimate of the chunk's, unbiased for what the student wrote. 0 in no chunk (``chunks`` -1).
    """
    found = sampled_metrics(student_logits, token_ids, teacher_share)
    return {**found, "reverse_kl": found["reverse_kl"].masked_fill(chunks < 0, 0.0)}


@torch.no_grad()
def class_metrics(student_logits: Tensor, *_: Tensor) -> dict[str, Tensor]:
    """{"entropy"} of the student [...]: how far it is from a judge of other tokens, its losses on classes say."""
    log_s = student_logits.log_softmax(-1, dtype=compute_dtype(student_logits))
    return {"entropy": _entropy(log_s, log_s.exp())}


def kl_k1(student_lp: Tensor, teacher_lp: Tensor) -> Tensor:
    """log S - log T per token sampled from the student: unbiased for KL(S || T), noisy. No gradient."""
    return (student_lp - teacher_lp).detach()


def kl_k3(student_lp: Tensor, teacher_lp: Tensor) -> Tensor:
    """r - 1 - log r, r = T / S, per token sampled from the student: unbiased for KL(S || T), >= 0. No gradient.

    To watch only: backpropagated, its expected gradient is that of the forward KL (METHODS-2026 9.0).
    """
    log_ratio = (teacher_lp - student_lp).detach()
    return log_ratio.expm1() - log_ratio


@torch.no_grad()
def target_entropy(student_logits: Tensor, *evidence: Tensor, t: float, temperature: float = 1.0) -> dict[str, Tensor]:
    """{"target_entropy": H(p_t) [...]} of TAID: by so much the cross-entropy of its released code exceeds the KL.

    evidence: teacher logits [..., V], or top-k ids and log-probs [..., K], whose buckets then make up p_t.
    """
    dtype = compute_dtype(student_logits)
    if len(evidence) == 1:
        log_s = (student_logits.to(dtype) / temperature).log_softmax(-1)
        log_t = (evidence[0].to(dtype) / temperature).log_softmax(-1)
    else:
        ids, logprobs = evidence
        log_s, _ = student_buckets(student_logits.to(dtype), ids, temperature=temperature)
        log_t = teacher_buckets(ids, logprobs.to(dtype), student_logits.shape[-1], temperature=temperature)
    log_p = towards(log_s, log_t, t)
    return {"target_entropy": _entropy(log_p, log_p.exp())}


def _divergences(log_s: Tensor, log_t: Tensor, s: Tensor, t: Tensor) -> dict[str, Tensor]:
    return {
        "reverse_kl": kl_terms(s, log_s, log_t).sum(-1),
        "forward_kl": kl_terms(t, log_t, log_s).sum(-1),
        "acceptance": torch.minimum(s, t).sum(-1),
    }


def _entropy(log_s: Tensor, s: Tensor) -> Tensor:
    return -(s * log_s).masked_fill_(s == 0, 0.0).sum(-1)
