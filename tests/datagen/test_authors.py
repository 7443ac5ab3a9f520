"""A run whose teacher did not write the traces is told so; the author's own evidence can be used again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmdistill.datagen.generation import generate
from llmdistill.datagen.tables import write_rows
from llmdistill.opd import OPDConfig, OPDTrainer
from llmdistill.pipeline.run import build
from llmdistill.preflight import examine
from llmdistill.recipe.command_line import parse
from tests import tiny


@pytest.fixture(scope="module")
def traces(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the teacher."""
    out = tmp_path_factory.mktemp("traces") / "t.jsonl"
    role = {"model": str(tiny_run / "teacher"), "engine": "hf", "dtype": "float32"}
    rows = [{"prompt": row["prompt"]} for row in tiny.rows(6)]
    generate(rows, "plain", {"teacher": role}, out, sampling={"max_new_tokens": 8}, n=1)
    return out


@pytest.fixture
def found(command: list[str]) -> Callable[..., list[str]]:
    """What the check says of a recipe with these settings."""

    def look(**settings: Any) -> list[str]:
        words = [text for key, value in settings.items() for text in (f"--{key.replace('__', '.')}", str(value))]
        recipe = parse(OPDConfig, [*command, *words])
        trainer = build(recipe, OPDTrainer)
        try:
            findings = examine(trainer, recipe)
        finally:
            trainer.close()
        return [str(f) for f in findings if f.check == "authors"]

    return look


def test_the_author_as_teacher_is_well(found: Any, traces: Path) -> None:
    assert found(data__train=traces) == ["authors: the teacher wrote the traces"]


def test_another_teacher_is_told_of(found: Any, traces: Path, tiny_run: Path) -> None:
    (said, _) = found(data__train=traces, teacher__model=tiny_run / "student")
    assert "were written by" in said and "is another model" in said


def test_another_teacher_than_wrote_what_the_student_was_trained_on_is_told_of(
    found: Any, traces: Path, tiny_run: Path, tmp_path: Path
) -> None:
    """Fine-tuned on traces first, then distilled on-policy on other prompts."""
    run = tmp_path / "sft"
    run.mkdir()
    (run / "student").symlink_to(tiny_run / "student")
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"train": str(traces)}}))
    (said, _) = found(student__model=run / "student", teacher__model=tiny_run / "student")
    assert "that the student was trained on" in said


def test_files_without_a_manifest_say_nothing(found: Any, tmp_path: Path) -> None:
    write_rows(tmp_path / "p.jsonl", tiny.rows(6))
    assert found(data__train=tmp_path / "p.jsonl") == ["authors: no manifest says who wrote the texts"]
