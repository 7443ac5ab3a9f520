"""Write the card (README.md) of a dataset, as the hub renders it.

    python data/card.py clean.jsonl README.md --title "Sums with worked steps" --licence apache-2.0

Who wrote the rows, with which sampling, what each step took away and how long they are comes from the data and from the
manifests behind it. Titles, licences and sources are yours to say.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from llmdistill.cli import main as llmdistill


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the card of a dataset.", allow_abbrev=False)
    add = parser.add_argument
    add("src", nargs="+", help="the data: .jsonl, .jsonl.gz, .json, .parquet")
    add("out", help=".md")
    add("--title", required=True)
    add("--licence", required=True, help="of the rows, as the hub names it: apache-2.0, mit, other")
    add("--language", nargs="+", default=["en"], help="codes of two letters [en]")
    add("--about", default="", help="a paragraph to begin with")
    add("--source", nargs="+", default=[], metavar="NAME=LICENCE", help="where prompts come from")
    words = parser.parse_args(argv)
    sources = dict(source.rsplit("=", 1) for source in words.source if "=" in source)
    if len(sources) != len(words.source):
        parser.error("--source takes NAME=LICENCE")
    told = ["--title", words.title, "--licence", words.licence, "--about", words.about]
    told += ["--language", json.dumps(words.language), "--sources", json.dumps(sources)]
    return llmdistill(["data", "card", *words.src, words.out, *told])


if __name__ == "__main__":
    raise SystemExit(main())
