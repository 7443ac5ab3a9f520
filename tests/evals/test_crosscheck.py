"""eval/crosscheck.py as far as it goes without lm-eval: what is handed over must be what was stored."""

from __future__ import annotations

import gzip
import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from llmdistill.evals.records import EvalFolder, Problem

SCRIPT = Path(__file__).parents[2] / "eval" / "crosscheck.py"


@pytest.fixture(scope="module")
def crosscheck() -> ModuleType:
    spec = spec_from_file_location("crosscheck", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gold_reaches_each_task_in_the_form_of_its_own_data(crosscheck: ModuleType) -> None:
    problem = Problem("p", "How much is 1/2?", "math", "\\frac{1}{2}")
    assert crosscheck.document("gsm8k", problem)["answer"] == "#### \\frac{1}{2}"  # as GSM8K's solutions end
    assert crosscheck.document("minerva_math", problem)["solution"] == "The answer is $\\boxed{\\frac{1}{2}}$."
    assert crosscheck.document("aime", problem)["Answer"] == "\\frac{1}{2}"
    for task in crosscheck.SHIPPED:
        assert problem.question in crosscheck.document(task, problem).values()


def test_building_twice_stores_each_completion_once_thinking_included(crosscheck: ModuleType, tmp_path: Path) -> None:
    rows = [
        {"id": f"t/{i}", "problem": f"{i} + {i}?", "answer": str(2 * i), "response": f"It is \\boxed{{{2 * i}}}."}
        for i in range(4)
    ]
    rows[0]["thinking"] = "Is it \\boxed{7}?"  # a draft; the answer after it counts
    rows[1]["response"] = "It is \\boxed{3}."
    traces = tmp_path / "traces.jsonl.gz"
    traces.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    folder = EvalFolder(tmp_path / "built")
    for _ in range(2):
        crosscheck.build(traces, folder, 4, 0)
    samples = folder.samples()
    assert len((folder.path / "samples" / "rank-0.jsonl").read_text().splitlines()) == len(samples) == 4
    assert samples.of("t/0")[0].text == "<think>Is it \\boxed{7}?</think>It is \\boxed{0}."
    assert {g.problem: g.passed for g in folder.grades()} == {"t/0": True, "t/1": False, "t/2": True, "t/3": True}


def test_task_file_changes_only_where_documents_come_from(
    crosscheck: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filters, metrics and stop sequences must stay lm-eval's: none of their keys may be in what overrides it."""
    fake = ModuleType("lm_eval")
    fake.__file__ = str(tmp_path / "lm_eval" / "__init__.py")
    monkeypatch.setitem(sys.modules, "lm_eval", fake)
    for task, shipped in crosscheck.SHIPPED.items():
        crosscheck.write_task(tmp_path, task, [Problem("p", "1 + 1?", "math", "2"), Problem("q", "é\n?", "math", "3")])
        settings = json.loads((tmp_path / f"{task}.yaml").read_text())
        assert settings["include"].endswith(f"lm_eval/tasks/{shipped}")
        assert not {"filter_list", "metric_list", "process_results", "generation_kwargs"} & set(settings)
        documents = Path(settings["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
        assert [json.loads(line) for line in documents] == [
            crosscheck.document(task, Problem("p", "1 + 1?", "math", "2")),
            crosscheck.document(task, Problem("q", "é\n?", "math", "3")),
        ]
