"""P-KL and H-KL of X-Token and SimCT as published, derived from their papers: what ours is compared with.

They agree with vectors of their authors' code (xtoken.json, simct.json). None is 0 where two models agree on a text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def p_kl(
    student: Tensor, teacher: Tensor, own: Sequence[int], other: Sequence[int], projection: Tensor, *,
    k: int | None = None, temperature: float = 1.0, reverse: bool = False, exact: bool = False,
) -> Tensor:  # fmt: skip
    """Logits [n, V_S] and [m, V_T], the chunk of every row (-1: none), projection [V_S, V_T] of rows that sum to 1."""
    kept = teacher.max(0).values.topk(k or teacher.shape[-1]).indices.sort().values
    s = ((student / temperature).softmax(-1) @ projection)[:, kept]
    t = (teacher[:, kept] / temperature).log_softmax(-1)
    losses = []
    for rows, judged in chunks(own, other):
        if exact and (len(rows) != 1 or len(judged) != 1):
            continue
        p = s[rows].mean(0)
        p, t_c = p / p.sum(), t[judged].mean(0)
        losses.append((p * (p.log() - t_c)).sum() if reverse else (t_c.exp() * (t_c - p.log())).sum())
    return temperature**2 * torch.stack(losses).mean()


def h_kl(
    student: Tensor, teacher: Tensor, own: Sequence[int], other: Sequence[int],
    common: tuple[list[int], list[int]], uncommon: tuple[list[int], list[int]], *, reverse: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(KL over the common pairs, L1 of the sorted others)."""
    s, t = student.log_softmax(-1), teacher.log_softmax(-1)
    kl, l1 = [], []
    for rows, judged in chunks(own, other):
        a, b = s[rows].mean(0), t[judged].mean(0)
        x, y = a[common[0]], b[common[1]]
        kl.append((x.exp() * (x - y)).sum() if reverse else (y.exp() * (y - x)).sum())
        left, right = (v.exp().sort(descending=True).values for v in (a[uncommon[0]], b[uncommon[1]]))
        n = min(len(left), len(right))
        l1.append((left[:n] - right[:n]).abs().sum())
    return torch.stack(kl).mean(), torch.stack(l1).mean()


def simct(
    student: Tensor, teacher: Tensor, ids: tuple[list[int], list[int]], units: Sequence[Sequence[int]],
    overlap: tuple[list[int], list[int]],
) -> Tensor:  # fmt: skip
    """The paper's form, of every unit (teacher's start and end, student's start and end)."""
    s, t = student.log_softmax(-1), teacher.log_softmax(-1)
    losses = []
    for a, b, c, d in units:
        x, y = s[c][overlap[0]], t[a][overlap[1]]
        if (b - a, d - c) != (1, 1):
            spans = [
                torch.stack([side[i, which[i]] for i in range(*stretch)]).mean()
                for side, which, stretch in ((s, ids[0], (c, d)), (t, ids[1], (a, b)))
            ]
            x, y = torch.cat([x, spans[0][None]]), torch.cat([y, spans[1][None]])
        x, y = x.log_softmax(-1), y.log_softmax(-1)
        losses.append((x.exp() * (x - y)).sum())
    return torch.stack(losses)


def chunks(own: Sequence[int], other: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The rows of every chunk that both sides have."""
    both = sorted({c for c in own if c >= 0} & {c for c in other if c >= 0})
    return [([i for i, x in enumerate(own) if x == c], [j for j, x in enumerate(other) if x == c]) for c in both]
