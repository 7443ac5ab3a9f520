"""Losses that others use across tokenizers, as the arena's peers: ULD, GOLD, DSKD-CMA and MinED.

None of them is a method of llmdistill: none is 0 where the two models are one model of bytes read through two
vocabularies (METHODS-2026 9.3.7). They are here so that what is said about them can be measured. Own code after the
published formulas; the numbers are those of the authors' code (tests/arena/test_peers.py).

Positions: ``probs_TV[t]`` is the distribution of token t, given what stands before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Group = tuple[Sequence[int], Sequence[int]]  # positions of the student, and of the teacher


# -------------------------------------------------------------------------------------------------- order statistics


def sorted_l1(student_NV: Tensor, teacher_NW: Tensor) -> Tensor:
    """L1 distance of the sorted probabilities -> [N], the smaller vocabulary padded with zeros (ULD, 2402.12030 eq. 5).

    Which token has which probability is not asked.
    """
    width = max(student_NV.shape[-1], teacher_NW.shape[-1])
    student, teacher = (
        F.pad(p.sort(-1, descending=True).values, (0, width - p.shape[-1])) for p in (student_NV, teacher_NW)
    )
    return (student - teacher).abs().sum(-1)


def uld(student_TV: Tensor, teacher_UW: Tensor) -> Tensor:
    """ULD of two texts by position, up to the end of the shorter -> [min(T, U)]: nothing is aligned."""
    n = min(len(student_TV), len(teacher_UW))
    return sorted_l1(student_TV[:n], teacher_UW[:n])


def gold(
    student_TV: Tensor, teacher_UW: Tensor, student_T: Tensor, teacher_U: Tensor, groups: Sequence[Group]
) -> Tensor:
    """GOLD (TRL), strategy ``bayesian``, extended ULD: mean over groups of :func:`sorted_l1` -> scalar.

    A group's distribution is that of its last token, times the probabilities of the tokens before it in the group. The
    end of the text is no group (``skip_eos``).

    Args:
        student_T, teacher_U: ids of the tokens.
    """
    if not groups:
        return student_TV.sum() * 0.0
    student = torch.stack([_chain(student_TV, student_T, own) for own, _ in groups])
    teacher = torch.stack([_chain(teacher_UW, teacher_U, other) for _, other in groups])
    return sorted_l1(student, teacher).mean()


def _chain(probs_TV: Tensor, ids_T: Tensor, positions: Sequence[int]) -> Tensor:
    before = [probs_TV[t, ids_T[t]] for t in positions[:-1]]
    return probs_TV[positions[-1]] * math.prod(before, start=probs_TV.new_ones(()))


# ------------------------------------------------------------------------------------------------- dual-space (DSKD)


@dataclass(frozen=True)
class Side:
    """One model on a batch. Positions are those of logits: ``targets_BT`` is the token after each, -100 where none."""

    hidden_BTH: Tensor
    input_ids_BT: Tensor
    targets_BT: Tensor
    embeddings_VH: Tensor
    head_VH: Tensor

    @property
    def counted_BT(self) -> Tensor:
        return self.targets_BT != -100

    def read(self) -> Tensor:
        """Embeddings of the token read and of the token predicted, [B, T, 2 H]; those of id 0 where nothing counts."""
        found = [self.embeddings_VH[ids.where(self.counted_BT, 0)] for ids in (self.input_ids_BT, self.targets_BT)]
        return torch.cat(found, -1).detach()


class Projectors(nn.Module):
    """The three linear maps of DSKD-CMA, trained beside the student."""

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        self.query = nn.Linear(2 * student, 2 * teacher, bias=False)
        self.s2t = nn.Linear(student, teacher, bias=False)
        self.t2s = nn.Linear(teacher, student, bias=False)


def dskd_cma(student: Side, teacher: Side, projectors: Projectors, *, temperature: float = 2.0) -> Mapping[str, Tensor]:
    """Dual-space distillation with cross-model attention (2406.17328): the three losses, sums over tokens.

    ``t2s_ce``: the teacher's states, seen from the student's positions, predict the student's tokens through the
    student's head. ``t2s_kd``: forward KL from those predictions to the student's, where they are right. ``s2t_kd``:
    forward KL from the teacher to the student's states, seen from the teacher's positions, through the teacher's head.
    """
    read_S, read_T = student.read(), teacher.read()
    target_T = teacher.embeddings_VH[teacher.targets_BT.where(teacher.counted_BT, 0)].detach()
    keys = read_T / read_T.std()
    hidden_T = teacher.hidden_BTH.detach()
    values_T = projectors.t2s(hidden_T / hidden_T.std() + target_T / target_T.std())
    values_S = projectors.s2t(student.hidden_BTH)
    scores = projectors.query(read_S) @ keys.transpose(-1, -2) / math.sqrt(2 * hidden_T.shape[-1])
    both = student.counted_BT[:, :, None] & teacher.counted_BT[:, None, :]
    scores = scores + (~both) * -100_000.0
    t2s = scores.softmax(-1) @ values_T @ student.head_VH.detach().T
    s2t = scores.transpose(-1, -2).softmax(-1) @ values_S @ teacher.head_VH.detach().T
    counted_S, counted_T = student.counted_BT, teacher.counted_BT
    targets_N, t2s_NV = student.targets_BT[counted_S], t2s[counted_S]
    right_N = t2s_NV.argmax(-1) == targets_N
    student_NV = (student.hidden_BTH @ student.head_VH.T)[counted_S]
    teacher_MV = (hidden_T @ teacher.head_VH.detach().T)[counted_T]
    return {
        "t2s_ce": F.cross_entropy(t2s_NV, targets_N, reduction="sum"),
        "t2s_kd": (_forward_kl(student_NV, t2s_NV.detach(), temperature) * right_N).sum(),
        "s2t_kd": _forward_kl(s2t[counted_T], teacher_MV, temperature).sum(),
    }


def _forward_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    student, teacher = ((logits / temperature).log_softmax(-1) for logits in (student_NV, teacher_NV))
    return (teacher.exp() * (teacher - student)).sum(-1)


# ----------------------------------------------------------------------------------------- minimum edit distance


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


def nearest_tokens(student: Sequence[str], teacher: Sequence[str]) -> Tensor:
    """For every token of the teacher the student's of least edit distance, the lowest id of several -> [W] int64."""
    own = {token: i for i, token in reversed(list(enumerate(student)))}
    return torch.tensor(
        [own[t] if t in own else min(range(len(student)), key=lambda i: edit_distance(student[i], t)) for t in teacher]
    )


def min_ed_alignment(student: Sequence[str], teacher: Sequence[str]) -> list[int]:
    """The teacher's position for each of the student's: the path of least summed edit distance through both texts.

    Dynamic time warping, as in FuseLLM (2401.10491); where several of the teacher's positions fall on one of the
    student's, the last of least distance.
    """
    infinity, n, m = float("inf"), len(student), len(teacher)
    cost = [[edit_distance(s, t) for t in teacher] for s in student]
    best = [[infinity] * (m + 1) for _ in range(n + 1)]
    best[0][0] = 0.0
    for i in range(n):
        for j in range(m):
            best[i + 1][j + 1] = cost[i][j] + min(best[i][j], best[i][j + 1], best[i + 1][j])
    found, i, j = [-1] * n, n, m
    while i and j:
        k = found[i - 1]
        if k < 0 or cost[i - 1][j - 1] < cost[i - 1][k]:
            found[i - 1] = j - 1
        i, j = min(((i - 1, j - 1), (i - 1, j), (i, j - 1)), key=lambda at: best[at[0]][at[1]])
    return found


def min_ed(student_TV: Tensor, teacher_UW: Tensor, aligned: Sequence[int], nearest_W: Tensor) -> Tensor:
    """Forward KL from the teacher's distribution at the aligned position, each token's mass on its nearest -> [T].

    Args:
        student_TV, teacher_UW: log-probabilities.
        aligned: :func:`min_ed_alignment`.
        nearest_W: :func:`nearest_tokens`.
    """
    mapped = torch.zeros_like(student_TV).index_add(1, nearest_W, teacher_UW[list(aligned)].exp())
    return (torch.special.xlogy(mapped, mapped) - mapped * student_TV).sum(-1)
