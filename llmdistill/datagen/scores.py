"""``score``: what a teacher says of traces, kept beside them, so that training on them needs no teacher.

    scored.jsonl     the traces, as they were
    scored.blocks/   score blocks of their completions, a store of llmdistill.teachers.block_store

``teacher: {stored: scored.blocks}`` with ``data.train: scored.jsonl`` and ``objective.sequences: dataset`` is then a
run offline (recipes/data/offline_opd.yaml). A block is found by the student's own tokens of prompt and completion, so
its template and the settings of ``data`` have to be those of the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from llmdistill.datagen.steps import Paths, Step, run_step
from llmdistill.datagen.tables import MOST_REJECTED, Row
from llmdistill.errors import UserError
from llmdistill.evals.engines.make import load_tokenizer
from llmdistill.recipe.config import TeacherConfig
from llmdistill.recipe.data_config import DataConfig
from llmdistill.record.manifest import Manifest
from llmdistill.teachers.load import load_teachers
from llmdistill.teachers.stored import StoredTeacher
from llmdistill.texts.prompts import PromptEncoder, completed
from llmdistill.tokenization.special import pad_id


def score(
    src: Paths,
    out: str | Path,
    *,
    teacher: str | Mapping[str, Any],
    student: str,
    top_k: int = 64,
    lossless: bool = False,
    max_tokens: int = 4096,
    batch_size: int = 8,
    data: Mapping[str, Any] | None = None,
    max_rejected: float = MOST_REJECTED,
) -> Manifest:
    """Scores every trace that fits. What was scored before an interruption is not scored again.

    Args:
        teacher: folder or hub name, or the settings of a recipe's section ``teacher`` (url, engine, dtype, ...).
        student: folder or hub name of the student, whose tokenizer and template the texts are read with.
        top_k: tokens listed at each position.
        lossless: float32 log-probs, twice the bytes; the run then says ``teacher.lossless`` too.
        max_tokens: of prompt and completion together; longer traces are left out.
        batch_size: traces scored together.
        data: settings of the run's section ``data`` that change how a row is read (system_prompt, ...).

    Raises:
        UserError: a teacher that cannot be had, a store of another teacher's, too many rows that cannot be read.
    """
    said = dict(teacher) if isinstance(teacher, Mapping) else {"model": teacher}
    settings: dict[str, Any] = {
        "teacher": said,
        "student": student,
        "top_k": top_k,
        "lossless": lossless,
        "max_tokens": max_tokens,
    }
    settings["data"] = dict(data or {})
    folder = blocks_folder(out)

    def work(step: Step) -> None:
        with ExitStack() as stack:
            reading = _Reading(student, settings["data"], max_tokens)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            live = load_teachers([TeacherConfig(**said)], device, max_tokens, ["teacher"])
            stored = StoredTeacher(folder, live, "float32" if lossless else "float16")
            stack.callback(stored.close)

            def scored() -> Iterator[Row]:
                rows = reading.fitting(step)
                while batch := list(islice(rows, batch_size)):
                    stored.score(completed([prompt for _, prompt in batch], reading.pad), top_k)
                    yield from (row for row, _ in batch)

            step.write(scored())
            info = stored.info()
            step.details.update(blocks=str(folder), scorer={"name": info.name, "fingerprint": info.fingerprint})

    return run_step("score", work, src=src, out=out, settings=settings, max_rejected=max_rejected)


def blocks_folder(out: str | Path) -> Path:
    """Where the blocks of a scored file stand."""
    path = Path(out)
    return path.with_name(path.name.partition(".")[0] + ".blocks")


class _Reading:
    """Rows as the run will read them: with the student's template, the completion closed as it is closed there."""

    def __init__(self, student: str, data: Mapping[str, Any], max_tokens: int) -> None:
        tokenizer = load_tokenizer(student, setting="student")
        config = DataConfig(**{**data, "max_prompt_tokens": 1 << 30})  # max_tokens bounds both together
        self.encode, self.pad, self.max_tokens = PromptEncoder(tokenizer, config), pad_id(tokenizer), max_tokens

    def fitting(self, step: Step) -> Iterator[tuple[Row, Any]]:
        """Each row with its encoded text; those that are too long are lost, those that cannot be read rejected."""
        for row in step.rows(("prompt", "completion")):
            try:
                (prompt,) = self.encode.encode_all([row], completions=True)
            except UserError as error:
                step.rejects.add(str(row.get("id")), step.counts["read"], str(error), row)
                continue
            if len(prompt.ids) + len(prompt.completion) > self.max_tokens:
                step.lose("too long")
            else:
                yield row, prompt
