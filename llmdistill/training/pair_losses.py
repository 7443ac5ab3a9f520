"""The log-probs of pairs: as a loss over their means, and measured on held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

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
from llmdistill.texts.pair import Pair, RejectedTokens
from llmdistill.texts.pairs import collate_pairs

# loss(mean log-probs of the chosen [P], of the rejected [P]) -> scalar, the mean over pairs
PairLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PairMeans:
    """A loss of pairs that reaches the logits through the mean log-prob of each side: a group loss of two texts.

    ``loss``: mean log-probs of the chosen [P] and of the rejected sides [P] -> scalar, the mean over pairs.

    A token that weighs 0 is not in the sum, and is in the length that it is divided by: REDI's |y| is that of the whole
    side (arXiv 2505.24850, eq. 3), and the fewer tokens are penalised, the less the rejected side has to say. A mean
    over the penalised ones alone would give a single token the weight of the whole side.
    """

    loss: PairLoss
    weighs: ClassVar = True

    def values(self, student_logits: Tensor, /, *evidence: Tensor) -> Tensor:
        (token_ids,) = evidence
        return token_logprobs(student_logits, token_ids)

    def reduce(self, values_N: Tensor, groups: Groups) -> Tensor:
        values_N = values_N if groups.weights_N is None else values_N * groups.weights_N
        chosen_means, rejected_means = sequence_means(values_N, groups.counts).split(list(groups.sequences))
        return self.loss(chosen_means, rejected_means) * len(chosen_means)

    def count(self, groups: Groups) -> int:
        return groups.sequences[0]

    def observe(self, values_N: Tensor, groups: Groups) -> dict[str, tuple[float, float]]:
        means = sequence_means(values_N, groups.counts).tolist()  # of the whole sides, whatever is penalised
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
    """Mean log-probs per token and lengths of P pairs; ``rejected`` is NaN where there is no such side.

    ``penalised``: of the rejected side what the loss pushes down, divided by the side's whole length.
    """

    chosen: list[float]
    rejected: list[float]
    penalised: list[float]
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
def measure_pairs(
    trainer: Any, pairs: Sequence[Pair], *, pad_id: int, chunk_tokens: int, rejected_tokens: RejectedTokens = "all"
) -> PairMeasurement:
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
        batches = [local_pairs[i : i + size] for i in range(0, len(local_pairs), size)]
        measured = _measured(model, head, batches, pad_id, chunk_tokens, rejected_tokens)
    counted = [f for i, f in zip(index, measured, strict=True) if i < len(pairs)]
    all_measured = gather_object(counted) if world > 1 else counted
    return PairMeasurement(*(list(column) for column in zip(*all_measured, strict=True)))  # type: ignore[arg-type]


def _measured(
    model: nn.Module,
    head: Head,
    batches: Sequence[Sequence[Pair]],
    pad_id: int,
    chunk_tokens: int,
    rejected_tokens: RejectedTokens,
) -> list[tuple[float, float, float, int, int]]:
    """What a :class:`PairMeasurement` has of every pair."""
    rollouts = [collate_pairs(pairs, pad_id) for pairs in batches]
    on_device = (rollout.to(head.linear.weight.device) for rollout in rollouts)
    logprobs_N = metrics_at_head(
        model,
        head,
        ((rollout, TokenRows(rollout.token_rows())) for rollout in on_device),
        lambda logits_nV, token_ids_n: {"logprob": token_logprobs(logits_nV, token_ids_n)},
        chunk_tokens=chunk_tokens,
    )["logprob"]
    sequences = iter(logprobs_N.split([n for rollout in rollouts for n in rollout.row_counts]))
    measured = []
    for pairs in batches:  # the chosen sides of a batch come before its rejected ones, see collate_pairs
        chosen = [next(sequences).mean().item() for _ in pairs]
        rejected = [next(sequences) if pair.rejected else None for pair in pairs]
        for mean, logprobs_n, pair in zip(chosen, rejected, pairs, strict=True):
            both = (float("nan"),) * 2 if logprobs_n is None else _of_rejected(logprobs_n, pair, rejected_tokens)
            measured.append((mean, *both, len(pair.chosen), len(pair.rejected)))
    return measured


def _of_rejected(logprobs_n: Tensor, pair: Pair, rejected_tokens: RejectedTokens) -> tuple[float, float]:
    """Means over the counted tokens of a rejected side: of its log-probs, and of those that are penalised."""
    penalised, counted = pair.penalised(rejected_tokens), pair.penalised("all")
    weights_n = torch.tensor([float(p) for p, counts in zip(penalised, counted, strict=True) if counts])
    return logprobs_n.mean().item(), (logprobs_n * weights_n.to(logprobs_n)).mean().item()
