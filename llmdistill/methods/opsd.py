"""OPSD of UCLA: the student learns from itself, reading the solution (siyan-zhao/OPSD, METHODS 2.6, 2026 9.2.1).

    accelerate launch -m llmdistill.opd --config recipes/opsd.yaml

The student writes; the same model, with the reference solution in its prompt (``teacher.context``), judges every token;
generalised Jensen-Shannon divergence over the whole vocabulary at temperature 1.1 on both sides. The judge is fixed,
the student's start (``teacher.student: initial``; with an adapter the model below it), or follows it (``ema``,
``live``).

Simplified away: the clip of each vocabulary entry's part at .05, which later versions of the authors' code have: parts
of a divergence are signed, and clipped they can sum to less than 0. ``reason_first``, the judge thinking before it
judges.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from llmdistill.composition.method import Method
from llmdistill.composition.term import Ask, Term
from llmdistill.objectives.divergences import jsd
from llmdistill.recipe.settings import setting


@dataclass
class Settings:
    """Settings of OPSD."""

    beta: float = setting(
        0.5, "weight of the judge in the mixture (0: forward KL, 1: reverse KL)", at_least=0, at_most=1
    )
    loss_temperature: float = setting(1.1, "divides both logits in the loss; sampling has its own", above=0)


def build(args: Any) -> Method:
    """One term. The context is the recipe's: ``teacher.context``."""
    loss = partial(jsd, beta=args.beta, temperature=args.loss_temperature)
    return Method((Term("divergence", loss, (Ask("teacher"),)),))
