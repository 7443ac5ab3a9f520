"""Watches both sides of pairs while a loss that is unbounded below pushes log p(rejected) down.

REDI's negative term can take the chosen side with it: at alpha 1 and too high a learning rate both log-probs fall, the
loss with them, and the student is gone before a benchmark is next looked at (arXiv 2505.24850). And it can run away on
its own, for nothing bounds it: the loss still falls where the rejected side is as unlikely as noise.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmdistill.errors import UserError

logger = logging.getLogger(__name__)

SIDES = ("chosen", "rejected")


@dataclass
class Guard:
    """Compares the last ``window`` optimizer steps (fewer, as long as there are fewer) with the first one.

    Only the first step's log-probs are measured before any update, so no collapse, however early, is part of what it
    is compared with; a mean over the first steps would be. It is a sample of one batch: steps of 8 pairs of the shipped
    recipe vary by 0.04 nats on the chosen and by 0.07 on the rejected side (standard deviations), far less than the
    limits below. Batches of a single short pair may want larger ones.

    Args:
        drop: nats per token by which the mean chosen log-prob may fall.
        window: steps that the mean of now is over.
        rejected_drop: the same of the rejected side, which is meant to fall. 2 makes every token of the wrong answers
            7 times less likely; it is 30 times what the shipped recipe's run loses (0.06 on held-out pairs), and 5
            times what the arena's REDI loses at 60 times its learning rate (0.35; at its own, nothing).
    """

    drop: float = 0.5
    window: int = 10
    rejected_drop: float = 2.0
    # What a resumed run needs: per-step means (chosen, rejected), and the optimizer step at which a side fired.
    start: list[float] | None = None
    last: list[list[float]] = field(default_factory=list)
    fired: dict[str, int] = field(default_factory=dict)

    def observe(self, chosen: float, rejected: float, step: int) -> list[str]:
        """Takes one step's mean log-probs over the global batch. The sides whose fall is first beyond its limit."""
        self.start = self.start or [chosen, rejected]
        self.last = [*self.last, [chosen, rejected]][-self.window :]
        beyond = {"chosen": self.fall > self.drop, "rejected": self.rejected_fall > self.rejected_drop}
        newly_fired = [side for side in SIDES if beyond[side] and side not in self.fired]
        self.fired |= dict.fromkeys(newly_fired, step)
        return newly_fired

    @property
    def fired_at(self) -> int | None:
        """The optimizer step at which the first side fell too far."""
        return min(self.fired.values(), default=None)

    @property
    def fall(self) -> float:
        """Nats per token that the chosen side has lost; negative where it gained."""
        return self._fall(0)

    @property
    def rejected_fall(self) -> float:
        """The same of the rejected side."""
        return self._fall(1)

    def numbers(self) -> dict[str, float]:
        """Where both sides began and where they are."""
        return {
            f"{side}_{when}": value
            for i, side in enumerate(SIDES)
            for when, value in (("start", self._start(i)), ("now", _mean(self.last, i)))
        }

    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` says of it."""
        sides = [side for side in SIDES if side in self.fired]
        falls = {"fall": self.fall, "rejected_fall": self.rejected_fall}
        return {"fired_at": self.fired_at, "fired_on": sides, **falls, **self.numbers()}

    def warn(self, side: str, stops: bool) -> None:
        """Says what happened to a side at the step it fired at."""
        n, i = self.numbers(), SIDES.index(side)
        other = SIDES[1 - i]
        setting, limit = (("guard_drop", self.drop), ("guard_rejected_drop", self.rejected_drop))[i]
        logger.warning(
            "step %d: the %s side's mean log-prob per token is %.3f, %.3f below the %.3f it began with (objective.%s "
            "is %g); the %s side's is %.3f and began at %.3f. %s %s",
            *(self.fired[side], side, n[f"{side}_now"], self._fall(i), n[f"{side}_start"], setting, limit),
            *(other, n[f"{other}_now"], n[f"{other}_start"]),
            ("The student unlearns what it should learn.", "The negative term, which nothing bounds, runs away.")[i],
            "Training stops here. Fix: lower objective.alpha or train.learning_rate."
            if stops
            else "Fix: lower objective.alpha or train.learning_rate; --guard_stop true stops at this point.",
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON."""
        return {"start": self.start, "last": self.last, "fired": self.fired}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """From a checkpoint; None is the beginning.

        Raises:
            UserError: it is not the state of a guard.
        """
        state = state or {}
        try:
            if "first" in state:  # before it watched both sides: several first steps, and the one step it fired at
                at = state["fired_at"]
                fired = {} if at is None else {"chosen": at}
                state = {**state, "start": next(iter(state["first"]), None), "fired": fired}
            start, fired = state.get("start"), dict(state.get("fired", {}))
            last = [[float(c), float(r)] for c, r in state.get("last", [])]
            self.start = None if start is None else [float(x) for _, x in zip(SIDES, start, strict=True)]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"the guard's state in the checkpoint's trainer_state.json cannot be read ({type(error).__name__}: "
                f"{error}). Fix: resume from a checkpoint of this version, or start again without --resume."
            ) from error
        self.last, self.fired = last[-self.window :], fired

    def _start(self, side: int) -> float:
        return self.start[side] if self.start else 0.0

    def _fall(self, side: int) -> float:
        return self._start(side) - _mean(self.last, side)


def _mean(pairs: list[list[float]], side: int) -> float:
    return sum(pair[side] for pair in pairs) / max(len(pairs), 1)
