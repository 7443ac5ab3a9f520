"""The log-probs of pairs: as a loss over them at the head, and measured on held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from llmdistill.evals.metrics import bootstrap_ci
from llmdistill.models.heads import Head, forward_to_head, head_of
from llmdistill.models.weights import gathered
from llmdistill.objectives.policy import token_logprobs
from llmdistill.objectives.redi import sequence_means
from llmdistill.objectives.rows import TokenRows
from llmdistill.objectives.streaming import streamed, streamed_metrics
from llmdistill.texts import Rollout, predicting_rows
from llmdistill.texts.pairs import Pair, collate_pairs

# loss(mean log-probs of the chosen [P], of the rejected [P]) -> scalar, the mean over pairs
PairLoss = Callable[[Tensor, Tensor], Tensor]


def negative_logprob(student_logits: Tensor, token_ids: Tensor) -> Tensor:
    """-log p(token) -> [...], in float32: an objective of the streaming engine."""
    return -token_logprobs(student_logits, token_ids)


def pair_loss_at_the_head(
    hidden_BTH: Tensor, rollout: Rollout, head: Head, loss: PairLoss, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """(sum of a pair loss over pairs, mean log-prob of every sequence [2P]) from the hidden states of 2P sequences.

    The loss reaches the logits through 2P means only. So its derivative by them, taken on tensors of that size, makes
    a weight for every token, and the weighted negative log-probs have the exact gradient of any such loss: [N, V]
    logits never exist. The value returned is the loss's own.
    """
    rows_NH, counts = predicting_rows(hidden_BTH, rollout.completion_mask), rollout.row_counts
    tokens = TokenRows(rollout.token_rows())
    projection: dict[str, Any] = dict(
        chunk_tokens=chunk_tokens, logit_scale=head.logit_scale, softcap=head.softcap, vocab_size=None
    )
    logprobs = _logprobs(rows_NH, tokens, head, projection)
    with torch.enable_grad():
        means = sequence_means(logprobs, counts).requires_grad_()
        chosen, rejected = means.chunk(2)
        value = loss(chosen, rejected) * len(chosen)
        (by_mean,) = torch.autograd.grad(value, means)
    value, means = value.detach(), means.detach()
    if not (torch.is_grad_enabled() and rows_NH.requires_grad):
        return value, means
    per_token = torch.cat([(-g / n).expand(n) for g, n in zip(by_mean, counts, strict=True)])
    surrogate, _ = streamed(negative_logprob, rows_NH, head.linear, tokens, weights_N=per_token, **projection)
    return value + (surrogate - surrogate.detach()), means


def _logprobs(rows_NH: Tensor, tokens: TokenRows, head: Head, projection: dict[str, Any]) -> Tensor:
    def logprob(logits_nV: Tensor, ids_n: Tensor) -> dict[str, Tensor]:
        return {"logprob": token_logprobs(logits_nV, ids_n)}

    return streamed_metrics(logprob, rows_NH.detach(), head.linear, tokens, **projection)["logprob"]


@dataclass(frozen=True)
class PairMeasurement:
    """Mean log-probs per token and lengths of P pairs; ``rejected`` is NaN where there is no such side."""

    chosen: list[float]
    rejected: list[float]
    chosen_length: list[int]
    rejected_length: list[int]

    @property
    def has_rejected(self) -> bool:
        """Whether every pair has its rejected side."""
        return all(self.rejected_length)

    def flat(self) -> dict[str, float]:
        """Means over pairs; of the first four with ``_low`` and ``_high``, the 95 % bootstrap interval over pairs."""
        margins = [a - b for a, b in zip(self.chosen, self.rejected, strict=True)]
        series = {"chosen_logp": self.chosen}
        lengths = {"chosen_length": self.chosen_length}
        if self.has_rejected:
            lengths["rejected_length"] = self.rejected_length
            series |= {
                "rejected_logp": self.rejected,
                "margin": margins,
                "accuracy": [float(m > 0) for m in margins],
            }
        values: dict[str, float] = {"pairs": len(self.chosen)}
        for name, of_pairs in series.items():
            low, high = bootstrap_ci(of_pairs)
            values |= {name: sum(of_pairs) / len(of_pairs), f"{name}_low": low, f"{name}_high": high}
        return values | {name: sum(of_pairs) / len(of_pairs) for name, of_pairs in lengths.items()}


@torch.no_grad()
def measure_pairs(trainer: Any, pairs: Sequence[Pair], *, pad_id: int, chunk_tokens: int) -> PairMeasurement:
    """The pairs' log-probs under the model of any ``transformers.Trainer``; each process measures its share.

    Before ``train()`` or after it; every process must call it.
    """
    accelerator, world = trainer.accelerator, trainer.accelerator.num_processes
    share = -(-len(pairs) // world)
    # Equally many forward passes everywhere (ZeRO-3 gathers parameters in them): the last pairs repeat, uncounted.
    index = range(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    mine = [pairs[min(i, len(pairs) - 1)] for i in index]
    model: nn.Module = trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
    head, size = head_of(trainer.model), trainer.args.per_device_eval_batch_size
    sharded = list(trainer.model.parameters()) if trainer.model_wrapped is trainer.model else []
    was_training = model.training
    model.eval()
    found: list[tuple[float, float, int, int]] = []
    with accelerator.autocast(), gathered(sharded):
        for start in range(0, len(mine), size):
            found += _measured(model, head, mine[start : start + size], pad_id, chunk_tokens)
    model.train(was_training)
    counted = [f for i, f in zip(index, found, strict=True) if i < len(pairs)]
    everyone = gather_object(counted) if world > 1 else counted
    return PairMeasurement(*(list(column) for column in zip(*everyone, strict=True)))  # type: ignore[arg-type]


def _measured(
    model: nn.Module, head: Head, pairs: Sequence[Pair], pad_id: int, chunk_tokens: int
) -> list[tuple[float, float, int, int]]:
    rollout = collate_pairs(pairs, pad_id).to(head.linear.weight.device)
    means: list[float] = []

    def at_the_head(hidden_BTH: Tensor) -> Tensor:
        projection = dict(chunk_tokens=chunk_tokens, logit_scale=head.logit_scale, softcap=head.softcap)
        rows_NH = predicting_rows(hidden_BTH, rollout.completion_mask)
        logprobs = _logprobs(rows_NH, TokenRows(rollout.token_rows()), head, projection)
        means.extend(sequence_means(logprobs, rollout.row_counts).tolist())
        return hidden_BTH.new_zeros(())

    forward_to_head(model, head.linear, rollout, at_the_head)
    rejected = iter(means[len(pairs) :])
    return [
        (means[i], next(rejected) if pair.rejected else float("nan"), len(pair.chosen), len(pair.rejected))
        for i, pair in enumerate(pairs)
    ]
