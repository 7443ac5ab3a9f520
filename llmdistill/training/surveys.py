"""A term's survey: numbers of all rows of the round, of all processes, before the first of them is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from llmdistill.composition.batch import Text, with_reads
from llmdistill.composition.term import Rows, Term, in_turn
from llmdistill.models.heads import head_of
from llmdistill.models.passes import batches_of, metrics_at_head
from llmdistill.objectives.rows import TeacherRows


@torch.no_grad()
def survey(
    trainer: Any, term: Term, texts: Sequence[Text], answers: Sequence[TeacherRows | None]
) -> Mapping[str, Tensor]:
    """What ``term.survey`` derives. A forward pass of the student over its texts, like any of the round's own.

    Every process must call it; all make as many forward passes (ZeRO-3 gathers parameters in them).
    """
    assert term.survey is not None
    pieces = [_measured(trainer, term, text, answer) for text, answer in zip(texts, answers, strict=True)]
    values = {name: torch.cat([p[name] for p in pieces]) for name in pieces[0]}
    return term.survey.derive(_of_all(trainer, values, texts))


def survey_hidden(
    trainer: Any, term: Term, texts: Sequence[Text], answers: Sequence[TeacherRows | None]
) -> Mapping[str, Tensor]:
    """What the survey of a term on hidden states derives: it is shown the judge's states, ``judge_0`` and so on."""
    assert term.survey is not None
    rows = [answer.chunk(slice(0, len(answer)), None) for answer in answers if answer is not None]
    values = {f"judge_{k}": torch.cat(tensors).cpu() for k, tensors in enumerate(zip(*rows, strict=True))}
    return term.survey.derive(_of_all(trainer, values, texts))


def _of_all(trainer: Any, values: dict[str, Tensor], texts: Sequence[Text]) -> Rows:
    """Numbers of this process's rows with those of all."""
    counts = tuple(c for text in texts for c in text.rollout.row_counts)
    mine = (values, counts)
    gathered = gather_object([mine]) if trainer.accelerator.num_processes > 1 else [mine]
    everywhere = {name: torch.cat([part[name] for part, _ in gathered]) for name in values}
    first = sum(sum(part) for _, part in gathered[: trainer.accelerator.process_index])
    return Rows(values, everywhere, counts, tuple(c for _, part in gathered for c in part), first)


def _measured(trainer: Any, term: Term, text: Text, answer: TeacherRows | None) -> dict[str, Tensor]:
    assert term.survey is not None
    args = trainer.args
    evidence = with_reads(_reading_known(term, text), [text], [answer], {}, args.device)
    size = args.per_device_train_batch_size * args.rollouts.samples_per_prompt
    parts = list(batches_of(text.rollout, size, args.device))
    places = in_turn([part.num_rows for part in parts])
    with trainer.accelerator.autocast():
        return metrics_at_head(
            trainer.forward_model(),
            head_of(trainer.model),
            ((part, evidence[place]) for part, place in zip(parts, places, strict=True)),
            term.survey.measure,
            chunk_tokens=args.chunk_tokens,
            vocab_size=trainer.vocab_size,
        )


def _reading_known(term: Term, text: Text) -> Term:
    """The term with only those of its reads that are there before the survey."""
    return replace(term, reads=tuple(name for name in term.reads if name in text.own))
