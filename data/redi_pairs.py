"""Make the pairs of recipes/redi.yaml: sums worked step by step, once correctly and once with a wrong step.

    python data/redi_pairs.py                    # 240 training and 60 held-out pairs, about 2 s
    python data/redi_pairs.py --size 4000        # 4000 and 1000

writes data/quickstart/pairs.jsonl and pairs_heldout.jsonl, one row a line:

    {"id": "5f0c...", "prompt": [{"role": "system", "content": "..."}, {"role": "user", "content": "57 + 87 - 70 ="}],
     "domain": "reasoning_gym/chain_sum", "answer": "74",
     "chosen": "57 + 87 = 144. 144 - 70 = 74. The answer is 74.",
     "rejected": "57 + 87 = 134. 134 - 70 = 64. The answer is 64."}

It stands in for a teacher's verified answers, so that no model is needed: with one, the chosen side is an answer that
passed the verifier and the rejected side one that did not. Problems and gold answers are reasoning-gym's chain_sum;
the worked correct answer is checked against the gold one. The wrong step is drawn at random and off by what such slips
are off by (1, 2, or a forgotten carry of 10), and what follows builds on it: the two sides share their prefix, form and
length, so that nothing but arithmetic tells them apart. The id is the hash of the problem and decides the split.

A system turn of its own keeps SmolLM2's template from adding one of 30 tokens: no sequence is longer than 65 tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from pathlib import Path

from llmdistill.files import atomic_write

SEED = 20262
HELDOUT_ONE_IN = 5
SETTINGS = {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 2}
SYSTEM = "Add step by step."
SLIPS = (-10, -2, -1, 1, 2, 10)


def worked(expression: str, wrong_step: int | None = None, slip: int = 0) -> tuple[str, int]:
    """(text, result) of a sum worked left to right, its step number ``wrong_step`` off by ``slip``."""
    first, *rest = re.findall(r"[+-]|\d+", expression)
    total, steps = int(first), []
    for step, (sign, term) in enumerate(zip(rest[::2], rest[1::2], strict=True)):
        result = total + int(term) * (1 if sign == "+" else -1) + (slip if step == wrong_step else 0)
        steps.append(f"{total} {sign} {term} = {result}.")
        total = result
    return " ".join([*steps, f"The answer is {total}."]), total


def make_rows(size: int) -> tuple[list[dict], list[dict]]:
    """(`size` training pairs, `size` // 4 held-out ones), without duplicates and sorted by id."""
    import reasoning_gym  # here: importing it takes a second that --help need not wait for

    rng, wanted = random.Random(SEED), int(1.4 * size) + 100
    dataset = reasoning_gym.create_dataset("chain_sum", size=wanted, seed=SEED, **SETTINGS)
    rows: dict[str, dict] = {}
    for index in range(wanted):
        problem = dataset[index]
        expression = problem["metadata"]["expression"]
        chosen, result = worked(expression)
        assert str(result) == problem["answer"], problem  # reasoning-gym's own answer
        rejected, _ = worked(expression, rng.randrange(expression.count(" ") // 2), rng.choice(SLIPS))
        key = hashlib.sha256(expression.encode()).hexdigest()[:16]
        rows[key] = {
            "id": key,
            "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{expression} ="}],
            "domain": "reasoning_gym/chain_sum",
            "answer": problem["answer"],
            "chosen": chosen,
            "rejected": rejected,
        }
    heldout = [rows[key] for key in sorted(rows) if int(key, 16) % HELDOUT_ONE_IN == 0]
    train = [rows[key] for key in sorted(rows) if int(key, 16) % HELDOUT_ONE_IN != 0]
    if len(train) < size or len(heldout) < size // (HELDOUT_ONE_IN - 1):
        raise SystemExit(f"--size {size}: only {len(train)} training and {len(heldout)} held-out problems are distinct")
    return train[:size], heldout[: size // (HELDOUT_ONE_IN - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/quickstart"), help="folder for both files")
    parser.add_argument("--size", type=int, default=240, help="training pairs; a quarter as many are held out")
    args = parser.parse_args()
    for name, rows in zip(("pairs", "pairs_heldout"), make_rows(args.size), strict=True):
        path = args.out / f"{name}.jsonl"
        atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))
        print(f"{path}: {len(rows)} pairs")


if __name__ == "__main__":
    main()
