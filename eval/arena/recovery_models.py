"""Teachers, starts and texts of the task "recovery", kept under runs/arena/ like the others.

recovery          has seen mistakes of every kind, and repairs them
recovery_blind    as good on its own text, and has never seen a mistake
recovery_six      of the task with six digits, where the guess can be learned
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from models import EOS_ID, PAD_ID, Size, cached, kept_text, train
from models import texts as completions
from recovery_task import (
    RIGHT,
    SIZE,
    TOKENS,
    VOCABULARY,
    Mistakes,
    Problem,
    Reading,
    continued,
    everything,
    injected,
    shares,
    tokenizer,
)
from transformers import PreTrainedModel

from llmdistill.models.generation import generate
from llmdistill.texts import Prompt, Sampling

RECIPE = 3  # raised by hand with every change to what is made here
STARTS = 4  # the same, of the starts alone
TOKENIZER = tokenizer()


@dataclass(frozen=True)
class LongSize(Size):
    """With the base of the rotary embedding, which for 128 positions is better low, and the spread of the weights at
    the start: from the usual .02 neither the table nor which digit stands was learned in 1,850 steps."""

    theta: float = 1000.0
    spread: float = 0.1

    def build(self, seed: int, vocabulary: int = VOCABULARY) -> PreTrainedModel:
        model = super().build(seed, vocabulary)
        config = model.config
        config.rope_parameters = {"rope_type": "default", "rope_theta": self.theta}
        config.initializer_range = self.spread
        torch.manual_seed(seed)
        return type(model)(config).float()


STUDENT = LongSize(48, 2, 4, 128)  # 56 thousand weights
TEACHER = LongSize(64, 2, 4, 192)  # 107 thousand


class Asked(Protocol):
    """What is asked, in these ten symbols."""

    @property
    def prompt(self) -> str: ...

    @property
    def operation(self) -> str: ...


def as_prompt(problem: Asked, text: str | None = None, put_in: Sequence[bool] = ()) -> Prompt:
    """With a completion, of which the tokens that were put in do not count."""
    encoded = [list(TOKENIZER(t, add_special_tokens=False)["input_ids"]) for t in (problem.prompt, text or "")]
    counts = (*(not p for p in put_in), True) if put_in else ()
    completion = () if text is None else (*encoded[1], EOS_ID)
    return Prompt(encoded[0], problem.prompt, problem.operation, completion=completion, counts=counts)


def written(
    model: PreTrainedModel, problems: Sequence[Asked], temperature: float, seed: int = 0, tokens: int = TOKENS
) -> list[str]:
    """A completion of every problem."""
    sampling = Sampling(tokens, temperature=temperature, seed=seed)
    rollout = generate(model, [as_prompt(p) for p in problems], sampling, eos_ids=(EOS_ID,), pad_id=PAD_ID)
    return [text.replace(" ", "") for text in completions(rollout, TOKENIZER)]


def scored(model: PreTrainedModel, problems: Sequence[Problem], temperature: float, seed: int = 0) -> dict[str, float]:
    """The shares of :func:`recovery_task.shares`."""
    texts = written(model, problems, temperature, seed)
    return shares([Reading.of(p, text) for p, text in zip(problems, texts, strict=True)])


def astray(size: int, batch: int, seed: int, mistakes: Mistakes) -> Iterator[list[Prompt]]:
    """Traces with new mistakes every time."""
    rng, problems = random.Random(seed), everything(size)
    while True:
        drawn = [rng.choice(problems) for _ in range(batch)]
        traces = [injected(p, rng, mistakes) for p in drawn]
        yield [as_prompt(p, trace.text, trace.put_in) for p, trace in zip(drawn, traces, strict=True)]


# Wrong guesses, wrong workings, random states: of the teacher's first and second stage, of the student's start, and of
# the offline text that holds mistakes.
TEACHERS_FIRST, TEACHERS_SECOND = Mistakes(0.40, 0.13, 0.15), Mistakes(0.50, 0.0, 0.10)
STUDENTS, OFFLINE = Mistakes(0.75, 0.0, 0.10), Mistakes(0.50, 0.0, 0.0)


def make_teacher(size: int, seed: int, sees_mistakes: bool, note: Callable[[str], None]) -> tuple[Any, dict[str, Any]]:
    """1,400 steps of 32 at 4e-3, then at most 1,500 more at 2.5e-3 until 97 % of 256 samples are exact."""
    model, check = TEACHER.build(seed), everything(size)[::2][:256]
    stages = (TEACHERS_FIRST, TEACHERS_SECOND) if sees_mistakes else (Mistakes(), Mistakes())
    found: dict[str, float] = {}

    def good(step: int) -> bool:
        note(f"a teacher of {size} digits: step {step}, {found}")
        if step % 50 or step < 100:
            return False
        found.update(scored(model.eval(), check, 1.0, step))
        return found["exact"] >= 0.97

    def said(step: int) -> bool:
        note(f"a teacher of {size} digits: step {step}")
        return False

    seconds = train(model, astray(size, 32, seed, stages[0]), 1400, 4e-3, after=said)
    seconds += train(model, astray(size, 32, seed + 1, stages[1]), 1500, 2.5e-3, after=good)
    about = {"cpu_seconds": seconds, **scored(model, everything(size), 1.0)}
    about["corrected"] = repairs(model, size)
    return model, about


def repairs(model: PreTrainedModel, size: int, n: int = 256) -> float:
    """Share of wrong guesses, put in at the tenth step, whose verdict is the right digit."""
    rng, right = random.Random(5), 0
    problems = [rng.choice(everything(size)) for _ in range(n)]
    for problem in problems:
        trace = injected(problem, rng, Mistakes()).text
        true = trace[27]
        wrong = str((int(true) + rng.randrange(1, size)) % size)
        given = Prompt(
            list(TOKENIZER(problem.prompt + trace[:27] + wrong, add_special_tokens=False)["input_ids"]), problem.prompt
        )
        rollout = generate(model, [given], Sampling(2, temperature=0.0), eos_ids=(EOS_ID,), pad_id=PAD_ID)
        right += TOKENIZER.decode(rollout.input_ids[0][-1:].tolist()) == true
    return right / n


# Digits, seed, and whether it sees mistakes: see teachers.MAKERS.
TEACHERS = {"recovery": (SIZE, 1, True), "recovery_blind": (SIZE, 2, False), "recovery_six": (6, 3, True)}


# A start that knows how to go on, repairs most of its mistakes and makes many. Some of those do not know a few entries
# of the table: hardly one greedy trace is right then, before and after 300k tokens of anything: nothing can be read.
STEP_BAND, MOST_GUESSED, EXACT_BAND = (0.65, 0.72), 0.30, (0.1, 0.5)


def start(
    size: int, seed: int, student: Size = STUDENT, note: Callable[[str], None] = lambda text: None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A student trained on traces with mistakes until its samples' steps are right as often as the band says, and its
    guesses seldom; drawn again where it never is there at one time, or its greedy traces are then right too seldom or
    too often. The rejected ones are in what is known of it.

    Raises:
        RuntimeError: after 20 of them.
    """

    def make() -> tuple[PreTrainedModel, dict[str, Any]]:
        check, rejected, spent = everything(size)[::2][:128], [], 0.0
        for attempt in range(20):
            drawn = seed + 100 * attempt
            model, found = student.build(1000 + drawn, VOCABULARY), dict[str, float]()

            def there(step: int, model: PreTrainedModel = model, found: dict[str, float] = found) -> bool:
                note(f"start of seed {seed}, drawn {len(rejected) + 1} times, step {step}")
                if step < 300 or step % (10 if found.get("steps_right", 0.0) > 0.4 else 50):
                    return False
                found.update(scored(model.eval(), check, 1.0, step), steps=step)
                return found["steps_right"] >= STEP_BAND[0]

            spent += train(model, astray(size, 16, drawn, STUDENTS), 1500, 3e-3, after=there, decay=False)
            found["greedy"] = scored(model.eval(), check, 0.0)["exact"]
            knows = EXACT_BAND[0] <= found["greedy"] <= EXACT_BAND[1]
            if knows and STEP_BAND[0] <= found["steps_right"] <= STEP_BAND[1] and found["guessed"] < MOST_GUESSED:
                return model, {"cpu_seconds": spent, "attempts": attempt + 1, "rejected": rejected, **found}
            rejected.append(dict(found))
        raise RuntimeError(f"20 starts, and none in {STEP_BAND}, below {MOST_GUESSED} and in {EXACT_BAND}: {rejected}")

    return cached(f"recovery-start-{STARTS}-{size}-{'-'.join(map(str, asdict(student).values()))}-{seed}", make)


@dataclass(frozen=True)
class Text:
    """Prompts and completions, and the CPU seconds that they took."""

    rows: list[dict[str, str]]
    cpu_seconds: float


def sampled(name: str, model: PreTrainedModel, size: int, n: int, seed: int) -> Text:
    """The teacher's samples on ``n`` prompts drawn from all there are, kept on disk."""
    rng = random.Random(seed)
    drawn = [rng.choice(everything(size)) for _ in range(n)]

    def make() -> list[str]:
        return [text for k in range(0, n, 512) for text in written(model, drawn[k : k + 512], 1.0, seed + k)]

    texts, cpu_seconds = kept_text(f"{name}-{RECIPE}-{n}-{seed}", make)
    return Text([p.row(text) for p, text in zip(drawn, texts, strict=True) if text], cpu_seconds)


def with_mistakes(size: int, n: int, seed: int) -> Text:
    """True traces with wrong guesses put in and repaired, half of the steps: text of nobody, free of charge."""
    rng = random.Random(seed)
    drawn = [rng.choice(everything(size)) for _ in range(n)]
    return Text([p.row(injected(p, rng, OFFLINE).text) for p in drawn], 0.0)


def pairs(size: int, n: int, seed: int) -> list[dict[str, str]]:
    """A trace with a wrong guess and its repair, and the same up to there with a verdict that lets it stand or repairs
    it wrongly, which then goes on rightly from where it is: long right prefixes, a wrong token, right steps again."""
    rng, made = random.Random(seed), list[dict[str, str]]()
    while len(made) < n:
        problem = rng.choice(everything(size))
        good = injected(problem, rng, OFFLINE)
        repaired = [i for i in range(2, len(good.text), 3) if good.text[i] != RIGHT and i >= 30]
        if not repaired:
            continue
        place = rng.choice(repaired)
        wrong = rng.choice(
            [c for c in [RIGHT, *map(str, range(size))] if c not in (good.text[place], good.text[place - 2])]
        )
        rejected = continued(problem, good.text[:place] + wrong, rng)
        made.append({"prompt": problem.prompt, "chosen": good.text, "rejected": rejected})
    return made
