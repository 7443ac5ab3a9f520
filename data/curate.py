"""Leave out traces that are not worth training on, rule by rule.

    python data/curate.py verified.jsonl curated.jsonl --rule finished --rule no_loops --rule right \
        --rule "tokens: {most: 16384}" --rule "near_duplicates: {of: prompt}" --rule "diverse: {k: 4}"

Rules are taken in order; llmdistill/datagen/rules.py and rules_over_rows.py have them all. What each took stands
in curated.jsonl.manifest.json and is printed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import yaml

from llmdistill.cli import main as llmdistill


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Leave out traces that are not worth training on.", allow_abbrev=False)
    parser.add_argument("src", nargs="+", help="traces: .jsonl, .jsonl.gz, .json, .parquet")
    parser.add_argument("out", help=".jsonl, .jsonl.gz or .parquet")
    parser.add_argument(
        "--rule", action="append", required=True, metavar="RULE", help="name, or 'name: {setting: value}'"
    )
    words = parser.parse_args(argv)
    rules = json.dumps([yaml.safe_load(rule) for rule in words.rule])
    return llmdistill(["data", "curate", *words.src, words.out, "--steps", rules])


if __name__ == "__main__":
    raise SystemExit(main())
