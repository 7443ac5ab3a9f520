"""On-policy distillation on some of the tokens: the first of a completion, or all but some ids.

    accelerate launch -m llmdistill.opd --config recipes/selected.yaml

``first`` is prefix OPD (arXiv 2602.15260): the loss stops after N tokens, and so may sampling (``max_new_tokens``);
evaluate at full length. ``without`` leaves out tokens by id wherever they stand: markers that another template writes
otherwise (METHODS-2026 9.1.4: one id at a time and only its first occurrence is what the released code does; here it is
every occurrence). What is left is a token mean over the kept tokens of the global batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmdistill.composition.method import Method
from llmdistill.composition.term import Ask, Term
from llmdistill.objectives.divergences import reverse_kl
from llmdistill.objectives.selection import first_tokens, not_in
from llmdistill.recipe.settings import Conflict, setting


@dataclass
class Settings:
    """Settings of the selections."""

    first: int = setting(0, "train on so many tokens of every completion; 0: on all", at_least=0)
    without: list[int] = setting([], "token ids that are not trained on, wherever they stand")

    conflicts = (
        Conflict(
            lambda s: not s.first and not s.without,
            "objective.first is 0 and objective.without empty: nothing is selected",
            "--first 64, or plain opd",
        ),
    )


def build(args: Any) -> Method:
    """The reverse KL on what is selected."""

    def select(row_tensors: Mapping[str, Tensor]) -> Tensor:
        mask = torch.ones(len(row_tensors["tokens"]), dtype=torch.bool)
        if args.first:
            mask &= first_tokens(row_tensors["position"], args.first).cpu()
        return mask & not_in(row_tensors["tokens"], args.without).cpu() if args.without else mask

    return Method((Term("divergence", reverse_kl, (Ask("teacher"),), select=select),))
