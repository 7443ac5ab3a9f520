"""One launch of the test of alignment: the first process has texts that align, the other has none.

accelerate launch --config_file recipes/accelerate/two_processes.yaml -m tests.distributed.chunks_worker FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from llmdistill.errors import UserError
from llmdistill.recipe.launches import leave_group
from llmdistill.teachers.local import LocalTeacher
from tests import tiny
from tests.methods.test_chunks import make
from tests.tokenization import vocabularies

SHARES = {"strict": 0.9, "lenient": 0.1}  # name -> min_aligned


def main(folder: Path) -> None:
    rank, told = int(os.environ.get("RANK", 0)), {}
    words = vocabularies.wordpiece(["ok", "add"])
    words.pad_token = "[UNK]"
    every = [{"prompt": "ok ", "completion": c} for c in ["ok add"] * 8 + ["ok 猫 add"] * 8]
    own = every[8 * rank :][:8]
    for name, least in SHARES.items():
        told[name] = {}
        for what in ("train", "evaluate"):
            teacher = LocalTeacher(tiny.llama(3, vocab=len(words)), words)
            t = make(folder / name / what, "alm", teacher=teacher, rows=own, debias=False, min_aligned=least)
            t.wants_preflight = False  # it looks at the first rows, which are the same everywhere but here
            try:
                t.train() if what == "train" else t.evaluate(every)  # which gives each process its half of them
                told[name][what] = ""
            except UserError as error:
                told[name][what] = str(error)
    (folder / f"rank-{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave_group()
