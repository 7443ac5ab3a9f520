"""datatrove's pipelines leave out what the steps leave out, in shards, and say what cannot be done row by row."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datatrove", reason="the datatrove extra is not installed")

from datatrove.executor import LocalPipelineExecutor

from llmdistill.datagen import curate, decontaminate
from llmdistill.datagen.datatrove_blocks import Decontamination, Rules, trace_reader, trace_writer
from llmdistill.datagen.tables import read_rows, write_rows
from llmdistill.errors import UserError

RULES: list[Any] = ["finished", {"tokens": {"most": 14}}, "right"]
QUESTION = "How many apples does Ada have when she buys nine more of them at the market on Sunday?"


def traces() -> list[dict[str, Any]]:
    return [
        {
            "id": str(n),
            "prompt": [{"role": "user", "content": QUESTION if n % 7 == 3 else f"What is {n} + 1?"}],
            "completion": f"It is {n + 1}.",
            "finish": "length" if n % 5 == 4 else "stop",
            "tokens": n % 18,
            "passed": n % 3 != 0,
        }
        for n in range(1, 61)
    ]


def test_a_pipeline_over_shards_is_the_steps_over_the_whole(tmp_path: Path) -> None:
    rows = [row for row in traces() if row["tokens"]]
    write_rows(tmp_path / "all.jsonl", rows)
    write_rows(tmp_path / "suite.jsonl", [{"problem": QUESTION, "answer": "12"}])
    for i in range(3):
        write_rows(tmp_path / "in" / f"{i}.jsonl", rows[i::3])
    curated = curate(tmp_path / "all.jsonl", tmp_path / "curated.jsonl", steps=RULES)
    clean = decontaminate(tmp_path / "curated.jsonl", tmp_path / "clean.jsonl", suites=str(tmp_path / "suite.jsonl"))
    blocks = [Rules(RULES), Decontamination(str(tmp_path / "suite.jsonl"))]
    pipeline = [trace_reader(tmp_path / "in"), *blocks, trace_writer(tmp_path / "out")]
    stats = LocalPipelineExecutor(pipeline, tasks=3, workers=1, logging_dir=str(tmp_path / "logs")).run()
    files = sorted((tmp_path / "out").glob("*.jsonl.gz"))
    found = [json.loads(line) for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]
    assert len(files) == 3 and sorted(found, key=lambda r: int(r["id"])) == list(read_rows(tmp_path / "clean.jsonl"))
    counted = [{k: v.total for k, v in each.stats.items() if k.startswith("dropped_")} for each in stats.stats]
    lost = {f"dropped_{reason}": rows for step in (curated, clean) for reason, rows in step.lost.items()}
    assert {**counted[1], **counted[2]} == lost and len(lost) == 4


def test_a_rule_over_rows_is_refused() -> None:
    with pytest.raises(UserError, match="rule exact_duplicates compares rows.*llmdistill data curate"):
        Rules(["finished", "exact_duplicates"])
