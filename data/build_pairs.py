"""From judged traces to pairs (a right and a wrong one of a prompt) and positives, with REDI's filters.

    python data/build_pairs.py judged.jsonl pairs.jsonl          # and pairs.positives.jsonl
    accelerate launch -m llmdistill.redi --config recipes/redi.yaml --data.train pairs.jsonl \
        --positives pairs.positives.jsonl

It is ``llmdistill data build_pairs``. TRL's DPOTrainer reads pairs.jsonl as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llmdistill.cli import main as llmdistill


def main(argv: Sequence[str] | None = None) -> int:
    return llmdistill(["data", "build_pairs", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    raise SystemExit(main())
