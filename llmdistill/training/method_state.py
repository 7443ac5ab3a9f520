"""What a method itself remembers (a schedule, a replay buffer), beside each checkpoint: one small JSON file a rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmdistill.errors import UserError
from llmdistill.training.method import Objective
from llmdistill.training.sequences import Sequences


class MethodState:
    """Saves and restores the state of an objective and a data policy.

    Args:
        rank: of this process.
    """

    def __init__(self, objective: Objective, sequences: Sequences, rank: int) -> None:
        self.objective, self.sequences, self.rank = objective, sequences, rank

    def values(self) -> dict[str, Any]:
        schedule = self.objective.schedule
        return {"sequences": self.sequences.state_dict(), "schedule": schedule.state_dict() if schedule else {}}

    def save(self, checkpoint: str | Path) -> None:
        self._file(checkpoint, self.rank).write_text(json.dumps(self.values()))

    def restore(self, values: dict[str, Any]) -> None:
        """Takes what :meth:`values` gave."""
        self.sequences.load_state_dict(values["sequences"])
        if self.objective.schedule is not None:
            self.objective.schedule.load_state_dict(values["schedule"])

    def load(self, checkpoint: str | Path) -> None:
        """Restores what this rank saved; where there were fewer ranks, what the first one did.

        Raises:
            UserError: the method has a state, and the checkpoint has no such file or another method's.
        """
        files = [self._file(checkpoint, self.rank), self._file(checkpoint, 0)]
        file = next((f for f in files if f.is_file()), None)
        if file is None:
            if any(self.values().values()):
                raise UserError(
                    f"{checkpoint} has no {files[0].name}, and this method has a state that belongs to a checkpoint. "
                    "Fix: resume from one that this method wrote."
                )
            return
        try:
            state = json.loads(file.read_text())
            if bool(state["schedule"]) != bool(self.values()["schedule"]):
                raise ValueError("a schedule on one side only")
            self.restore(state)
        except (KeyError, TypeError, ValueError) as error:  # every run writes the file, a run of another method too
            raise UserError(
                f"{file} is not the state of this method ({type(error).__name__}: {error}). "
                "Fix: resume from a checkpoint that the same method wrote."
            ) from error

    def _file(self, checkpoint: str | Path, rank: int) -> Path:
        return Path(checkpoint) / f"method_state_{rank}.json"
