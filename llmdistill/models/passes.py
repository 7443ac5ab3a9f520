"""Forward passes over a text in batches, each with something done at the model's head: to measure, never to train."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from llmdistill.models.heads import Head, forward_to_head
from llmdistill.models.modes import evaluating
from llmdistill.models.packing import view_of
from llmdistill.objectives.rows import TeacherRows
from llmdistill.objectives.streaming import streamed_metrics
from llmdistill.texts import Rollout
from llmdistill.texts.views import View

Evidence = TypeVar("Evidence")
Result = TypeVar("Result")


@torch.no_grad()
def at_head(
    model: nn.Module,
    head: Head,
    batches: Iterable[tuple[Rollout, Evidence]],
    read: Callable[[Tensor, View, Evidence], Result],
) -> list[Result]:
    """``read(rows_NH, view, evidence)`` of every batch: the hidden states that predict its counted tokens.

    Inside the head's forward, which under ZeRO-3 is where its weight is whole. The batches may be a generator that asks
    a teacher: it runs between the passes, in evaluation mode.

    Args:
        model: as it is called in training, so that sharded weights are gathered; ``head`` is its output layer.
        batches: equally many on every rank (ZeRO-3 gathers weights in each pass).
    """
    results = list[Result]()
    with evaluating(model):
        for rollout, evidence in batches:
            view = view_of(model, rollout)

            def compute(hidden_BTH: Tensor, view: View = view, evidence: Evidence = evidence) -> Tensor:
                results.append(read(view.rows(hidden_BTH), view, evidence))
                return hidden_BTH.new_zeros(())

            forward_to_head(model, head.linear, view, compute)
    return results


def metrics_at_head(
    model: nn.Module,
    head: Head,
    batches: Iterable[tuple[Rollout, TeacherRows]],
    metrics: Callable[..., dict[str, Tensor]],
    *,
    chunk_tokens: int,
    vocab_size: int | None = None,
) -> dict[str, Tensor]:
    """{name: [N, ...] on the CPU} of ``metrics(student_logits [n, V], *evidence) -> {name: [n, ...]}``, in row order.

    As :func:`at_head`, and logits exist for ``chunk_tokens`` rows at a time. Without a batch there is no name.
    """
    streaming: dict[str, Any] = dict(
        chunk_tokens=chunk_tokens, logit_scale=head.logit_scale, softcap=head.softcap, vocab_size=vocab_size
    )

    def read(rows_NH: Tensor, view: View, evidence: TeacherRows) -> dict[str, Tensor]:
        measured = streamed_metrics(metrics, rows_NH, head.linear, evidence, **streaming)
        return {name: values.cpu() for name, values in measured.items()}

    found = at_head(model, head, batches, read)
    return {name: torch.cat([part[name] for part in found]) for name in (found[0] if found else ())}
