"""Watches log p(chosen) while a loss that is unbounded below pushes log p(rejected) down.

REDI's negative term can take the chosen side with it: at alpha 1 and too high a learning rate both log-probs fall, the
loss with them, and the student is gone before a benchmark is next looked at (arXiv 2505.24850).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

logger = logging.getLogger(__name__)


@dataclass
class Guard:
    """Compares the last ``window`` optimizer steps with the first ``window``.

    Args:
        drop: nats per token by which the mean chosen log-prob may fall.
        window: steps that each of the two means is over.
    """

    drop: float = 0.5
    window: int = 10
    # What a resumed run needs: per-step means (chosen, rejected) of the first and of the last steps.
    first: list[list[float]] = field(default_factory=list)
    last: list[list[float]] = field(default_factory=list)
    fired_at: int | None = None  # optimizer step

    def observe(self, chosen: float, rejected: float, step: int) -> bool:
        """Takes one step's mean log-probs over the global batch. True when the fall is first beyond ``drop``."""
        if len(self.first) < self.window:
            self.first.append([chosen, rejected])
        self.last = [*self.last, [chosen, rejected]][-self.window :]
        if self.fired_at is not None or self.fall <= self.drop:
            return False
        self.fired_at = step
        return True

    @property
    def fall(self) -> float:
        """Nats per token that the chosen side has lost; negative where it gained."""
        return _mean(self.first, 0) - _mean(self.last, 0) if self.first else 0.0

    def numbers(self) -> dict[str, float]:
        """Where both sides began and where they are."""
        return {
            "chosen_start": _mean(self.first, 0),
            "chosen_now": _mean(self.last, 0),
            "rejected_start": _mean(self.first, 1),
            "rejected_now": _mean(self.last, 1),
        }

    def warn(self, stops: bool) -> None:
        """Says what happened at ``fired_at``."""
        n = self.numbers()
        logger.warning(
            "step %d: the chosen side's mean log-prob per token is %.3f, %.3f below the %.3f it began with "
            "(objective.guard_drop is %g); the rejected side's is %.3f and began at %.3f. The student unlearns what it "
            "should learn. %s",
            *(self.fired_at, n["chosen_now"], self.fall, n["chosen_start"], self.drop),
            *(n["rejected_now"], n["rejected_start"]),
            "Training stops here. Fix: lower objective.alpha or train.learning_rate."
            if stops
            else "Fix: lower objective.alpha or train.learning_rate; --guard_stop true stops at this point.",
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON."""
        state = asdict(self)
        return {k: state[k] for k in ("first", "last", "fired_at")}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """From a checkpoint; None is the beginning."""
        state = state or {}
        self.first, self.last = list(state.get("first", [])), list(state.get("last", []))[-self.window :]
        self.fired_at = state.get("fired_at")


def _mean(pairs: list[list[float]], side: int) -> float:
    return sum(pair[side] for pair in pairs) / max(len(pairs), 1)
