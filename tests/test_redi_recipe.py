"""The shipped recipe, and the pairs it is trained on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from llmdistill.recipe.command_line import parse
from llmdistill.redi import REDIConfig


def test_the_shipped_recipe_and_its_data(tmp_path: Path) -> None:
    """The recipe parses; its rows are what the worked sums are said to be."""
    root = Path(__file__).parents[1]
    recipe = parse(REDIConfig, ["--config", str(root / "recipes" / "redi.yaml")])
    assert recipe.args.method == "redi" and not recipe.teacher.label
    command = [sys.executable, str(root / "data" / "redi_pairs.py"), "--size", "40", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    heldout = [json.loads(line) for line in (tmp_path / "pairs_heldout.jsonl").read_text().splitlines()]
    assert (len(rows), len(heldout)) == (40, 10) and len({r["id"] for r in rows + heldout}) == 50

    def wrong_steps(text: str) -> int:
        *steps, _ = text.split(". ")
        return sum(eval(left) != int(right) for left, right in (step.split(" = ") for step in steps))

    for row in rows + heldout:
        expression = row["prompt"][-1]["content"].removesuffix(" =")
        assert row["chosen"].endswith(f"The answer is {eval(expression)}.") and wrong_steps(row["chosen"]) == 0
        assert wrong_steps(row["rejected"]) == 1 and row["rejected"] != row["chosen"]
