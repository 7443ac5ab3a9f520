"""Solutions to be told: a regime in which a student can judge itself, since it reads better than it reckons.

    417+385=7+5+0=12;1+8+1=10;4+3+1=08;802=   ->   7+5+0=12;1+8+1=10;4+3+1=08;802

The start copies what stands in its prompt, whatever it is, and adds rightly in a third of the problems. So the start
that has been told the solution knows at every place what comes next, and OPSD, context distillation and SDPO have a
judge. In the other tracks no model has ever read a solution in its prompt: told one, it writes noise.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from models import EOS_ID, PAD_ID, TOKENIZER, accuracy, as_prompt, cached, ids, shuffled, texts, train
from recovery_models import LongSize
from task import VOCABULARY, Problem, draw, longest, problems
from transformers import PreTrainedModel

from llmdistill.models.generation import generate
from llmdistill.texts import Prompt, Sampling

RECIPE = 2
LABELS = 1000
COPIES, STEPS = 300, 1000  # steps at most: of copying alone, of both
STUDENT = LongSize(48, 2, 4, 128)  # 56 thousand weights; from the usual spread of .02 copying was not learned
KNOWS, READS = 0.3, 0.9  # of 500 problems at least, by itself and told, where the start ends


def context(text: str) -> str:
    """What stands behind a prompt that tells ``text``."""
    return f"{text}="


def telling(problem: Problem, text: str) -> Prompt:
    """A problem with a text in its prompt, and that text to be written."""
    return Prompt(
        ids(problem.prompt + context(text)), problem.prompt, problem.operation, completion=(*ids(text), EOS_ID)
    )


def copies(count: int, seed: int) -> Iterator[list[Prompt]]:
    """Texts of a solution's form and digits at random: nothing of addition is in them."""
    rng = random.Random(seed)

    def digits(text: str) -> str:
        return "".join(rng.choice("0123456789") if c.isdigit() else c for c in text)

    while True:
        yield [telling(draw(rng), digits(draw(rng).completion)) for _ in range(count)]


def accuracy_told(model: PreTrainedModel, asked: Sequence[Problem]) -> float:
    """Share of the problems whose answer is right when the solution is told."""
    prompts = [telling(problem, problem.completion) for problem in asked]
    written = generate(model, prompts, Sampling(longest(), temperature=0.0), eos_ids=(EOS_ID,), pad_id=PAD_ID)
    return sum(p.solved_by(text) for p, text in zip(asked, texts(written, TOKENIZER), strict=True)) / len(asked)


def start(seed: int, note: Callable[[str], None] = lambda text: None) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A student that copies and adds a little.

    Raises:
        RuntimeError: after ten starts that do not add, or do not copy.
    """

    def make() -> tuple[PreTrainedModel, dict[str, Any]]:
        check, found, seconds = problems(500, 71), dict[str, float](), 0.0
        for attempt in range(10):
            drawn = seed + 100 * attempt
            model = STUDENT.build(3000 + drawn, VOCABULARY)

            def there(step: int, model: PreTrainedModel = model, attempt: int = attempt) -> bool:
                note(f"start of seed {seed}, attempt {attempt + 1}, step {step}, {found}")
                if step % 25:
                    return False
                found.update(exact=accuracy(model.eval(), check), steps=step)
                return found["exact"] >= KNOWS

            seconds += train(model, copies(64, drawn), COPIES, 3e-3, decay=False)
            labelled = shuffled([as_prompt(p) for p in problems(LABELS, 10_000 + drawn)], 32, drawn)
            both = ([*some, *others] for some, others in zip(labelled, copies(32, 500 + drawn), strict=False))
            seconds += train(model, both, STEPS, 4e-3, after=there, decay=False)
            found["told"] = accuracy_told(model, check)
            if found["exact"] >= KNOWS and found["told"] >= READS:
                return model, {"cpu_seconds": seconds, "attempts": attempt + 1, **found}
        raise RuntimeError(f"10 starts, and none of them adds and copies: the last {found}")

    return cached(f"told-start-{RECIPE}-{seed}", make)


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """True solutions of problems that are not scored, with what tells them in the column ``told``."""
    return [{**p.row(), "told": context(p.completion)} for p in problems(count, seed)]
