"""What every teacher can do, wherever it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from llmdistill.objectives.rows import TeacherRows
from llmdistill.texts import Prompt, Rollout, Sampling
from llmdistill.wire.blocks import ScoreBlock


@dataclass(frozen=True)
class TeacherInfo:
    """Identity and limits of a teacher, as the preflight compares them with the student's."""

    name: str
    fingerprint: str  # of the weights
    tokenizer: str  # fingerprint of the vocabulary
    vocab_size: int  # columns of the output head
    eos_ids: tuple[int, ...]
    context_length: int
    template: str | None  # hash of the chat template


class Teacher(Protocol):
    """Generates sequences and scores them. Log-probs are full-vocabulary log-softmax at temperature 1."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollout: ...

    def score(self, rollout: Rollout, top_k: int, chosen: Tensor | None = None) -> list[ScoreBlock]:
        """One block per sequence over its counted tokens; ``top_k`` 0 lists none but those asked for.

        Args:
            chosen: [N, C] ids to list in row N's block beside the teacher's ``top_k``, -1 where a row has fewer.
                The rows are those of ``rollout.token_rows()``; ids already listed are not listed twice.
        """
        ...

    def info(self) -> TeacherInfo: ...

    def close(self) -> None: ...


@runtime_checkable
class DenseTeacher(Protocol):
    """A teacher in this process whose whole distribution can be had without ever being written down."""

    def dense(self, rollout: Rollout) -> TeacherRows:
        """Rows of the counted tokens that become logits a chunk at a time: final hidden rows, on the host, with their
        head, or a composition of such."""
        ...


@runtime_checkable
class HiddenTeacher(Protocol):
    """A teacher in this process whose layers can be read."""

    def hidden_layers(self, rollout: Rollout, layers: Sequence[int]) -> list[Tensor]:
        """Hidden states [N, H] of each of these decoder layers at the rows of the counted tokens."""
        ...


def is_live(teacher: Teacher) -> bool:
    """False for a teacher that only replays what was stored: it generates nothing, and scores nothing new."""
    return bool(getattr(teacher, "live", True))


def max_top_k(teacher: Teacher) -> int:
    """The most tokens a position that ``score`` lists: a server has its limit, others list their whole vocabulary.

    A teacher with a limit has an attribute ``max_top_k``. Of one that cannot score ids of the caller's choice
    ``scores_chosen`` is False.
    """
    limit, vocab = getattr(teacher, "max_top_k", None), teacher.info().vocab_size
    return vocab if limit is None else min(limit, vocab)


def writes(teacher: Teacher) -> bool:
    """Whether it can be asked for completions: not one that only replays, nor the student as its own judge."""
    return is_live(teacher) and bool(getattr(teacher, "writes", True))


def bytes_received(teacher: Teacher) -> int | None:
    """Over the wire so far, also by the teacher behind a cache; None where nothing comes over a wire."""
    behind = getattr(teacher, "teacher", None)
    return getattr(teacher, "bytes_received", None) if behind is None else bytes_received(behind)
