"""Leave out rows that hold benchmark problems.

    python data/decontaminate.py curated.jsonl clean.jsonl                          # every suite that can be had here
    python data/decontaminate.py curated.jsonl clean.jsonl --suite math500 aime24 own_problems.jsonl

clean.jsonl.contaminated.jsonl lists the rows that went and their problems. ``llmdistill contamination`` only looks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from llmdistill.cli import main as llmdistill
from llmdistill.datagen.decontamination import ALL


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Leave out rows that hold benchmark problems.", allow_abbrev=False)
    add = parser.add_argument
    add("src", help="rows: .jsonl, .jsonl.gz, .json, .parquet")
    add("out", help=".jsonl, .jsonl.gz or .parquet")
    add("--suite", nargs="+", default=ALL, metavar="SUITE", help="suites, or .jsonl files of problems [all]")
    add(
        "--column",
        nargs="+",
        default=["prompt", "completion"],
        metavar="NAME",
        help="columns to read [prompt completion]",
    )
    add("--n", type=int, default=13, help="words in a row that count as a match [13]")
    add("--least", type=float, default=0.0, help="share of a problem that a row must hold to go [any n words]")
    words = parser.parse_args(argv)
    settings = {"--suites": words.suite, "--columns": words.column, "--n": words.n, "--least": words.least}
    told = [part for key, value in settings.items() for part in (key, json.dumps(value))]
    return llmdistill(["data", "decontaminate", words.src, words.out, *told])


if __name__ == "__main__":
    raise SystemExit(main())
