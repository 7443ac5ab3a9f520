"""The log-probs of pairs: as a loss over their means, and measured on held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from llmdistill.composition.term import Groups
from llmdistill.models.heads import Head, forward_to_head, head_of
from llmdistill.models.weights import gathered
from llmdistill.objectives.policy import token_logprobs
from llmdistill.objectives.redi import sequence_means
from llmdistill.objectives.rows import TokenRows
from llmdistill.objectives.streaming import streamed_metrics
from llmdistill.record.intervals import bootstrap_ci
from llmdistill.texts.pairs import Pair, collate_pairs
from llmdistill.texts.views import plain

# loss(mean log-probs of the chosen [P], of the rejected [P]) -> scalar, the mean over pairs
PairLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PairMeans:
    """A loss of pairs that reaches the logits through the mean log-prob of each side: a group loss of two texts.

    ``loss``: mean log-probs of the chosen [P] and of the rejected sides [P] -> scalar, the mean over pairs.
    """

    loss: PairLoss

    def values(self, student_logits: Tensor, /, *evidence: Tensor) -> Tensor:
        (token_ids,) = evidence
        return token_logprobs(student_logits, token_ids)

    def reduce(self, values_N: Tensor, groups: Groups) -> Tensor:
        chosen, rejected = sequence_means(values_N, groups.counts).split(list(groups.sequences))
        return self.loss(chosen, rejected) * len(chosen)

    def count(self, groups: Groups) -> int:
        return groups.sequences[0]

    def observe(self, values_N: Tensor, groups: Groups) -> dict[str, tuple[float, float]]:
        means = sequence_means(values_N, groups.counts).tolist()
        pairs = self.count(groups)
        chosen, rejected = means[:pairs], means[pairs:]
        sums = {
            "chosen_logp": sum(chosen),
            "rejected_logp": sum(rejected),
            "margin": sum(chosen) - sum(rejected),
            "accuracy": sum(a > b for a, b in zip(chosen, rejected, strict=True)),
            "chosen_length": sum(groups.counts[:pairs]),
            "rejected_length": sum(groups.counts[pairs:]),
        }
        return {f"redi/{name}": (float(total), float(pairs)) for name, total in sums.items()}


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
    view = plain(collate_pairs(pairs, pad_id).to(head.linear.weight.device))
    means: list[float] = []

    def logprob(logits_nV: Tensor, ids_n: Tensor) -> dict[str, Tensor]:
        return {"logprob": token_logprobs(logits_nV, ids_n)}

    def at_the_head(hidden_BTH: Tensor) -> Tensor:
        projection = dict(chunk_tokens=chunk_tokens, logit_scale=head.logit_scale, softcap=head.softcap)
        rows_NH, tokens = view.rows(hidden_BTH), TokenRows(view.targets)
        logprobs_N = streamed_metrics(logprob, rows_NH, head.linear, tokens, **projection)["logprob"]  # type: ignore[arg-type]
        means.extend(sequence_means(logprobs_N, view.counts).tolist())
        return hidden_BTH.new_zeros(())

    forward_to_head(model, head.linear, view, at_the_head)
    rejected = iter(means[len(pairs) :])
    return [
        (means[i], next(rejected) if pair.rejected else float("nan"), len(pair.chosen), len(pair.rejected))
        for i, pair in enumerate(pairs)
    ]
