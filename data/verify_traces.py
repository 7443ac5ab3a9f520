"""Judge traces: every row gets ``passed``, ``verdict`` and the reason; those that were cut off are marked.

    python data/verify_traces.py traces.jsonl judged.jsonl --judge math

It is ``llmdistill data verify``. Judges: auto (programs where rows have tests, else mathematics), math, choice, code,
or package.module:function, which is given the completion and its row.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llmdistill.cli import main as llmdistill


def main(argv: Sequence[str] | None = None) -> int:
    return llmdistill(["data", "verify", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    raise SystemExit(main())
