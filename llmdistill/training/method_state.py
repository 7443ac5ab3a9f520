"""What a method itself remembers (schedules, replay buffers, averages), beside each checkpoint: one file a rank.

``torch.save`` writes it and the loader accepts plain data and tensors only, so a checkpoint cannot run code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmdistill.composition.method import Method
from llmdistill.errors import UserError
from llmdistill.teachers.base import Teacher
from llmdistill.teachers.student import StudentTeacher


class MethodState:
    """Saves and restores the state of a method's schedules, of the sources of its texts, and of the student as judge.

    Args:
        rank: of this process.
    """

    def __init__(self, method: Method, judges: Mapping[str, Teacher], rank: int) -> None:
        self.method, self.rank = method, rank
        self.judges = {name: judge for name, judge in judges.items() if isinstance(judge, StudentTeacher)}

    def values(self) -> dict[str, Any]:
        return {
            "texts": {name: source.state_dict() for name, source in self.method.texts.items()},
            "schedules": {name: schedule.state_dict() for name, schedule in self.method.schedules.items()},
            "judges": {name: judge.state_dict() for name, judge in self.judges.items()},
        }

    def save(self, checkpoint: str | Path) -> None:
        state = self.values()
        if self.rank > 0 and not any(judge.sharded for judge in self.judges.values()):
            state.pop("judges")  # the first rank's file has all of it
        torch.save(state, self._file(checkpoint, self.rank))

    def restore(self, values: dict[str, Any]) -> None:
        """Takes what :meth:`values` gave."""
        parts: dict[str, Mapping[str, Any]] = {
            "texts": self.method.texts,
            "schedules": self.method.schedules,
            "judges": self.judges,
        }
        for kind, parts_here in parts.items():
            if sorted(values[kind]) != sorted(parts_here):
                raise ValueError(f"{kind} {sorted(values[kind])} there, {sorted(parts_here)} here")
            for name, part in parts_here.items():
                part.load_state_dict(values[kind][name])

    def load(self, checkpoint: str | Path) -> None:
        """Restores what this rank saved; where there were fewer ranks, what the first one did.

        Raises:
            UserError: the method has a state, and the checkpoint has no such file or another method's.
        """
        files = [self._file(checkpoint, self.rank), self._file(checkpoint, 0)]
        file = next((f for f in files if f.is_file()), None)
        if file is None:
            if any(state for kind in self.values().values() for state in kind.values()):
                raise UserError(
                    f"{checkpoint} has no {files[0].name}, and this method has a state that belongs to a checkpoint. "
                    "Fix: resume from one that this method wrote."
                )
            return
        try:
            values = torch.load(file, weights_only=True)
            if "judges" not in values:
                values["judges"] = torch.load(files[1], weights_only=True)["judges"]
            self.restore(values)
        except Exception as error:  # torch.load raises nearly anything on bytes that are no checkpoint
            reason = next(iter(str(error).splitlines()), "")
            raise UserError(
                f"{file} is not the state of this method ({type(error).__name__}: {reason}). "
                "Fix: resume from a checkpoint that the same method wrote."
            ) from error

    def _file(self, checkpoint: str | Path, rank: int) -> Path:
        return Path(checkpoint) / f"method_state_{rank}.pt"
