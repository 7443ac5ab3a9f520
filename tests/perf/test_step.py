"""The benchmark of whole steps runs, each contender of it, and its lines say what they are of."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from eval.perf import step
from tests import tiny


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    for name, seed in (("student", 1), ("teacher", 2)):
        tiny.llama(seed).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, tiny.rows(6, completion=False))))
    folders = [w for name in ("student", "teacher") for w in (f"--{name}", str(tmp_path / name))]
    return [*folders, "--prompts", str(tmp_path / "prompts.jsonl"), "--threads", "1", "--float32", "--steps", "2"]


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("floor", "ours")),
        pytest.param("trl", marks=pytest.mark.proof),
    ],
)
def test_every_contender_samples_all_its_tokens_and_times_its_steps(name: str, words: list[str], capsys: Any) -> None:
    step.main([*words, "--only", name, "--batch", "2", "--new-tokens", "5"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(found["times"]["step"]) == 2 and found["peak_gib"] > 0
    if name == "floor":
        parts = [sum(t) for t in zip(*(v for k, v in found["times"].items() if k != "step"), strict=True)]
        assert parts == pytest.approx(found["times"]["step"])


def test_lines_hold_all_steps_of_all_rounds_and_ratios_of_medians(tmp_path: Path, monkeypatch: Any) -> None:
    def measured(name: str, words: list[str]) -> dict[str, Any]:
        seconds = {"floor": [1.0, 2.0, 4.0], "ours": [2.0, 3.0, 9.0], "trl": [6.0, 6.0, 6.0]}[name]
        return {"times": {"step": seconds}, "peak_gib": 2.0 if name == "trl" else 1.0}

    monkeypatch.setattr(step, "in_a_process", measured)
    results = tmp_path / "results.csv"
    step.main(["--shapes", "8x40", "--rounds", "2", "--without", "ours_vllm", "--results", str(results)])
    with results.open(newline="") as file:
        lines = {line["cell"].split(",")[0] + line["cell"].rpartition(":")[2]: line for line in csv.DictReader(file)}
    assert lines["ours step"]["runs"] == "6" and lines["ours step"]["p50"] == "3"
    assert lines["ours over floor step"]["p50"] == "1.5" and lines["trl over ours step"]["p50"] == "2"
    assert lines["ours over trl peak resident memory"]["p50"] == "0.5"
