"""Context distillation: what a model does under a long prompt, without the prompt (arXiv 2112.00861, 2209.15189).

    accelerate launch -m llmdistill.opd --config recipes/context_distillation.yaml

KL(T(. | context, y) || S(. | prompt, y)) on completions y of the dataset, of the student or of the teacher. With
``teacher.student: initial`` the model learns to behave as it would have behaved under instructions, examples or
documents that ``data.contexts`` adds; with another model as teacher this is distillation from a better informed one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from llmdistill.composition.method import Method
from llmdistill.composition.term import Ask, Term
from llmdistill.objectives.divergences import forward_kl
from llmdistill.recipe.settings import setting
from llmdistill.texts.sources import Only


@dataclass
class Settings:
    """Settings of context distillation."""

    sequences: Literal["student", "dataset", "teacher"] = setting("student", "who writes the completions")
    loss_temperature: float = setting(1.0, "divides both logits in the loss", above=0)


def build(args: Any) -> Method:
    """One term. The context is the recipe's: ``teacher.context``."""
    loss = partial(forward_kl, temperature=args.loss_temperature)
    return Method((Term("divergence", loss, (Ask("teacher"),)),), {"main": Only(args.sequences)})
