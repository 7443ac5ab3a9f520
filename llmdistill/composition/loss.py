"""The loss of a method on one micro-batch: one forward, one pass through the head, whatever the number of terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmdistill.compat.patching import random_state_kept
from llmdistill.composition.batch import MicroBatch, Slice
from llmdistill.models.heads import Head, forward_to_head
from llmdistill.models.layers import captured
from llmdistill.models.packing import view_of
from llmdistill.models.router import balance_loss, counting_tokens, router_inputs
from llmdistill.objectives.rows import PairedRows, TensorRows
from llmdistill.objectives.streaming import Part, streamed_metrics, streamed_parts


@dataclass
class TermResult:
    """What one term came to on a micro-batch."""

    loss_sum: float  # weighted, before weight and denominator
    metric_sums: Mapping[str, Tensor]  # over its rows, weighted as the loss is
    row_losses: Tensor  # [n], unweighted; of a group loss the numbers it is made of
    group_sums: Mapping[str, tuple[float, float]]
    watched: Mapping[str, float] = field(default_factory=dict)  # sums of what the term watches, weighted as its loss
    squared_norm: float = 0.0  # of its scaled gradient at the hidden states it reads


@dataclass
class Result:
    """What :func:`loss_on` found."""

    loss: Tensor  # of the micro-batch's share of the global batch, with gradient
    terms: dict[str, TermResult] = field(default_factory=dict)
    per_token: dict[str, list[Tensor]] = field(
        default_factory=dict
    )  # term -> its metric of the same name, in row order
    router_balance: float | None = None


def loss_on(
    model: nn.Module,
    batch: MicroBatch,
    *,
    head: Head,
    vocab_size: int | None,
    chunk_tokens: int,
    scale: float = 1.0,
    metrics: bool = False,
    norms: bool = False,
    helpers: Mapping[str, nn.Module] | None = None,
    keep: str = "reverse_kl",
) -> Result:
    """The loss of ``batch`` under ``model``: sum over terms of weight * sum / total, times ``scale``.

    Args:
        model: as it is called in training, whatever wraps it; ``head`` is its output layer.
        scale: processes that gradients are averaged over.
        helpers: the method's own modules, for terms on hidden states.
        metrics: also measure the student against each term's first judge, and the norm of each term's gradient.
        norms: measure the norms alone.
        keep: the metric whose values per row are handed back, where a term has it.
    """
    view, result = view_of(model, batch.rollout), Result(torch.zeros(()))
    scaled_slices = [(s, s.term.weight_now / s.total) for s in batch.slices if s.total > 0]
    largest_scale = max((abs(scale_of_term) for _, scale_of_term in scaled_slices), default=1.0) or 1.0
    hidden_slices = [(s, scale_of_term) for s, scale_of_term in scaled_slices if s.term.hidden is not None]
    logit_slices = [s for s, _ in scaled_slices if s.term.hidden is None]
    scales = [scale_of_term for s, scale_of_term in scaled_slices if s.term.hidden is None]
    options: dict[str, Any] = dict(
        chunk_tokens=chunk_tokens, logit_scale=head.logit_scale, softcap=head.softcap, vocab_size=vocab_size
    )
    losses: dict[str, Any] = {}
    watched: dict[tuple[str, str], list[Tensor]] = {}  # (term, name) -> values of its rows, chunk by chunk

    def at_the_head(hidden_BTH: Tensor) -> Tensor:
        rows_NH = view.rows(hidden_BTH)
        parts, group_values = list[Part](), list[Tensor | None]()
        for s, scale_of_term in zip(logit_slices, scales, strict=True):
            weights, group_value = (
                (s.weights_N, None) if s.term.group is None else _group(s, rows_NH, head, options, result)
            )
            # Relative to the largest: the gradient that is kept at the head's input then suits 16 bits too.
            part_scale = scale_of_term / largest_scale
            observe = _observer(s, metrics, keep, result, watched)
            weighted, loss, evidence = s.term.group is None, s.term.per_row, s.evidence
            if weights is not None and weights.ndim == 2:  # several numbers of every row, each with its own
                evidence, weights = PairedRows((evidence, TensorRows((weights,), len(weights)))), None
                loss, observe = _each_weighted(loss), observe and _without_last(observe)
            parts.append(Part(loss, evidence, s.rows, weights, part_scale, observe, weighted))
            group_values.append(group_value)
        if parts:
            streamed = streamed_parts(parts, rows_NH, head.linear, norms=metrics or norms, **options)
            _note(logit_slices, group_values, streamed, largest_scale, result, watched)
            losses["loss"] = _valued(streamed.total, parts, group_values, streamed.sums)
        else:
            losses["loss"] = rows_NH.float().sum() * 0.0
        for s, scale_of_term in hidden_slices:
            assert s.term.hidden is not None
            states = [view.rows(states_by_layer[layer])[s.rows] for layer in s.term.hidden.student]
            norm = _squared_norm(s, states, helpers or {}) * scale_of_term**2 if metrics or norms else 0.0
            losses_n = _hidden(s, states, helpers or {})
            loss_sum = losses_n.sum() if s.weights_N is None else (losses_n * s.weights_N).sum()
            result.terms[s.term.name] = TermResult(float(loss_sum.detach()), {}, losses_n.detach(), {}, {}, norm)
            losses["loss"] = losses["loss"] + loss_sum * (scale_of_term / largest_scale)
        return losses["loss"]

    layers = [layer for s, _ in hidden_slices if s.term.hidden is not None for layer in s.term.hidden.student]
    with captured(model, layers) as states_by_layer, counting_tokens(model, view.attention_mask, view.there):
        output = forward_to_head(model, head.linear, view, at_the_head, **router_inputs(model))
    # By way of the model's output too (see in_place_of): ZeRO-3 and DDP hang their backward hooks on that.
    loss = (losses["loss"] + 0 * output.logits.sum()) * (scale * largest_scale)
    if (balance := balance_loss(model, output)) is not None:
        share = _share([s for s, _ in scaled_slices], batch)
        loss = loss + balance * share * scale
        result.router_balance = float(balance.detach())
    result.loss = loss
    return result


def _group(s: Slice, rows_NH: Tensor, head: Head, options: Mapping[str, Any], result: Result) -> tuple[Tensor, Tensor]:
    """A group loss's first pass: (the derivative by the numbers of every row [n] or [n, D], its value)."""
    group = s.term.group
    assert group is not None
    rows_nH = rows_NH[s.rows].detach()
    row_values = streamed_metrics(
        lambda logits, *evidence: {"v": group.values(logits, *evidence)}, rows_nH, head.linear, s.evidence, **options
    )
    with torch.enable_grad():
        values_N = row_values["v"].requires_grad_()
        value = group.reduce(values_N, s.groups)
        (weights_N,) = torch.autograd.grad(value, values_N)
    observed = group.observe(values_N.detach(), s.groups)
    result.terms[s.term.name] = TermResult(float(value.detach()), {}, values_N.detach(), observed)
    return weights_N, value.detach()


def _each_weighted(values: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The sum of a row's numbers [n, D], each times its weight, which are the last of the evidence."""

    def summed(student_logits: Tensor, *evidence: Tensor) -> Tensor:
        *given, weights_nD = evidence
        return (values(student_logits, *given) * weights_nD).sum(-1)

    return summed


def _without_last(observe: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    return lambda student_logits, *evidence: observe(student_logits, *evidence[:-1])


def _hidden(s: Slice, states: list[Tensor], helpers: Mapping[str, nn.Module]) -> Tensor:
    """A loss on hidden states, [n], unweighted."""
    assert s.term.hidden is not None
    count = s.rows.stop - s.rows.start
    with torch.autocast(states[0].device.type, enabled=False):  # losses are in float32 whatever the model's dtype
        evidence = s.evidence.chunk(slice(0, count), None)
        return s.term.hidden.loss([x.float() for x in states], *evidence, helpers=helpers)


def _squared_norm(s: Slice, states: list[Tensor], helpers: Mapping[str, nn.Module]) -> float:
    """Of the gradient that a loss on hidden states has there, before its weight and denominator.

    From a graph of its own, gone before the one that is trained on is made: ZeRO-3 counts how often a helper is run
    forward and backward, and lets go of its weights accordingly.
    """
    leaves = [x.detach().requires_grad_() for x in states]
    with random_state_kept(), torch.enable_grad():
        losses_n = _hidden(s, leaves, helpers)
        total = losses_n.sum() if s.weights_N is None else (losses_n * s.weights_N).sum()
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return sum(float(g.float().square().sum()) for g in gradients if g is not None)


def _observer(
    s: Slice, metrics: bool, keep: str, result: Result, watched: dict[tuple[str, str], list[Tensor]]
) -> Callable[..., dict[str, Tensor]] | None:
    watch = s.term.watch
    if not (metrics or watch):
        return None

    def observe(student_nV: Tensor, *evidence: Tensor) -> dict[str, Tensor]:
        values = {name: function(student_nV, *evidence) for name, function in watch.items()}
        for name, values_n in values.items():
            watched.setdefault((s.term.name, name), []).append(values_n)
        if not metrics:
            return {}
        measured = s.term.metrics(student_nV, *evidence)
        if keep in measured:
            result.per_token.setdefault(s.term.name, []).append(measured[keep].cpu())
        return values | measured

    return observe


def _note(
    logit_slices: list[Slice],
    group_values: list[Tensor | None],
    streamed: Any,
    largest_scale: float,
    result: Result,
    watched: Mapping[tuple[str, str], list[Tensor]],
) -> None:
    for k, s in enumerate(logit_slices):
        norm = 0.0 if streamed.squared_norms is None else float(streamed.squared_norms[k]) * largest_scale**2
        if group_values[k] is None:
            sums = {name: _weighted_sum(watched.get((s.term.name, name), []), s.weights_N) for name in s.term.watch}
            result.terms[s.term.name] = TermResult(
                float(streamed.sums[k]), streamed.metric_sums[k], streamed.row_losses[k], {}, sums, norm
            )
        else:
            result.terms[s.term.name].squared_norm = norm


def _weighted_sum(pieces: list[Tensor], weights_N: Tensor | None) -> float:
    if not pieces:  # none of the term's rows is in this micro-batch
        return 0.0
    values_N = torch.cat(pieces).double()
    return float((values_N if weights_N is None else values_N * weights_N).sum())


def _valued(total: Tensor, parts: list[Part], group_values: list[Tensor | None], sums: Tensor) -> Tensor:
    """``total`` with the value of each group loss in place of its surrogate's; the gradient is the surrogate's."""
    if all(group_value is None for group_value in group_values):
        return total
    total_value = total.new_zeros(())
    for part, group_value, part_value in zip(parts, group_values, sums, strict=True):
        part_value = part_value if group_value is None else group_value
        total_value = total_value + (part_value if part.scale == 1.0 else part_value * part.scale)
    return total_value + (total - total.detach())


def _share(slices: list[Slice], batch: MicroBatch) -> float:
    """This micro-batch's share of the global batch, by the rows of its first term."""
    if not slices:
        return 0.0
    s = slices[0]
    if s.term.group is not None:
        return s.term.group.count(s.groups) / s.total
    weight_sum = float(s.weights_N.sum()) if s.weights_N is not None else float(s.rows.stop - s.rows.start)
    return weight_sum / s.total
