"""Texts that the ranks of a group train on together, each on a stretch of every sequence
(:mod:`llmdistill.models.parted`).

Every rank samples its own share of a round, as always. Then the ranks of a group hand each other their texts, and each
has judges score all of them: so the judges of a group are asked S times what one rank would ask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmdistill.composition.batch import Text
from llmdistill.errors import UserError
from llmdistill.models.parted import RanksOfAText, check_parted
from llmdistill.texts import Rollout


def ranks_of_a_text(trainer: Any) -> RanksOfAText | None:
    """The group that this rank trains with; None: it trains on its own texts.

    Raises:
        UserError: a student, a method or a setting whose texts cannot be parted.
    """
    args, size = trainer.args, trainer.args.sequence_parallel_size
    if size == 1:
        return None
    check_parted(trainer.model, size)
    beside = {
        "objective.packing": args.packing,
        "rollouts.staleness": args.rollouts.staleness,
        "objective.num_iterations above 1": args.num_iterations > 1,
        "a term on hidden layers": any(term.hidden is not None for term in trainer.method.terms),
        "a denoiser": getattr(trainer, "denoiser", None) is not None,
        "torch_compile": args.torch_compile,
    }
    for name, there in beside.items():
        if there:
            raise UserError(
                f"objective.sequence_parallel_size is {size}, which does not go with {name}. Fix: leave one out."
            )
    return RanksOfAText(size)


def shared(texts: Mapping[str, Text], ranks: RanksOfAText, pad_id: int) -> dict[str, Text]:
    """The texts of all ranks of the group, in their order; the same on each of them."""
    of_ranks = ranks.everyones({name: replace(t, rollout=t.rollout.to("cpu")) for name, t in texts.items()})
    return {name: _joined([each[name] for each in of_ranks], pad_id) for name in texts}


def _joined(texts: Sequence[Text], pad_id: int) -> Text:
    def each(name: str) -> list[Any] | None:
        values = [getattr(text, name) for text in texts]
        return None if any(v is None for v in values) else [x for v in values for x in v]

    authors = {text.author for text in texts}
    return Text(
        _rollout([text.rollout for text in texts], pad_id),
        [prompt for text in texts for prompt in text.prompts],
        each("rewards"),
        each("advantages"),
        authors.pop() if len(authors) == 1 else "several",
    )


def _rollout(rollouts: Sequence[Rollout], pad_id: int) -> Rollout:
    width = max(r.input_ids.shape[1] for r in rollouts)

    def wide(name: str, value: int | bool | float) -> Tensor | None:
        found = [getattr(r, name) for r in rollouts]
        if any(x is None for x in found):
            return None
        return torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[1]), value=value) for x in found])

    ids, attention, completion = (
        wide("input_ids", pad_id),
        wide("attention_mask", False),
        wide("completion_mask", False),
    )
    assert ids is not None and attention is not None and completion is not None
    domains = [r.domain for r in rollouts]
    return replace(
        rollouts[0],
        input_ids=ids,
        attention_mask=attention,
        completion_mask=completion,
        behavior_logprobs=wide("behavior_logprobs", 0.0),
        finish=tuple(f for r in rollouts for f in r.finish),
        domain=None if any(d is None for d in domains) else tuple(x for d in domains if d is not None for x in d),
    )
