"""How far the student is from the teacher on given sequences: per-token metrics with intervals over sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmdistill.evals.metrics import bootstrap_ci
from llmdistill.heads import Head, in_place_of
from llmdistill.objectives.metrics import dense_metrics, sparse_metrics
from llmdistill.objectives.streaming import streamed_metrics
from llmdistill.rollouts import Rollout, position_ids, predicting_rows
from llmdistill.teachers.base import DenseTeacher, Teacher
from llmdistill.teachers.evidence import Evidence, Kind, gather

# What is asked of a remote teacher for measuring when the objective itself hears only sampled tokens.
UNLISTED_TOP_K = 64


@dataclass(frozen=True)
class Measurement:
    """Per-sequence sums of per-token metrics; B sequences."""

    sums: dict[str, list[float]]  # metric -> [B]
    tokens: list[int]  # [B] counted tokens

    def mean(self, metric: str) -> float:
        """Mean per token."""
        return sum(self.sums[metric]) / max(sum(self.tokens), 1)

    def interval(self, metric: str) -> tuple[float, float]:
        """95 % bootstrap interval of the mean per token, resampling sequences."""
        kept = [(total / n, n) for total, n in zip(self.sums[metric], self.tokens, strict=True) if n]
        return bootstrap_ci([k[0] for k in kept], [k[1] for k in kept]) if kept else (0.0, 0.0)

    def flat(self) -> dict[str, float]:
        """Metric name -> mean, ``…_low``, ``…_high``; and the number of tokens measured."""
        values: dict[str, float] = {"tokens": sum(self.tokens)}
        for metric in self.sums:
            low, high = self.interval(metric)
            values.update({metric: self.mean(metric), f"{metric}_low": low, f"{metric}_high": high})
        return values

    def gathered(self, accelerator: Any) -> Measurement:
        """The sequences of all ranks together."""
        if accelerator.num_processes == 1:
            return self
        from accelerate.utils import gather_object

        parts: list[Measurement] = gather_object([self])
        sums = {k: [x for p in parts for x in p.sums[k]] for k in self.sums}
        return Measurement(sums, [n for p in parts for n in p.tokens])


@torch.no_grad()
def measure(
    model: nn.Module,
    head: Head,
    teacher: Teacher,
    rollout: Rollout,
    *,
    vocab_size: int,
    chunk_tokens: int,
    batch_sequences: int,
    kind: Kind = "full",
    top_k: int = 0,
    counted: Sequence[bool] | None = None,
) -> Measurement:
    """reverse_kl, forward_kl, top1_agreement, acceptance and entropy of ``model`` against ``teacher`` on ``rollout``.

    ``kind`` and ``top_k`` say what is asked of a teacher that does not live in this process; the KLs of its top-k and
    tail are lower bounds.
    ``counted[b]`` false leaves sequence b out (it only kept the ranks in step).
    """
    dense = kind == "full" or isinstance(teacher, DenseTeacher)
    metrics = dense_metrics if dense else sparse_metrics
    streaming: dict[str, Any] = dict(
        chunk_tokens=chunk_tokens, logit_scale=head.logit_scale, softcap=head.softcap, vocab_size=vocab_size
    )
    sums: dict[str, list[float]] = {}
    tokens: list[int] = []
    was_training = model.training
    model.eval()
    for start in range(0, len(rollout), batch_sequences):
        part = rollout.sequences(range(start, min(start + batch_sequences, len(rollout)))).to(head.linear.weight.device)
        evidence = gather(
            teacher, part, "full" if dense else "top_k", top_k or UNLISTED_TOP_K, head.linear.weight.device
        )
        found: dict[str, Tensor] = {}

        def at_the_head(
            hidden_BTH: Tensor, part: Rollout = part, evidence: Evidence = evidence, found: dict[str, Tensor] = found
        ) -> Tensor:
            # Inside the head's forward: under ZeRO-3 this is where its weight is whole.
            rows_NH = predicting_rows(hidden_BTH, part.completion_mask)
            found.update(streamed_metrics(metrics, rows_NH, head.linear, evidence, **streaming))
            return rows_NH.new_zeros(())

        with in_place_of(head.linear, at_the_head):
            model(
                input_ids=part.input_ids,
                attention_mask=part.attention_mask,
                position_ids=position_ids(part.attention_mask),
                use_cache=False,
            )
        for name, values_N in found.items():
            sums.setdefault(name, []).extend(float(v.sum()) for v in values_N.split(part.row_counts))
        tokens += part.row_counts
    model.train(was_training)
    keep = range(len(tokens)) if counted is None else [i for i, c in enumerate(counted) if c]
    return Measurement({k: [v[i] for i in keep] for k, v in sums.items()}, [tokens[i] for i in keep])
