"""Small made-up suites and models for tests of the harness."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llmdistill.evals.grades import GradesSoFar
from llmdistill.evals.grading import grade
from llmdistill.evals.records import EvalFolder, Grade, Problem, Sample
from tests import tiny


def suite(folder: Path, rows: list[dict[str, Any]] | None = None, **changes: Any) -> Path:
    """A suite file ``folder/sums.yaml`` with its data beside it; ``changes`` replace its keys."""
    rows = rows if rows is not None else [sum_row(i) for i in range(6)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "suite": "sums",
        "kind": "math",
        "data": {"file": "sums.jsonl"},
        "groups": ["size"],
        "template": "plain",
        "sampling": {"n": 2, "temperature": 1.0, "max_new_tokens": 8},
        "pass_at": [1, 2],
        "maj_at": [2],
        **changes,
    }
    file = folder / "sums.yaml"
    file.write_text(json.dumps(content))  # JSON is YAML
    return file


def sum_row(i: int) -> dict[str, Any]:
    return {"id": f"sum/{i}", "question": f"{i} + {i} =", "answer": str(2 * i), "size": "even" if i % 2 == 0 else "odd"}


def model(folder: Path, template: str | None = tiny.TEMPLATE) -> Path:
    """A checkpoint that writes noise."""
    tiny.llama(3).save_pretrained(folder / "model")
    tiny.tokenizer(template).save_pretrained(folder / "model")
    return folder / "model"


def graded(problems: list[Problem], samples: list[Sample], **options: Any) -> list[Grade]:
    """The grades of one sample each, in the order of the problems."""
    with TemporaryDirectory() as folder:
        kept = GradesSoFar(EvalFolder(folder), {})
        grade(problems, lambda name: [s for s in samples if s.problem == name], kept, **options)
        found = [kept.of(p, [s])[0] for p, s in zip(problems, samples, strict=True)]
        kept.close(True)
    assert all(g is not None for g in found)
    return [g for g in found if g is not None]
