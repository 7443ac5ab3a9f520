"""A method as data: the per-token objective, the evidence it reads, what weighs its tokens, and its schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from llmdistill.objectives.composed import on_samples
from llmdistill.objectives.rows import PairedRows, TeacherRows, TokenRows
from llmdistill.teachers.evidence import Evidence, Kind
from llmdistill.texts import Prompt, Rollout
from llmdistill.training.support import Support

ARGUMENTS: dict[Kind, int] = {"full": 1, "top_k": 2, "sampled": 2}  # tensors of evidence from one teacher


class Schedule(Protocol):
    """State of an objective that moves with training. Updated once per optimizer step, and kept in checkpoints."""

    def update(self, loss: float, step: int) -> float:
        """Takes the global mean loss of optimizer step ``step`` (1 is the first); returns the new value."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Objective:
    """A per-token loss and the evidence it reads.

    ``loss(student_logits [n, V], *evidence) -> [n]``; what follows the student's logits depends on ``evidence``:
    ``full``: teacher logits [n, V]; ``top_k``: ids and log-probs [n, K]; ``sampled``: token ids, their log-probs [n].
    With ``reference`` those of the reference model follow. ``watch(student_logits, *evidence) -> {name: [n]}`` is
    evaluated in every step; the sum of its means is added to the loss before ``schedule`` sees it.
    """

    loss: Callable[..., Tensor]
    evidence: Kind = "full"
    top_k: int = 0
    support: Support = "teacher"  # whose likeliest tokens ``top_k`` lists
    reference: bool = False  # the evidence is also asked of a reference model
    importance_cap: float = 0.0  # truncated importance weights of sampled tokens; 0: none
    temperature: float = 1.0  # that tokens were sampled at, for those weights and the reward's log-probs
    schedule: Schedule | None = None
    watch: Callable[..., dict[str, Tensor]] | None = None

    @property
    def arguments(self) -> int:
        """Tensors of evidence the loss reads after the student's logits."""
        return ARGUMENTS[self.evidence] * (2 if self.reference else 1)


@dataclass
class MicroBatch:
    """What one backward pass needs."""

    rollout: Rollout
    evidence: Evidence
    prompts: list[Prompt] = field(default_factory=list)  # one per sequence
    advantages: list[float] | None = None  # of the task reward, one per sequence
    rewards: list[float] | None = None

    def rows(self, objective: Objective, reward_weight: float) -> tuple[Callable[..., Tensor], TeacherRows]:
        """The loss and the rows it reads: the objective's own, or with what is known of the sampled tokens."""
        behavior = self.rollout.behavior_logprobs
        cap = objective.importance_cap if behavior is not None else 0.0
        weight = reward_weight if self.advantages is not None else 0.0
        if not (cap or weight):
            return objective.loss, self.evidence
        ids_N, mask = self.rollout.token_rows(), self.rollout.completion_mask[:, 1:]
        nan_N = torch.full(ids_N.shape, torch.nan, device=ids_N.device)
        behavior_N = nan_N if behavior is None else behavior[:, 1:][mask]
        advantages_B = torch.tensor(self.advantages or [0.0] * len(self.rollout), device=ids_N.device)
        advantage_N = advantages_B.repeat_interleave(torch.tensor(self.rollout.row_counts, device=ids_N.device))
        loss = on_samples(objective.loss, cap=cap, reward_weight=weight, temperature=objective.temperature)
        return loss, PairedRows((self.evidence, TokenRows(ids_N, behavior_N, advantage_N)))
