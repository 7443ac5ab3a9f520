"""Teachers, starting points and the text sampled from teachers: made once, kept under runs/arena/.

addition     the teacher of the arena, and the oracle of the teacher-hacking track
quick        the same after less than half of the training, for a first look
subtraction  the second expert
weak         addition broken off early: about 60 % of its samples are right
grouped      ``addition`` with a vocabulary of numerals of two digits
imitator     a smaller model trained on samples of ``addition``, which it does not quite reach
recovery...  those of another task, see recovery_models.py
ways         that of a third, see ways.py
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import recovery_models
import torch
import ways
from clock import Charge
from models import GROUPED, TOKENIZER, Size, accuracy, answers, as_prompt, cached, kept_text, shuffled, train
from recovery_models import TEACHERS as RECOVERY
from recovery_models import make_teacher
from task import VOCABULARY, Problem, draw, heldout, problems
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmdistill.texts import Prompt

TEACHER = Size(128, 2, 4, 344)
RECIPE = 1  # raised by hand with every change to a teacher: what was made by an earlier one is not used


@dataclass(frozen=True)
class Text:
    """Problems and what a teacher wrote on each, sampled at temperature 1."""

    problems: list[Problem]
    completions: list[list[str]]  # of every problem, so many samples
    cpu_seconds: float

    def charge(self) -> Charge:
        n = sum(len(c) for c in self.completions)
        return Charge(self.cpu_seconds / n, n)

    def rows(self) -> list[dict[str, str]]:
        """A dataset row per problem, with the first sample, unless the teacher said nothing."""
        return [p.row(c[0]) for p, c in zip(self.problems, self.completions, strict=True) if c[0]]

    def right(self) -> list[dict[str, str]]:
        """A row for every sample whose answer is right."""
        pairs = zip(self.problems, self.completions, strict=True)
        return [p.row(c) for p, found in pairs for c in found if p.solved_by(c)]

    def pairs(self) -> list[dict[str, str]]:
        """prompt, chosen, rejected: for each problem, a right sample against a different wrong one."""
        made = []
        for problem, found in zip(self.problems, self.completions, strict=True):
            right = [c for c in found if problem.solved_by(c)]
            wrong = [c for c in found if c.strip() and not problem.solved_by(c)]  # nothing at all is no answer
            for chosen, rejected in zip(right, wrong, strict=False):
                made.append({"prompt": problem.prompt, "chosen": chosen, "rejected": rejected})
        return made


def fresh(
    operations: Sequence[str], batch: int, seed: int, tok: PreTrainedTokenizerBase = TOKENIZER
) -> Iterator[list[Prompt]]:
    """True completions of problems that never come twice in a row: unlimited demonstrations, none of them held out."""
    rng, kept_apart = random.Random(seed), {p for op in ("+", "-") for p in heldout(2000, (op,))}
    while True:
        drawn = [draw(rng, operations) for _ in range(batch)]
        yield [as_prompt(p, tok=tok) for p in drawn if p not in kept_apart]


def teacher(name: str, note: Callable[[str], None] = lambda text: None) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The teacher of that name and what is known of it (CPU seconds to train, exact match on held-out problems)."""
    return cached(key_of(name), lambda: MAKERS[name](note))


def key_of(name: str) -> str:
    """Under which it is kept: by its name and its recipe's number."""
    return f"{name}-{recovery_models.RECIPE if name in RECOVERY or name == 'ways' else RECIPE}"


def expert(
    operation: str, seed: int, steps: int = 1000, tok: PreTrainedTokenizerBase = TOKENIZER
) -> Callable[[Callable[[str], None]], Any]:
    def make(note: Callable[[str], None]) -> tuple[PreTrainedModel, dict[str, Any]]:
        model, test = TEACHER.build(seed, len(tok)), heldout(500, (operation,))
        seconds = train(
            model,
            fresh((operation,), 64, seed, tok),
            steps,
            3e-3,
            after=lambda step: note(f"training the teacher for {operation}: step {step}/{steps}") is not None,
        )
        about = {"cpu_seconds": seconds, "steps": steps, "exact": accuracy(model, test)}
        return model, about

    return make


def weak(note: Callable[[str], None]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Training broken off at the first step after which 57 % or more of 300 samples are right."""
    model, check, found = TEACHER.build(7), problems(300, 70), {}

    def good_enough(step: int) -> bool:
        note(f"training the weak teacher: step {step}")
        if step % 10 or step < 100:
            return False
        found["sampled"] = accuracy(model.eval(), check, temperature=1.0, seed=step)
        return found["sampled"] >= 0.57

    seconds = train(model, fresh(("+",), 64, 7), 1000, 3e-3, after=good_enough)
    test = heldout(1000)
    sampled = accuracy(model, test, temperature=1.0)
    return model, {"cpu_seconds": seconds, "exact": accuracy(model, test), "exact_sampled": sampled}


def imitator(note: Callable[[str], None]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Trained on 4,000 samples of ``addition``: enough to learn the task, too few to be as good."""
    oracle, _ = teacher("addition", note)
    text = sample("addition", oracle, 4000, 1, 90)
    rows = [as_prompt(p, c[0]) for p, c in zip(text.problems, text.completions, strict=True)]
    model, steps = Size(64, 2, 4, 172).build(9), 600
    after = lambda step: note(f"training the imitator: step {step}/{steps}") is not None  # noqa: E731
    seconds = train(model, shuffled(rows, 64, 9), steps, 3e-3, after=after)
    test = heldout(500)
    sampled = accuracy(model, test, temperature=1.0)
    return model, {"cpu_seconds": seconds, "exact": accuracy(model, test), "exact_sampled": sampled}


MAKERS: dict[str, Callable[[Callable[[str], None]], Any]] = {
    "addition": expert("+", 1),
    "subtraction": expert("-", 2),
    "grouped": expert("+", 3, tok=GROUPED),
    "quick": expert("+", 1, steps=450),
    "weak": weak,
    "imitator": imitator,
    "ways": ways.make_teacher,
    **{name: partial(make_teacher, *settings) for name, settings in RECOVERY.items()},
}


def sample(
    name: str, model: PreTrainedModel, n: int, samples: int, seed: int, operations: Sequence[str] = ("+",)
) -> Text:
    """``samples`` completions by teacher ``name`` of each of ``n`` problems (those of that seed), kept on disk."""
    drawn = problems(n, seed, operations)

    def make() -> list[Any]:
        columns = [answers(model, drawn, temperature=1.0, seed=seed + 7919 * k) for k in range(samples)]
        return list(zip(*columns, strict=True))

    made, cpu_seconds = kept_text(f"{name}-{RECIPE}-{n}x{samples}-{seed}{''.join(operations)}", make)
    return Text(drawn, [list(c) for c in made], cpu_seconds)


def start(
    key: str,
    size: Size,
    rows: Sequence[Prompt],
    steps: int,
    lr: float,
    seed: int,
    *,
    band: tuple[float, float] = (0.0, 1.0),
    operations: Sequence[str] = ("+",),
    batch: int = 64,
    vocabulary: int = VOCABULARY,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A student trained on ``rows`` only: where all methods of a track start from, one for every seed.

    Its initial weights and the order of the rows are drawn until its exact match on problems that are neither trained
    on nor scored lies in ``band``. From the same rows it comes out anywhere between 10 % and 45 %, and what a budget
    adds depends on that more than on any method.

    Raises:
        RuntimeError: after 40 starts outside the band.
    """

    def make() -> tuple[PreTrainedModel, dict[str, Any]]:
        check, seconds = problems(500, 71, operations), 0.0
        for attempt in range(40):
            drawn = seed + 100 * attempt
            model = size.build(1000 + drawn, vocabulary)
            torch.manual_seed(drawn)
            note(f"start of seed {seed}, attempt {attempt + 1}")
            seconds += train(model, shuffled(rows, batch, drawn), steps, lr)
            exact = accuracy(model, check)
            if band[0] <= exact <= band[1]:
                return model, {"cpu_seconds": seconds, "steps": steps, "exact": exact, "attempts": attempt + 1}
        raise RuntimeError(f"40 starts, and none of them right on {band[0]:.0%} to {band[1]:.0%} of the problems")

    return cached(key, make)
