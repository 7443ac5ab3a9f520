"""A term's survey: numbers of all rows of the round, of all processes, before the first of them is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from llmdistill.composition.batch import Text, before_survey, with_reads
from llmdistill.composition.term import Rows, Term, consecutive_slices
from llmdistill.models.heads import head_of
from llmdistill.models.passes import metrics_at_head
from llmdistill.objectives.rows import TeacherRows


@torch.no_grad()
def survey(
    trainer: Any, term: Term, texts: Sequence[Text], answers: Sequence[TeacherRows | None]
) -> Mapping[str, Tensor]:
    """What ``term.survey`` derives: from what it measures in a forward pass of the student over the term's texts; of a
    term on hidden states from the judges' states, as ``judge_0`` and so on.

    Every process must call it; all make as many forward passes (ZeRO-3 gathers parameters in them).
    """
    assert term.survey is not None
    if term.hidden is not None:
        pieces = [_judge_states(answer) for answer in answers if answer is not None]
    else:
        pieces = [_measured(trainer, term, text, answer) for text, answer in zip(texts, answers, strict=True)]
    values = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    return term.survey.derive(_of_all(trainer, values, texts))


def _judge_states(answer: TeacherRows) -> dict[str, Tensor]:
    states = answer.chunk(slice(0, len(answer)), None)
    return {f"judge_{k}": states_NH.cpu() for k, states_NH in enumerate(states)}


def _of_all(trainer: Any, values: dict[str, Tensor], texts: Sequence[Text]) -> Rows:
    """Numbers of this process's rows with those of all."""
    counts = tuple(c for text in texts for c in text.rollout.row_counts)
    local = (values, counts)
    of_ranks = gather_object([local]) if trainer.accelerator.num_processes > 1 else [local]
    everywhere = {name: torch.cat([part[name] for part, _ in of_ranks]) for name in values}
    first = sum(sum(part) for _, part in of_ranks[: trainer.accelerator.process_index])
    return Rows(values, everywhere, counts, tuple(c for _, part in of_ranks for c in part), first)


def _measured(trainer: Any, term: Term, text: Text, answer: TeacherRows | None) -> dict[str, Tensor]:
    assert term.survey is not None
    args = trainer.args
    evidence = with_reads(before_survey(term), [text], [answer], {})
    parts = list(trainer.passes.of(text.rollout, args.device))
    places = consecutive_slices([part.num_rows for part in parts])
    with trainer.accelerator.autocast():
        return metrics_at_head(
            trainer.forward_model(),
            head_of(trainer.model),
            ((part, evidence[place].to(args.device)) for part, place in zip(parts, places, strict=True)),
            term.survey.measure,
            chunk_tokens=args.chunk_tokens,
            vocab_size=trainer.vocab_size,
        )
