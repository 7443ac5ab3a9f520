"""Have a model write traces of prompts.

    python data/generate_traces.py --prompts prompts.jsonl --teacher Qwen/Qwen3-8B --n 4 --judge math --out traces.jsonl

It is ``llmdistill generate``; --help lists the settings. Kill it at any moment: the same command goes on, and no answer
that is on disk is asked for again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llmdistill.cli import main as llmdistill


def main(argv: Sequence[str] | None = None) -> int:
    return llmdistill(["generate", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    raise SystemExit(main())
