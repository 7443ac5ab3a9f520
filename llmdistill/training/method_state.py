"""What a method itself remembers (schedules, replay buffers, averages), beside each checkpoint: one file a rank.

``torch.save`` writes it and the loader accepts plain data and tensors only, so a checkpoint cannot run code.

Resumed by another number of ranks, schedules are the first rank's, for they agree on all; what each rank keeps for
itself is put together and shared out anew by whoever keeps it (``shared``), and left out, which is said, where it
cannot be.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llmdistill.composition.method import Method
from llmdistill.errors import UserError
from llmdistill.teachers.base import Teacher
from llmdistill.teachers.student import StudentTeacher, whole_average


class MethodState:
    """Saves and restores the state of a method's schedules, of the sources of its texts, and of the student as judge.

    Args:
        rank, world: of this process, and how many there are.
    """

    def __init__(self, method: Method, judges: Mapping[str, Teacher], rank: int, world: int = 1) -> None:
        self.method, self.rank, self.world = method, rank, world
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

    def load(self, checkpoint: str | Path, *, relaid: bool = False) -> None:
        """Restores what this rank saved; resumed by another number of ranks, its share of what all of them did.

        Args:
            relaid: weights were kept in other parts than they are now.

        Raises:
            UserError: the method has a state, and the checkpoint has no such file or another method's.
        """
        files = sorted(Path(checkpoint).glob("method_state_*.pt"), key=lambda file: int(file.stem.rpartition("_")[2]))
        if not files:
            if any(state for kind in self.values().values() for state in kind.values()):
                raise UserError(
                    f"{checkpoint} has no {self._file(checkpoint, 0).name}, and this method has a state that belongs "
                    "to a checkpoint. Fix: resume from one that this method wrote."
                )
            return
        file = files[0]
        try:
            if relaid or len(files) != self.world:
                values = self._shared([torch.load(file := f, weights_only=True, mmap=True) for f in files])
            else:
                values = torch.load(file := files[self.rank], weights_only=True)
                if "judges" not in values:
                    values["judges"] = torch.load(file := files[0], weights_only=True)["judges"]
            self.restore(values)
        except UserError:
            raise
        except Exception as error:  # torch.load raises nearly anything on bytes that are no checkpoint
            reason = next(iter(str(error).splitlines()), "")
            raise UserError(
                f"{file} is not the state of this method ({type(error).__name__}: {reason}). "
                "Fix: resume from a checkpoint that the same method wrote."
            ) from error

    def _shared(self, every: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What this rank goes on with, of what every rank that wrote the checkpoint remembered."""
        texts = {name: self._dealt(name, [rank["texts"][name] for rank in every]) for name in every[0]["texts"]}
        parts = [rank["judges"] for rank in every if "judges" in rank]
        judges = {name: whole_average([part[name] for part in parts]) for name in parts[0]}
        return {"texts": texts, "schedules": every[0]["schedules"], "judges": judges}

    def _dealt(self, name: str, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if len(states) == self.world:
            return states[self.rank]
        deal = getattr(self.method.texts.get(name), "shared", None)
        if any(states) and deal is not None:
            found: dict[str, Any] = deal(states, self.rank, self.world)
            return found
        if any(states):
            warnings.warn(
                f"text {name!r} was drawn by {len(states)} processes, and there are {self.world} now: what each "
                "remembered of it cannot be shared out, and the first one's is taken",
                stacklevel=5,
            )
        return states[0]

    def _file(self, checkpoint: str | Path, rank: int) -> Path:
        return Path(checkpoint) / f"method_state_{rank}.pt"
