"""Few-shot prompts: a file of solved examples that stand before every question.

One JSON object a line, ``{"question": ..., "answer": ...}``; an answer is written out as the model is to write its own
(for GSM8K with its steps). A plain template (base models) writes them as one text, a chat template as turns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llmdistill.errors import UserError
from llmdistill.evals.records import Problem
from llmdistill.evals.suite import rows_of
from llmdistill.evals.templates import Example, Template


def read_examples(file: Path) -> tuple[Example, ...]:
    """The examples of a file, in its order.

    Raises:
        UserError: no such file, no example in it, or a line without question and answer; the line is named.
    """
    if not file.is_file():
        raise UserError(f"few_shot is {str(file)!r}, and there is no such file. Fix: a JSONL file of solved examples.")
    examples = tuple(Example(row.text("question"), row.text("answer")) for row in rows_of(file))
    if not examples:
        raise UserError(f"few_shot is {str(file)!r}, which holds no example. Fix: one JSON object a line.")
    return examples


def with_examples(template: Template, file: Path, problems: Sequence[Problem]) -> Template:
    """The template with the examples of ``file`` before its question.

    Raises:
        UserError: as :func:`read_examples`; or an example is a problem of the suite, whose answer it would give away.
    """
    examples = read_examples(file)
    asked = {_words(p.question): p.id for p in problems}
    for number, example in enumerate(examples, 1):
        if given_away := asked.get(_words(example.question)):
            raise UserError(
                f"few_shot: example {number} of {file.name} is the problem {given_away!r} of the suite, whose answer "
                "it gives away. Fix: examples of the training split."
            )
    return replace(template, examples=examples)


def about(template: Template) -> dict[str, Any] | None:
    """Their number and a hash of what they say; None without any."""
    if not template.examples:
        return None
    content = json.dumps([asdict(example) for example in template.examples], ensure_ascii=True)
    return {"examples": len(template.examples), "hash": hashlib.sha256(content.encode()).hexdigest()[:12]}


def _words(text: str) -> str:
    return " ".join(text.split())
