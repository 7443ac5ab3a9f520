"""The task "recovery": a long trace in which a mistake stays unless it is repaired, and a repair restores the state.

    417=   ->   2 5 .  6 3 1  ...   40 times: guess, working, verdict

A table T of n x n numbers, its rows random permutations, is the whole of the knowledge. With a, b, c the last three
digits that stand, a step is three tokens: the *guess* at the next digit T[T[c, b], a] in one go, hard for a small
model (n^3 combinations); the *working* m = T[c, b] (n^2 of them, easy); and the *verdict*, "." where the guess is
T[m, a] and else that digit. The digit that stands is the new c. After a wrong one the states go another way, and
whoever knows the table goes on rightly from where it is: the trace as a whole is wrong, and each of its later steps
may be right.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SIZE = 8
STEPS = 40
RIGHT = "."
TABLE_SEED = 20_260_601
TOKENS = 3 * STEPS + 1  # of a completion, with the end
CHARACTERS = "01234567.="
PAD, EOS = "<pad>", "<eos>"


@cache
def table(size: int = SIZE) -> list[list[int]]:
    """T: ``size`` rows, each a permutation."""
    rng = random.Random(TABLE_SEED + size)
    return [rng.sample(range(size), size) for _ in range(size)]


def working(size: int, b: int, c: int) -> int:
    return table(size)[c][b]


def following(size: int, a: int, b: int, c: int) -> int:
    """The digit that comes after a, b, c."""
    return table(size)[working(size, b, c)][a]


@dataclass(frozen=True)
class Problem:
    """Three digits to go on from."""

    a: int
    b: int
    c: int
    size: int = SIZE
    operation: str = "recovery"

    @property
    def prompt(self) -> str:
        return f"{self.a}{self.b}{self.c}="

    @property
    def completion(self) -> str:
        """The trace without a mistake."""
        return injected(self, random.Random(0), Mistakes()).text

    def solved_by(self, text: str) -> bool:
        """Whether all forty digits that stand are right."""
        return Reading.of(self, text).exact

    def row(self, completion: str | None = None) -> dict[str, str]:
        return {
            "prompt": self.prompt,
            "completion": self.completion if completion is None else completion,
            "domain": self.operation,
        }


def everything(size: int = SIZE) -> list[Problem]:
    """All the prompts that there are."""
    return [Problem(a, b, c, size) for a, b, c in product(range(size), repeat=3)]


@dataclass(frozen=True)
class Mistakes:
    """How often a trace is led astray: shares of the steps."""

    guess: float = 0.0  # a wrong guess, which the verdict then repairs
    working: float = 0.0  # a wrong working, by which the verdict goes
    state: float = 0.0  # a random verdict, from which the trace goes on


@dataclass(frozen=True)
class Trace:
    """A trace with mistakes put in, and which of its tokens were: nobody is to learn those."""

    text: str
    put_in: tuple[bool, ...]


def injected(problem: Problem, rng: random.Random, mistakes: Mistakes) -> Trace:
    """The trace from there; all that is not put in is right, given what stands before it.

    The verdict looks its digit up by the working that is written, also where that is wrong.
    """
    n, state = problem.size, (problem.a, problem.b, problem.c)
    text, put_in = list[str](), list[bool]()
    for _ in range(STEPS):
        true, step = following(n, *state), working(n, *state[1:])
        wrong_guess, wrong_working = rng.random() < mistakes.guess, rng.random() < mistakes.working
        guess = _other(rng, n, true) if wrong_guess else true
        shown = _other(rng, n, step) if wrong_working else step
        right = table(n)[shown][state[0]]
        verdict, stands = (RIGHT, guess) if guess == right else (str(right), right)
        led_astray = rng.random() < mistakes.state
        if led_astray:
            stands = rng.randrange(n)
            verdict = RIGHT if stands == guess else str(stands)
        text += [str(guess), str(shown), verdict]
        put_in += [wrong_guess, wrong_working, led_astray]
        state = (*state[1:], stands)
    return Trace("".join(text), tuple(put_in))


def continued(problem: Problem, text: str, rng: random.Random) -> str:
    """A text that ends with a step, gone on with from where it stands: half of the guesses wrong and repaired."""
    stand = [int(text[i - 2] if text[i] == RIGHT else text[i]) for i in range(2, len(text), 3)]
    state = (problem.a, problem.b, problem.c, *stand)[-3:]
    rest = injected(Problem(*state, size=problem.size), rng, Mistakes(guess=0.5)).text
    return (text + rest)[: 3 * STEPS]


def _other(rng: random.Random, size: int, digit: int) -> int:
    return (digit + rng.randrange(1, size)) % size


@dataclass(frozen=True)
class Reading:
    """What a text comes to, step by step: each is judged by the state that the text itself has reached.

    A text ends at the first step that is none.
    """

    exact: bool  # all forty digits that stand are those of the trace without a mistake
    steps: int  # that there are
    right: int  # of them, those whose standing digit follows from the state
    guessed: int  # those whose guess was right
    repaired: int  # those whose guess was wrong and whose standing digit is right

    @staticmethod
    def of(problem: Problem, text: str) -> Reading:
        n, state, true = problem.size, (problem.a, problem.b, problem.c), (problem.a, problem.b, problem.c)
        digits = set(map(str, range(n)))
        steps = right = guessed = repaired = on_track = 0
        for i in range(0, 3 * STEPS, 3):
            guess, step, verdict = (text[i : i + 3] + "   ")[:3]
            if guess not in digits or step not in digits or verdict not in digits | {RIGHT}:
                break
            stands, follows, truly = (
                int(guess if verdict == RIGHT else verdict),
                following(n, *state),
                following(n, *true),
            )
            steps += 1
            right += stands == follows
            guessed += int(guess) == follows
            repaired += int(guess) != follows and stands == follows
            on_track += stands == truly
            state, true = (*state[1:], stands), (*true[1:], truly)
        exact = on_track == STEPS and len(text) == 3 * STEPS
        return Reading(exact, steps, right, guessed, repaired)


def shares(readings: Sequence[Reading]) -> dict[str, float]:
    """``exact`` of the texts; ``steps_right`` and ``guessed`` of forty steps a text; ``corrected`` of wrong guesses."""
    whole = STEPS * len(readings)
    wrong = sum(r.steps - r.guessed for r in readings)
    return {
        "exact": sum(r.exact for r in readings) / len(readings),
        "steps_right": sum(r.right for r in readings) / whole,
        "guessed": sum(r.guessed for r in readings) / whole,
        "corrected": sum(r.repaired for r in readings) / max(wrong, 1),
    }


def tokenizer() -> PreTrainedTokenizerFast:
    """A character is a token."""
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *CHARACTERS])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("."), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=PAD, eos_token=EOS)


VOCABULARY = 2 + len(CHARACTERS)
