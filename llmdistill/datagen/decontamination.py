"""Traces without benchmark problems, and a report of what was found where.

It is ``llmdistill contamination`` underneath (``llmdistill.evals.contamination`` says what counts as a match), with the
rows that hold a problem left out instead of counted only. ``OUT.contaminated.jsonl`` has a line for each of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmdistill.datagen.steps import Paths, Step, run_step
from llmdistill.datagen.tables import MOST_REJECTED
from llmdistill.errors import UserError
from llmdistill.evals.contamination import filter_contaminated, suite_problems
from llmdistill.evals.records import Problem
from llmdistill.evals.suite import bundled_suites, data_hash
from llmdistill.record.manifest import Manifest

ALL = "all"


def decontaminate(
    src: Paths,
    out: str | Path,
    *,
    suites: str | Sequence[str] = ALL,
    columns: Sequence[str] = ("prompt", "completion"),
    n: int = 13,
    least: float = 0.0,
    max_rejected: float = MOST_REJECTED,
) -> Manifest:
    """Writes the rows that hold no problem of the suites, in order.

    Args:
        suites: names of suites or .jsonl files of problems; "all": every suite whose data can be had here. Those that
            cannot are named in the manifest (``details["suites_missing"]``) and, if none can, an error.
        columns: where the rows' text is.
        n: words in a row that count as a match.
        least: a row goes if it holds at least this share of a problem's n-grams; any n-gram will do by default.

    Returns:
        The manifest; ``lost`` has the rows by suite, ``details["suites"]`` for each suite its problems, how many of
        them were found and the hash of its data.

    Raises:
        UserError: an unknown suite, data that cannot be had, a setting out of range.
    """
    if not 0 <= least <= 1 or n < 2:
        raise UserError(f"least is {least} and n {n}. Fix: least in [0, 1], n of at least 2.")
    wanted = [suites] if isinstance(suites, str) else list(suites)
    problems, missing = suites_and_problems(wanted)
    said = {
        "suites": wanted,
        "data": {name: data_hash(ps) for name, ps in problems.items()},
        "columns": list(columns),
        "n": n,
        "least": least,
    }

    def work(step: Step) -> None:
        found, contaminated = Counter[str](), list[dict[str, Any]]()

        def dropped(row: Mapping[str, Any], ids: list[str]) -> None:
            found.update(ids)
            held = sorted({i.split("/")[0] for i in ids})
            about = {"id": row.get("id"), "prompt": row.get("prompt")}
            contaminated.append({**about, "suites": held, "problems": sorted(ids)})
            step.lose(f"holds a problem of {', '.join(held)}")

        rows: Iterator[Mapping[str, Any]] = step.rows(columns)
        step.write(filter_contaminated(rows, problems, columns=columns, n=n, least=least, dropped=dropped))
        step.write(contaminated, to=f"{step.out}.contaminated.jsonl")
        step.details["suites"] = {
            name: {"problems": len(ps), "found": sum(p.id in found for p in ps), "data": data_hash(ps)}
            for name, ps in problems.items()
        }
        step.details["suites_missing"] = missing

    # other data of a suite under the same name is a reason to look again, not to refuse
    return run_step(
        "decontaminate", work, src=src, out=out, settings=said, max_rejected=max_rejected, may_change=("data",)
    )


def suites_and_problems(wanted: Sequence[str]) -> tuple[dict[str, list[Problem]], dict[str, str]]:
    """{suite: problems}, their ids led by the suite's name, and {suite: why it is missing} where all were asked for."""
    found, missing = dict[str, list[Problem]](), dict[str, str]()
    for name in sorted(bundled_suites()) if ALL in wanted else wanted:
        try:
            short = Path(name).name.split(".")[0]
            found[short] = [replace(p, id=f"{short}/{p.id}") for p in suite_problems(name)]
        except UserError as error:
            if ALL not in wanted:
                raise
            missing[name] = str(error).splitlines()[0]
    if not found:
        first = next(iter(missing.values()), "no suite was named")
        raise UserError(f"no suite's problems can be had here: {first}")
    return found, missing
