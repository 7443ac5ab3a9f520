"""``verify``: traces with a verdict each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmdistill.datagen.judges import Judge
from llmdistill.datagen.steps import Paths, Step, run_step
from llmdistill.datagen.tables import MOST_REJECTED, Row
from llmdistill.record.manifest import Manifest


def verify(
    src: Paths,
    out: str | Path,
    *,
    judge: str = "auto",
    workers: int = 0,
    allow_unsafe_exec: bool = False,
    max_rejected: float = MOST_REJECTED,
) -> Manifest:
    """Adds ``passed``, ``verdict``, ``extracted``, ``found_by``, ``reason`` and ``truncated`` to every trace.

    Nothing is left out: wrong ones are the other side of pairs, and filters are the curation's. The manifest has the
    number of each verdict.

    Args:
        judge: of :class:`~llmdistill.datagen.judges.Judge`.
        workers: verdicts at one time; 0: one for each usable core.

    Raises:
        UserError: no such judge, programs that nothing confines, too many rows that are no traces.
    """

    def work(step: Step) -> None:
        tally = Counter[str]()
        with Judge(judge, workers=workers, allow_unsafe_exec=allow_unsafe_exec) as judging:

            def judged() -> Iterator[Row]:
                for row, verdict in judging.verdicts(step.rows(("prompt", "completion")), lambda row: row):
                    tally[verdict["verdict"]] += 1
                    yield {**row, **verdict, "truncated": row.get("finish") == "length"}

            step.write(judged())
        step.details["verdicts"] = dict(sorted(tally.items()))

    settings: dict[str, Any] = {"judge": judge}
    return run_step("verify", work, src=src, out=out, settings=settings, max_rejected=max_rejected)
