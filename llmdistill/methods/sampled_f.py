"""Any f-divergence from sampled tokens alone: sg[f(u) - u f'(u)] log S(y), u = T(y)/S(y), y drawn from the student.

    accelerate launch -m llmdistill.opd --config recipes/sampled_f.yaml

Its expected gradient is that of D_f(T || S) = sum_v S f(T/S) for every f (METHODS-2026 9.0; OPD+, arXiv 2606.01039, has
the same weights): the evidence is one log-prob a token, whatever the teacher is. Sampled estimates of ``kl_forward``
and the like weigh by u and are wild where the student is far; ``jensen_shannon`` and ``squared_hellinger`` are
bounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from llmdistill.composition.method import Method
from llmdistill.composition.term import Ask, Term
from llmdistill.objectives.f_policy import f_advantage, sampled_f
from llmdistill.recipe.settings import GREEDY, PENALISED, Conflict, setting


@dataclass
class Settings:
    """Settings of the sampled f-divergences."""

    f: str = setting("jensen_shannon", "which f, such as jensen_shannon, squared_hellinger, kl_forward, alpha_0.5")
    log_ratio_clip: float | None = setting(None, "bound of abs log T/S in the weights; biases the gradient", above=0)
    importance_cap: float = setting(5.0, "weigh tokens by min(student/sampler, cap); 0: no", at_least=0)

    conflicts = (
        Conflict(lambda s: not known(s.f), "objective.f is {f!r}, which is no f-divergence", "jensen_shannon"),
        GREEDY,
        PENALISED,
    )


def known(name: str) -> bool:
    """Whether there is an f-divergence of that name."""
    try:
        f_advantage(torch.zeros(1), name)
    except ValueError:
        return False
    return True


def build(args: Any) -> Method:
    """One term on the student's own tokens."""
    loss = partial(sampled_f, name=args.f, log_ratio_clip=args.log_ratio_clip, **args.sampler)
    term = Term("divergence", loss, (Ask("teacher", "sampled"),), on_student=True)
    return Method((term.importance_weighted(args.importance_cap, **args.sampler),))
