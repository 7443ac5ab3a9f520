"""Many right ways: a regime in which what is best is not what the teacher does on average.

A teacher picks one of eight ways uniformly, and a student knows one of them better than the others:

    417=   ->   3 5 0 6 ...   the way, then twelve digits, each looked up in that way's table by the two before it

Whoever wants whole answers right takes the way it knows. A divergence token by token asks for the teacher's choice.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import recovery_models
from models import EOS_ID, PAD_ID, cached, train
from recovery_models import RECIPE, STUDENT, TEACHER
from scores import distance
from transformers import PreTrainedModel

from llmdistill.models.generation import generate
from llmdistill.teachers.base import Teacher
from llmdistill.texts import Prompt, Sampling

WAYS = SIZE = 8
DIGITS = 12
TOKENS = DIGITS + 2  # of a completion, with the way and the end
SEED = 20_260_603


@cache
def tables() -> list[list[list[int]]]:
    """Of each way: eight rows, each a permutation of the digits."""
    rng = random.Random(SEED)
    return [[rng.sample(range(SIZE), SIZE) for _ in range(SIZE)] for _ in range(WAYS)]


@dataclass(frozen=True)
class Problem:
    """Two digits to go on from, in a way of one's own choice."""

    a: int
    b: int
    operation: str = "ways"

    @property
    def prompt(self) -> str:
        return f"{self.a}{self.b}="

    def by(self, way: int) -> str:
        """The completion by that way."""
        a, b, found = self.a, self.b, [str(way)]
        for _ in range(DIGITS):
            a, b = b, tables()[way][b][a]
            found.append(str(b))
        return "".join(found)

    def solved_by(self, text: str) -> bool:
        """Whether it is right in the way that it chose."""
        return text[:1] in tuple("01234567") and text == self.by(int(text[0]))


EVERYTHING = [Problem(a, b) for a in range(SIZE) for b in range(SIZE)]


def written(model: PreTrainedModel, temperature: float, seed: int, times: int = 1) -> list[tuple[Problem, str]]:
    """Completions of all problems, so many of each."""
    asked = EVERYTHING * times
    return list(zip(asked, recovery_models.written(model, asked, temperature, seed, TOKENS), strict=True))


def shares(found: Sequence[tuple[Problem, str]], best: int) -> dict[str, float]:
    """Of the texts: how many are right (``exact``), take way ``best``, and are right of those."""
    of_best = [(p, text) for p, text in found if text[:1] == str(best)]
    return {
        "exact": sum(p.solved_by(text) for p, text in found) / len(found),
        "best_way": len(of_best) / len(found),
        "right_on_best": sum(p.solved_by(text) for p, text in of_best) / max(1, len(of_best)),
    }


def lessons(batch: int, seed: int, knows: int | None = None, others: float = 1.0) -> Iterator[list[Prompt]]:
    """All ways as often; where ``knows`` is one, of the others only a share ``others`` teaches more than the choice."""
    rng = random.Random(seed)
    while True:
        made = []
        for problem in rng.choices(EVERYTHING, k=batch):
            way = rng.randrange(WAYS)
            silent = knows is not None and way != knows and rng.random() >= others
            lesson = recovery_models.as_prompt(problem, problem.by(way))
            made.append(replace(lesson, counts=(True, *[not silent] * (DIGITS + 1))))
        yield made


def make_teacher(note: Callable[[str], None]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Until 98 % of its samples are right."""
    model, found = TEACHER.build(5), dict[str, float]()

    def good(step: int) -> bool:
        note(f"a teacher of eight ways: step {step}, {found}")
        if step % 100:
            return False
        found.update(shares(written(model.eval(), 1.0, step, 4), 0))
        return found["exact"] >= 0.98

    seconds = train(model, lessons(64, 5), 3000, 3e-3, after=good, decay=False)
    return model, {"cpu_seconds": seconds, **found}


def start(seed: int, note: Callable[[str], None] = lambda text: None) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A student that knows the way of its seed better than the others: ends with half of that way's texts right."""
    best = seed % WAYS

    def make() -> tuple[PreTrainedModel, dict[str, Any]]:
        model, found = STUDENT.build(2000 + seed), dict[str, float]()

        def there(step: int) -> bool:
            note(f"start of seed {seed}, step {step}, {found}")
            if step % 25:
                return False
            found.update(shares(written(model.eval(), 1.0, step, 8), best), steps=step)
            return found["right_on_best"] >= 0.5

        seconds = train(model, lessons(64, seed, best, 0.2), 3000, 3e-3, after=there, decay=False)
        return model, {"cpu_seconds": seconds, "attempts": 1, **found}

    return cached(f"ways-start-{RECIPE}-{seed}", make)


def sampled(teacher: PreTrainedModel, n: int, seed: int) -> list[dict[str, str]]:
    """Rows of the teacher's samples."""
    found = written(teacher, 1.0, seed, -(-n // len(EVERYTHING)))[:n]
    random.Random(seed).shuffle(found)
    return [{"prompt": p.prompt, "completion": text, "domain": p.operation} for p, text in found if text]


@dataclass
class Ways:
    """Right texts greedily (``exact``) and at temperature 1 (``exact_t1``), how the best way fares, and nats a token
    from the teacher on the student's own text."""

    teacher: Teacher
    best: int

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        drawn = shares(written(model, 1.0, 14, 8), self.best)
        asked = [recovery_models.as_prompt(p) for p in EVERYTHING]
        own = generate(model, asked, Sampling(TOKENS, seed=12), eos_ids=(EOS_ID,), pad_id=PAD_ID)
        return {
            "exact": shares(written(model, 0.0, 0), self.best)["exact"],
            "exact_t1": drawn.pop("exact"),
            **drawn,
            "reverse_kl": distance(model, self.teacher, own).mean("reverse_kl"),
        }
