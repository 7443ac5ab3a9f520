"""Divergences of two distributions over different vocabularies, at a place in the text where both stand.

Both are summed into the classes that both can tell: every token belongs to the longest token of both vocabularies that
it begins with (:func:`llmdistill.tokenization.classes.shared_classes`). Of one model of bytes both sides then say the
same, however each cuts it: the student's "2" before a "0" and the teacher's "20" are in one class. X-Token's projection
(arXiv 2605.21699) does not have that: it gives no mass at all to a teacher's token whose pieces the student owns
(METHODS-2026 9.3.2).

Losses take log-probabilities of classes [..., K + 1], of which the last is what is in none; float32, in nats, without
gradient to the teacher.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llmdistill.objectives.fused import compute_dtype

Direction = Literal["forward", "reverse"]
# A side without tokens in no class gives none to "in no class"; the other's special tokens cost no more than this.
NONE = math.log(1e-8)
IMPOSSIBLE = -1e4  # the log-probability of what cannot come: finite, so that 0 times a difference of two is 0


@dataclass(frozen=True, eq=False)
class Classes:
    """Which class every token of one vocabulary is in: ``of_V`` [V] int64, from 0 to ``count``, which is none."""

    of_V: Tensor
    count: int

    def of(self, token_ids: Tensor) -> Tensor:
        """The class of every token, in the shape of ``token_ids``; none for columns past the vocabulary."""
        of_V = self.of_V.to(token_ids.device)
        known = token_ids < len(of_V)
        return torch.where(known, of_V[token_ids.clamp(max=len(of_V) - 1)], self.count)

    def logprobs(self, logits: Tensor) -> Tensor:
        """log of the sum of the softmax over every class, [n, K + 1] for logits [n, V]; differentiable."""
        logp_nV = logits.log_softmax(-1, dtype=compute_dtype(logits))
        index_nV = self.of(torch.arange(logits.shape[-1], device=logits.device)).expand_as(logp_nV)
        empty_nK = logp_nV.new_full((len(logp_nV), self.count + 1), -torch.inf)
        largest_nK = empty_nK.scatter_reduce(1, index_nV, logp_nV.detach(), "amax")
        largest_nK = torch.where(largest_nK.isfinite(), largest_nK, 0.0)
        sums_nK = torch.zeros_like(empty_nK).scatter_add(1, index_nV, (logp_nV - largest_nK.gather(1, index_nV)).exp())
        # 1 and more, where a class has a token of any probability at all
        logs_nK = torch.where(sums_nK > 0, sums_nK, 1.0).log() + largest_nK
        logs_nK = torch.where(sums_nK > 0, logs_nK, NONE)
        return torch.cat([logs_nK[:, :-1], logs_nK[:, -1:].clamp_min(NONE)], -1)


def log_open(logits_nV: Tensor, digits: Classes, closed_nD: Tensor) -> Tensor:
    """log of the probability that none of the closed digits comes next -> [n], differentiable; 0 where none is closed.

    digits: of every id the one that it begins with; closed_nD [n, 10] bool: those that cannot stand there
    (:mod:`llmdistill.tokenization.numerals`).
    """
    asked_n = closed_nD.any(-1)
    told = digits.logprobs(logits_nV[asked_n])
    closed = torch.nn.functional.pad(closed_nD[asked_n], (0, 1))  # what is no digit can stand everywhere
    open_n = told.masked_fill(closed, -torch.inf).logsumexp(-1)
    return told.new_zeros(len(asked_n)).index_put((asked_n,), open_n)


def given_open(logp_nK: Tensor, closed_nK: Tensor) -> Tensor:
    """Log-probabilities of classes [n, K + 1], given that none of the closed ones [n, K + 1] bool comes next."""
    left_nK = logp_nK.masked_fill(closed_nK, IMPOSSIBLE)
    return left_nK - left_nK.logsumexp(-1, keepdim=True) * closed_nK.any(-1, keepdim=True)


def class_kl(student_logp: Tensor, teacher_logp: Tensor, *, direction: Direction = "forward") -> Tensor:
    """KL(T || S) over all classes, or KL(S || T), [..., K + 1] -> [...].

    A coarsening of both sides, so never above the divergence of the distributions over what comes next in bytes.
    """
    student, teacher = student_logp, teacher_logp.detach()
    first, second = (teacher, student) if direction == "forward" else (student, teacher)
    return (first.exp() * (first - second)).sum(-1)


def shared_kl(student_logp: Tensor, teacher_logp: Tensor, same: Tensor, *, direction: Direction = "reverse") -> Tensor:
    """KL over the tokens that mean the same to both, and one bucket for the rest, [..., K + 1] -> [...].

    same [K] bool: classes into which neither vocabulary has folded another token. The bucket is the exact tail, on both
    sides: >= 0, and 0 where the coarsened distributions agree.
    """
    student, teacher = (_with_tail(x, same) for x in (student_logp, teacher_logp.detach()))
    return class_kl(student, teacher, direction=direction)


def hybrid_kl(student_logp: Tensor, teacher_logp: Tensor, same: Tensor) -> Tensor:
    """KL(T || S) over the tokens that mean the same to both (``shared_kl``), and L1 over the other classes -> [...].

    X-Token's H-KL sorts the probabilities of the others on both sides and compares by rank, which knows no token, and
    leaves the rest out of the KL, which may then be negative (METHODS-2026 9.3.2). Here classes are compared with
    themselves.
    """
    others = torch.cat([~same, same.new_ones(1)]).to(student_logp.device)
    gap = (student_logp.exp() - teacher_logp.detach().exp()).abs()[..., others].sum(-1)
    return shared_kl(student_logp, teacher_logp, same, direction="forward") + gap


def span_kl(student_C: Tensor, teacher_C: Tensor, student_rest_C: Tensor, teacher_rest_C: Tensor) -> Tensor:
    """p log(p / q) + r log(r / t) of chunks -> [C]: the part of a reverse KL that is about the chunk that was written.

    p and q = exp(student_C), exp(teacher_C) are the chunk's probabilities, r and t what is left of the classes that it
    begins in: those rests carry the student's gradient, and are never 0 in float32.
    """
    rest, teacher_rest = (x.clamp_min(math.exp(NONE)).log() for x in (student_rest_C, teacher_rest_C.detach()))
    teacher = teacher_C.detach()
    return student_C.exp() * (student_C - teacher) + rest.exp() * (rest - teacher_rest)


def _with_tail(logp: Tensor, same: Tensor) -> Tensor:
    others = torch.cat([~same, same.new_ones(1)]).to(logp.device)
    return torch.cat([logp[..., ~others], logp[..., others].logsumexp(-1, keepdim=True)], -1)
