"""Evidence beside traces is what the teacher says when it runs, and a run on it needs no teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmdistill import opd
from llmdistill.datagen.chain import read_chain
from llmdistill.datagen.scores import blocks_folder, score
from llmdistill.datagen.tables import read_rows, write_rows
from llmdistill.errors import UserError
from llmdistill.recipe.command_line import parse
from tests import tiny

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "data"


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    write_rows(tmp_path / "t.jsonl", tiny.rows(8))
    return tmp_path / "t.jsonl"


def settings(run: Path) -> dict[str, Any]:
    teacher = {"model": str(run / "teacher"), "dtype": "float32"}
    return {"teacher": teacher, "student": str(run / "student"), "top_k": 8, "lossless": True, "batch_size": 3}


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_a_run_on_stored_evidence_is_the_run_with_its_teacher(
    traces: Path, tiny_run: Path, tmp_path: Path, command: list[str]
) -> None:
    made = score(traces, tmp_path / "scored.jsonl", **settings(tiny_run))
    assert made.counts["written"] == 8 and list(read_rows(tmp_path / "scored.jsonl")) == tiny.rows(8)
    offline = ["--sequences", "dataset", "--estimator", "top_k", "--objective.top_k", "8"]
    offline += ["--divergence", "forward_kl"]
    words = [*command, *offline, "--data.train", str(tmp_path / "scored.jsonl"), "--max_steps", "3"]
    assert opd.main([*words, "--output_dir", str(tmp_path / "live")]) in (0, None)
    at = words.index("--teacher.model")
    blocks = ["--teacher.stored", str(blocks_folder(tmp_path / "scored.jsonl")), "--teacher.lossless", "true"]
    assert opd.main([*words[:at], *words[at + 2 :], *blocks, "--output_dir", str(tmp_path / "stored")]) in (0, None)
    assert losses(tmp_path / "stored") == pytest.approx(losses(tmp_path / "live"), rel=1e-5)


def test_what_was_scored_is_not_scored_again_and_what_is_too_long_is_lost(
    traces: Path, tiny_run: Path, tmp_path: Path
) -> None:
    made = score(traces, tmp_path / "s.jsonl", **settings(tiny_run), max_tokens=20)
    assert made.lost["too long"] + made.counts["written"] == 8 and made.counts["written"] > 0
    size = sum(file.stat().st_size for file in (tmp_path / "s.blocks").glob("*.blocks"))
    (tmp_path / "s.jsonl").unlink()
    score(traces, tmp_path / "s.jsonl", **settings(tiny_run), max_tokens=20)
    assert sum(file.stat().st_size for file in (tmp_path / "s.blocks").glob("*.blocks")) == size


def test_a_store_of_another_teacher_is_refused(traces: Path, tiny_run: Path, tmp_path: Path) -> None:
    score(traces, tmp_path / "s.jsonl", **settings(tiny_run))
    for file in tmp_path.glob("s.jsonl*"):
        file.unlink()
    other = {**settings(tiny_run), "teacher": str(tiny_run / "student")}
    with pytest.raises(UserError, match="holds evidence of teacher"):
        score(traces, tmp_path / "s.jsonl", **other)


def test_the_offline_recipe_reads_what_the_chain_of_sums_writes() -> None:
    step = next(link for link in read_chain(RECIPES / "sums.yaml") if link.kind == "score")
    recipe = parse(opd.OPDConfig, ["--config", str(RECIPES / "offline_opd.yaml")])
    assert recipe.data.train == str(step.out) and recipe.teacher.stored == str(blocks_folder(step.out))
    assert recipe.args.top_k == step.settings["top_k"] and recipe.student.model == step.settings["student"]
