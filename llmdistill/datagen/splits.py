"""``split``: held-out rows by prompt, so that no prompt is on both sides."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from llmdistill.datagen.schema import prompt_of
from llmdistill.datagen.steps import Paths, Step, beside, run_step
from llmdistill.datagen.tables import MOST_REJECTED, Row, read_rows
from llmdistill.datagen.writing import chance
from llmdistill.errors import UserError
from llmdistill.evals.records import as_line
from llmdistill.record.manifest import Manifest


def split(
    src: Paths, out: str | Path, *, heldout: float = 0.1, seed: int = 0, max_rejected: float = MOST_REJECTED
) -> Manifest:
    """Rows of some prompts into OUT, those of the others into OUT's ``heldout`` file: no prompt is in both.

    Args:
        heldout: share of the prompts. Which they are is a function of prompt and seed: the same in every file.

    Raises:
        UserError: a share outside (0, 1), or too many rows without a prompt.
    """
    if not 0 < heldout < 1:
        raise UserError(f"heldout is {heldout}; it must be in (0, 1). Fix: 0.1.")

    def work(step: Step) -> None:
        with tempfile.TemporaryDirectory(dir=step.out.parent) as folder:
            spool = Path(folder) / "heldout.jsonl"
            with spool.open("w", encoding="utf-8") as lines:

                def kept() -> Iterator[Row]:
                    for row in step.rows(("prompt",)):
                        key = prompt_of(row)
                        if chance("heldout", seed, key) >= heldout:
                            yield row
                        else:
                            step.lose("held out")
                            lines.write(as_line(row))

                step.write(kept())
            step.write(read_rows(spool), heldout_file(step.out))

    settings = {"heldout": heldout, "seed": seed}
    return run_step("split", work, src=src, out=out, settings=settings, max_rejected=max_rejected)


def heldout_file(out: str | Path) -> Path:
    """Where the held-out rows stand beside the others."""
    return beside(out, "heldout")
