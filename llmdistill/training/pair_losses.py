"""The log-probs of pairs: as a loss over their means, and measured on held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from llmdistill.composition.term import Groups
from llmdistill.models.heads import Head, head_of
from llmdistill.models.passes import metrics_at_head
from llmdistill.models.weights import gathered
from llmdistill.objectives.policy import token_logprobs
from llmdistill.objectives.redi import sequence_means
from llmdistill.objectives.rows import TokenRows
from llmdistill.record.intervals import bootstrap_ci, share_interval
from llmdistill.texts.pair import Pair
from llmdistill.texts.pairs import collate_pairs

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
        chosen_means, rejected_means = sequence_means(values_N, groups.counts).split(list(groups.sequences))
        return self.loss(chosen_means, rejected_means) * len(chosen_means)

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
            low, high = share_interval(of_pairs) if name == "accuracy" else bootstrap_ci(of_pairs)
            values |= {name: sum(of_pairs) / len(of_pairs), f"{name}_low": low, f"{name}_high": high}
        return values | {name: sum(of_pairs) / len(of_pairs) for name, of_pairs in lengths.items()}


@torch.no_grad()
def measure_pairs(trainer: Any, pairs: Sequence[Pair], *, pad_id: int, chunk_tokens: int) -> PairMeasurement:
    """The pairs' log-probs under the model of any ``transformers.Trainer``; each process measures its share.

    Before ``train()`` or after it; every process must call it.
    """
    accelerator, world = trainer.accelerator, trainer.accelerator.num_processes
    per_rank = -(-len(pairs) // world)
    # Equally many forward passes everywhere (ZeRO-3 gathers parameters in them): the last pairs repeat, uncounted.
    index = range(accelerator.process_index * per_rank, (accelerator.process_index + 1) * per_rank)
    local_pairs = [pairs[min(i, len(pairs) - 1)] for i in index]
    model: nn.Module = trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
    head, size = head_of(trainer.model), trainer.args.per_device_eval_batch_size
    sharded = list(trainer.model.parameters()) if trainer.model_wrapped is trainer.model else []
    with accelerator.autocast(), gathered(sharded):
        measured = _measured(
            model, head, [local_pairs[i : i + size] for i in range(0, len(local_pairs), size)], pad_id, chunk_tokens
        )
    counted = [f for i, f in zip(index, measured, strict=True) if i < len(pairs)]
    all_measured = gather_object(counted) if world > 1 else counted
    return PairMeasurement(*(list(column) for column in zip(*all_measured, strict=True)))  # type: ignore[arg-type]


def _measured(
    model: nn.Module, head: Head, batches: Sequence[Sequence[Pair]], pad_id: int, chunk_tokens: int
) -> list[tuple[float, float, int, int]]:
    """Of every pair the mean log-probs of both sides (NaN where one is missing), and their lengths."""
    rollouts = [collate_pairs(pairs, pad_id) for pairs in batches]
    on_device = (rollout.to(head.linear.weight.device) for rollout in rollouts)
    logprobs_N = metrics_at_head(
        model,
        head,
        ((rollout, TokenRows(rollout.token_rows())) for rollout in on_device),
        lambda logits_nV, token_ids_n: {"logprob": token_logprobs(logits_nV, token_ids_n)},
        chunk_tokens=chunk_tokens,
    )["logprob"]
    means = iter(sequence_means(logprobs_N, [n for rollout in rollouts for n in rollout.row_counts]).tolist())
    measured = []
    for pairs in batches:  # the chosen sides of a batch come before its rejected ones, see collate_pairs
        chosen = [next(means) for _ in pairs]
        rejected = [next(means) if pair.rejected else float("nan") for pair in pairs]
        measured += [(c, r, len(p.chosen), len(p.rejected)) for c, r, p in zip(chosen, rejected, pairs, strict=True)]
    return measured
