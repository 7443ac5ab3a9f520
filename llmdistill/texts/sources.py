"""Where the sequences of a round come from: the student, the dataset, the teacher, or a mix of them.

- ``student``: on-policy (METHODS 2.1).
- ``dataset``, ``teacher``: off-policy; the rows' own completions, or fresh ones of the teacher for the rows' prompts.
- ``mixed``: GKD's policy (arXiv 2306.13649, algorithm 1): a round is the student's with probability
  ``student_fraction``, else off-policy.
- ``adaptive``: DistiLLM's (arXiv 2402.03898, section 3.2). phi starts at 0 and grows by .1 whenever the validation loss
  has risen by eps since it last grew: a sign that the student meets too little of its own text. A round is replayed
  student text with probability phi; of these rounds, the share 1 - step/total (all, while the buffer is not full) is
  generated anew and remembered.

Which of them a round is does not depend on the rank, and a resumed run decides as the undisturbed one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from llmdistill.errors import UserError
from llmdistill.texts import Prompt, Rollout, request_seed
from llmdistill.texts.buffer import ReplayBuffer

Kind = Literal["student", "dataset", "teacher", "mixed", "adaptive"]
OffPolicy = Literal["dataset", "teacher"]
Drawn = tuple[Rollout, list[Prompt]]  # and the prompt of every sequence
Draw = Callable[[Sequence[Prompt]], Drawn]


@dataclass(frozen=True)
class Round:
    """What a policy may choose from for one optimizer step."""

    prompts: Sequence[Prompt]
    step: int  # optimizer steps done
    total: int  # optimizer steps of the run
    seed: int
    rank: int
    samples_per_prompt: int
    pad_id: int
    authors: Mapping[str, Draw]  # student, dataset, teacher
    drawn: list[str] = field(default_factory=list)  # who was asked, in turn
    places: Sequence[int] = ()  # of the prompts in the global batch, whatever number of processes shares it
    prompts_everywhere: int = 0  # of all processes

    def chance(self, what: str) -> float:
        """A uniform number in [0, 1) of this step, the same on every rank, and of no rank's own seeds."""
        digest = hashlib.blake2b(f"{what}:{self.seed}:{self.step}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2.0**64

    def draw(self, author: str) -> Drawn:
        self.drawn.append(author)
        return self.authors[author](self.prompts)

    @property
    def last_author(self) -> str:
        """Of the text drawn last. What is replayed is the student's."""
        return self.drawn[-1] if self.drawn else "student"


class Source(Protocol):
    """Where a text of a round comes from. ``uses`` names the authors it may be of."""

    uses: frozenset[str]

    def draw(self, round_: Round) -> Drawn: ...

    def evaluated(self, loss: float) -> None:
        """Called on every rank with the loss of each validation."""
        ...

    def numbers(self) -> Mapping[str, float]:
        """What is logged of it."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Stateless:
    """A source that nothing moves."""

    def evaluated(self, loss: float) -> None:
        """Nothing depends on it."""

    def numbers(self) -> Mapping[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is no state."""


class Around:
    """A source that makes something of what another one draws: its authors, and its state, are that one's."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.uses: frozenset[str] = source.uses
        self._numbers: dict[str, float] = {}  # logged beside the other's

    def evaluated(self, loss: float) -> None:
        self.source.evaluated(loss)

    def numbers(self) -> Mapping[str, float]:
        return {**self.source.numbers(), **self._numbers}

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state)

    @property
    def shared(self) -> Any:
        """Of the other, where it can share out its state among another number of ranks."""
        return getattr(self.source, "shared", None)


class Only(Stateless):
    """Always the same author.

    Args:
        optional: rows need not have what it takes; those without are sequences in which nothing counts.
    """

    def __init__(self, author: str, *, optional: bool = False) -> None:
        self.author, self.optional, self.uses = author, optional, frozenset({author})

    def draw(self, round_: Round) -> Drawn:
        return round_.draw(self.author)


class Mixed(Stateless):
    """The student's text in a share of the rounds."""

    def __init__(self, student_fraction: float, off_policy: str = "dataset") -> None:
        if not 0.0 <= student_fraction <= 1.0:
            raise ValueError(f"student_fraction is {student_fraction}; it is a probability in [0, 1]")
        self.student_fraction, self.off_policy = student_fraction, off_policy
        self.uses = frozenset({"student", off_policy})

    def draw(self, round_: Round) -> Drawn:
        return round_.draw("student" if round_.chance("mixed") < self.student_fraction else self.off_policy)


class Adaptive:
    """DistiLLM's schedule with its replay buffer; ``eps`` is in nats of the validation loss."""

    validated = True  # a validation before the first step is what the first one after it is compared with

    def __init__(
        self, off_policy: str = "dataset", capacity: int = 1000, eps: float = 0.1, growth: float = 0.1
    ) -> None:
        self.off_policy, self.eps, self.growth = off_policy, eps, growth
        self.uses = frozenset({"student", off_policy})
        self.buffer = ReplayBuffer(capacity)
        self.phi = 0.0
        self.last_loss: float | None = None

    def draw(self, round_: Round) -> Drawn:
        chance = round_.chance("adaptive")
        if chance >= self.phi:
            return round_.draw(self.off_policy)
        fresh = self.phi * (1.0 - round_.step / max(round_.total, 1))
        if chance < fresh or not self.buffer.full:
            drawn = round_.draw("student")
            self.buffer.add(*drawn)
            return drawn
        round_.drawn.append("student")
        n = len(round_.prompts) * round_.samples_per_prompt
        return self.buffer.draw(n, request_seed(round_.seed, round_.step, round_.rank), round_.pad_id)

    def evaluated(self, loss: float) -> None:
        if self.last_loss is None:
            self.last_loss = loss
        elif loss >= self.last_loss + self.eps:
            self.phi, self.last_loss = min(1.0, self.phi + self.growth), loss

    def numbers(self) -> Mapping[str, float]:
        return {"phi": self.phi, "replayable": float(len(self.buffer))}

    def state_dict(self) -> dict[str, Any]:
        return {"phi": self.phi, "last_loss": self.last_loss, "buffer": self.buffer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.phi, self.last_loss = state["phi"], state["last_loss"]
        self.buffer.load_state_dict(state["buffer"])

    def shared(self, states: Sequence[dict[str, Any]], rank: int, world: int) -> dict[str, Any]:
        """What one of ``world`` ranks goes on with, of the states of those that there were: its share."""
        buffer = ReplayBuffer(self.buffer.capacity)
        buffer.take_share([state["buffer"] for state in states], rank, world)
        return {**states[0], "buffer": buffer.state_dict()}


def checked_source(source: Source | str, config: str, of_student: str) -> Source:
    """A source that a trainer was given in place of a setting.

    Args:
        config: whose setting ``sequences`` is.
        of_student: what needs tokens that the student drew, or nothing.

    Raises:
        UserError: a name where a source is wanted, or one of other text than is needed.
    """
    if isinstance(source, str):
        raise UserError(
            f"sequences={source!r} is a name, and names are settings: they are checked against the others. "
            f"Fix: {config}(sequences={source!r}); the argument takes a source of your own."
        )
    if of_student and source.uses != {"student"}:
        raise UserError(
            f"{of_student} needs tokens that the student drew, and {type(source).__name__} uses "
            f"{', '.join(sorted(source.uses))}. Fix: --estimator full or top_k."
        )
    return source


def make_source(
    kind: Kind, *, student_fraction: float, off_policy: OffPolicy, replay_size: int, adaptive_eps: float
) -> Source:
    """The policy the settings name."""
    if kind == "mixed":
        return Mixed(student_fraction, off_policy)
    if kind == "adaptive":
        return Adaptive(off_policy, replay_size, adaptive_eps)
    return Only(kind)
