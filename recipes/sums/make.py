"""Make the rows of recipes/sums: sums that are guessed first, then worked, and the suite that scores them.

    python recipes/sums/make.py                     # about a second; writes data/sums/

    start.jsonl      what the start is fine-tuned on: problems alone, and problems with their working before them
    train.jsonl      other problems, with their working in a column of its own: what the teacher reads
    read.jsonl       the first of those problems again, the working in the prompt: from there the teacher writes
    repairs.jsonl    those problems alone, worked rightly behind a guess that is wrong as a rule: text of nobody's
    heldout.jsonl    problems that are in none of these, for `llmdistill eval recipes/sums/suite.yaml`

    {"prompt": "Add 47 + 38 + 95", "chosen": "\\nGuess 168. 47 + 38 = 85, 85 + 95 = 180. So 180."}

The guess is the whole sum in one go, which the model cannot do; the working is what it can nearly do. In the start's
rows a guess without the working is wrong as a rule, and one with the working before it is right; in half of the latter
a wrong guess stands in the prompt, and what follows is right all the same. So the start learns not to trust its guess,
and as a teacher, which reads the working, to go on rightly behind a wrong one.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmdistill.files import atomic_write

SEED = 20_261
TERMS, RIGHT_GUESSES = 3, 0.2
SIZES = {"start": 400, "train": 1200, "heldout": 300}
READ = 192  # problems that the teacher writes on


def working(terms: Sequence[int]) -> str:
    """``47 + 38 = 85, 85 + 95 = 180.``"""
    total, steps = terms[0], []
    for term in terms[1:]:
        steps.append(f"{total} + {term} = {total + term}")
        total += term
    return ", ".join(steps) + "."


def guess(terms: Sequence[int], rng: random.Random, right: float) -> int:
    """The sum, or with probability 1 - ``right`` a number near it."""
    if rng.random() < right:
        return sum(terms)
    return sum(terms) + rng.choice((-1, 1)) * rng.choice((1, 2, 3, 5, 8, 10, 11, 12, 18, 20, 30))


def trace(terms: Sequence[int], guessed: int) -> str:
    return f"\nGuess {guessed}. {working(terms)} So {sum(terms)}."


def problems(rng: random.Random) -> Iterator[tuple[int, ...]]:
    """Distinct ones."""
    seen = set()
    while True:
        terms = tuple(rng.randint(11, 99) for _ in range(TERMS))
        if terms not in seen:
            seen.add(terms)
            yield terms


def question(terms: Sequence[int]) -> str:
    return " + ".join(map(str, terms))


def asked(terms: Sequence[int]) -> str:
    """The prompt. A word goes before the digits: the very first token of a text is one that SmolLM2 hardly reads."""
    return f"Add {question(terms)}"


def read(terms: Sequence[int]) -> str:
    """The prompt as a teacher with ``data.contexts`` reads it."""
    return f"{asked(terms)}\n\n({working(terms)[:-1]})"


def start_row(terms: Sequence[int], rng: random.Random, kind: int) -> dict[str, str]:
    """Two thirds of the rows a problem alone, a sixth with its working, a sixth with a wrong guess behind that."""
    if kind % 3:
        return {"prompt": asked(terms), "chosen": trace(terms, guess(terms, rng, RIGHT_GUESSES))}
    if kind % 2:
        return {"prompt": read(terms), "chosen": trace(terms, sum(terms))}
    begun = f"\nGuess {guess(terms, rng, 0.0)}."
    return {"prompt": read(terms) + begun, "chosen": trace(terms, sum(terms)).split(".", 1)[1]}


def make_rows() -> dict[str, list[dict[str, str]]]:
    rng = random.Random(SEED)
    found = problems(rng)
    drawn = {name: [next(found) for _ in range(size)] for name, size in SIZES.items()}
    return {
        "start": [start_row(terms, rng, i) for i, terms in enumerate(drawn["start"])],
        "train": [{"prompt": asked(terms), "working": f"({working(terms)[:-1]})"} for terms in drawn["train"]],
        "read": [{"prompt": read(terms)} for terms in drawn["train"][:READ]],
        "repairs": [
            {"prompt": asked(terms), "chosen": trace(terms, guess(terms, rng, RIGHT_GUESSES))}
            for terms in drawn["train"][:READ]
        ],
        "heldout": [
            {"id": question(terms), "question": question(terms), "answer": str(sum(terms))}
            for terms in drawn["heldout"]
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/sums"), help="folder of the files")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in make_rows().items():
        path = args.out / f"{name}.jsonl"
        atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
