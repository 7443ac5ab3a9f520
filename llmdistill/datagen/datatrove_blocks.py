"""Curation and decontamination as blocks of a datatrove pipeline: over more rows, and machines, than one process takes.

    from datatrove.executor import LocalPipelineExecutor      # or SlurmPipelineExecutor: the same pipeline
    from llmdistill.datagen.datatrove_blocks import Decontamination, Rules, trace_reader, trace_writer

    pipeline = [
        trace_reader("traces/"),                              # a folder of .jsonl or .jsonl.gz, shared out by file
        Rules(["finished", "no_loops", "right", {"tokens": {"most": 16384}}]),
        Decontamination(["gsm8k", "math500"]),
        trace_writer("clean/"),
    ]
    LocalPipelineExecutor(pipeline, tasks=64, workers=8, logging_dir="logs/").run()

The rules are those of ``curate`` that look at one row; its rules over rows (bands of pass rates, duplicates) need all
of them, and are ``curate``'s, which spills to disk, or datatrove's own blocks. Counts by reason are in datatrove's
statistics. Needs the extra ``datatrove``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmdistill.datagen import rules_over_rows
from llmdistill.datagen.curation import Asked, read_rule
from llmdistill.datagen.decontamination import suites_and_problems
from llmdistill.errors import UserError
from llmdistill.evals.contamination import filter_contaminated

try:
    from datatrove.data import Document
    from datatrove.pipeline.base import PipelineStep
    from datatrove.pipeline.filters.base_filter import BaseFilter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
    from datatrove.utils.typeshelper import StatHints
except ImportError as error:
    raise UserError(
        f"datatrove cannot be imported ({error}), and these are blocks for it. "
        "Fix: pip install 'llmdistill[datatrove]'."
    ) from error

ROW = "row"  # of a document's metadata: the row as it was read


def trace_reader(folder: str | Path, **options: Any) -> JsonlReader:
    """Rows of a folder's files as documents; ``options`` are JsonlReader's."""
    return JsonlReader(str(folder), adapter=_document, add_file_path=False, **options)


def trace_writer(folder: str | Path, **options: Any) -> JsonlWriter:
    """Documents as the rows they were, a file for each task; ``options`` are JsonlWriter's."""
    return JsonlWriter(str(folder), adapter=lambda _, document: document.metadata[ROW], **options)


class Rules(BaseFilter):  # type: ignore[misc]
    """Leaves out what a rule of ``curate`` leaves out.

    Args:
        steps: rules that look at one row, as ``curate`` takes them.

    Raises:
        UserError: no such rule, or one that needs all rows.
    """

    name = "rules of curation"

    def __init__(self, steps: Sequence[str | Mapping[str, Any]], exclusion_writer: Any = None) -> None:
        super().__init__(exclusion_writer)
        self.rules: list[Asked] = [read_rule(step) for step in steps]
        for name, rule, _ in self.rules:
            if rule.__module__ == rules_over_rows.__name__:
                raise UserError(
                    f"rule {name} compares rows, and a block of a pipeline sees one at a time. "
                    "Fix: llmdistill data curate with it, or datatrove's own block."
                )

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Whether a document is kept, or the reason why not.

        Raises:
            UserError: a row that a rule cannot judge.
        """
        row = doc.metadata[ROW]
        for name, rule, settings in self.rules:
            try:
                reason = rule(row, **settings)
            except (ValueError, ImportError) as error:
                raise UserError(f"rule {name}, document {doc.id}: {error}.") from error
            if reason is not None:
                return False, reason
        return True


class Decontamination(PipelineStep):  # type: ignore[misc]
    """Leaves out what ``decontaminate`` leaves out.

    Args:
        suites, columns, n, least: of :func:`~llmdistill.datagen.decontamination.decontaminate`.

    Raises:
        UserError: an unknown suite, or data that cannot be had.
    """

    name, type = "decontamination", BaseFilter.type

    def __init__(
        self,
        suites: str | Sequence[str] = "all",
        *,
        columns: Sequence[str] = ("prompt", "completion"),
        n: int = 13,
        least: float = 0.0,
    ) -> None:
        super().__init__()
        self.problems, self.missing = suites_and_problems([suites] if isinstance(suites, str) else list(suites))
        self.search: dict[str, Any] = {"columns": tuple(columns), "n": n, "least": least}

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """The documents that hold no problem, in order."""

        def dropped(row: Mapping[str, Any], ids: list[str]) -> None:
            suites = ", ".join(sorted({i.split("/")[0] for i in ids}))
            self.stat_update(StatHints.total, StatHints.dropped, f"dropped_holds a problem of {suites}")

        rows = ({**document.metadata[ROW], ROW: document} for document in data)
        for kept in filter_contaminated(rows, self.problems, dropped=dropped, **self.search):
            self.stat_update(StatHints.total, StatHints.forwarded)
            yield kept[ROW]


def _document(_: Any, row: dict[str, Any], path: str, number: int | str) -> dict[str, Any]:
    """What datatrove makes a document of."""
    text = str(row.get("completion") or row.get("text") or "-")  # it passes over documents without text
    return {"text": text, "id": str(row.get("id") or f"{path}/{number}"), "metadata": {ROW: row}}
