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
from llmdistill.models.heads import forward_to_head, head_of
from llmdistill.models.modes import evaluating
from llmdistill.objectives.rows import TeacherRows
from llmdistill.objectives.streaming import streamed_metrics
from llmdistill.texts.views import View, plain


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
    model, head, args = trainer.forward_model(), head_of(trainer.model), trainer.args
    evidence = with_reads(_reading_known(term, text), [text], [answer], {}, args.device)
    size, found = args.per_device_train_batch_size * args.rollouts.samples_per_prompt, dict[str, list[Tensor]]()
    places = in_turn(text.rollout.row_counts)
    with evaluating(model), trainer.accelerator.autocast():
        for start in range(0, len(text), size):
            stop = min(start + size, len(text))
            part = text.rollout.sequences(range(start, stop)).to(args.device)
            rows = evidence[slice(places[start].start, places[stop - 1].stop)]
            view = plain(part)

            def at_the_head(hidden_BTH: Tensor, view: View = view, rows: TeacherRows = rows) -> Tensor:
                measured = streamed_metrics(
                    term.survey.measure,  # type: ignore[union-attr]
                    view.rows(hidden_BTH),
                    head.linear,
                    rows,
                    chunk_tokens=args.chunk_tokens,
                    logit_scale=head.logit_scale,
                    softcap=head.softcap,
                    vocab_size=trainer.vocab_size,
                )
                for name, values in measured.items():
                    found.setdefault(name, []).append(values.cpu())
                return hidden_BTH.new_zeros(())

            forward_to_head(model, head.linear, view, at_the_head)
    return {name: torch.cat(values) for name, values in found.items()}


def _reading_known(term: Term, text: Text) -> Term:
    """The term with only those of its reads that are there before the survey."""
    return replace(term, reads=tuple(name for name in term.reads if name in text.own))
