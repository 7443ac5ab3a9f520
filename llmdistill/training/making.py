"""The round of the next optimizer step: made when the step is, or ahead of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from llmdistill.training.ahead import RoundsAhead
from llmdistill.training.made import Made, rounds_of, save_rounds
from llmdistill.training.rounds import RoundTexts


class MadeRounds(RoundTexts):
    """The part of a trainer that has rounds made, and keeps those under way in its checkpoints."""

    ahead: RoundsAhead | None = None  # where rounds are made ahead, or last longer than a step

    def made(self, epoch_iterator: Iterator[list[Any]], num_batches: int) -> Made | None:
        """What the next optimizer step is made of; None: there is no such step."""
        if self.control.should_training_stop:  # resumed where a guard had stopped: nothing is trained
            return None
        if self.ahead is not None:
            made = None if self._all_steps_done() else self.ahead.next(epoch_iterator)
            # transformers counts a step's micro-batches by its own place in the rows, which K steps on a round are not
            return made if made is None or self.args.num_iterations == 1 else replace(made, inputs=num_batches)
        groups = self._groups(epoch_iterator, num_batches)
        if not groups:
            return None
        examples = self._of_mixture([example for group in groups for example in group])
        with self.meters.timed("time/rollout"):
            texts = self.draw(examples)
        return Made(self.state.global_step, len(groups), list(examples), texts, self.judges)

    def wait_for_rounds(self) -> None:
        if self.ahead is not None:
            self.ahead.wait()

    def restart_rounds(self, checkpoint: Any) -> None:
        """A run begins, from a checkpoint or none."""
        if self.ahead is not None:
            self.ahead.restart(rounds_of(checkpoint, self.args) if checkpoint else {})

    def save_rounds(self, checkpoint: str) -> None:
        """Writes those under way; before sources write their state, which that changes."""
        if self.ahead is not None:
            save_rounds(checkpoint, self.ahead.state_dict(), self.args)

    def abandon_rounds(self) -> None:
        """Ends what is under way, of a run that has failed or will not go on."""
        if self.ahead is not None:
            self.ahead.abandon()
