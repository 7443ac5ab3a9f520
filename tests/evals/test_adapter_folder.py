"""The folder of an adapter alone, as ``student.saved_as: adapter`` leaves it, is scored as the model it makes."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from llmdistill.evals import evaluate
from llmdistill.evals.records import EvalFolder
from llmdistill.models.loading import load_model
from tests.evals import made
from tests.test_weights import lora

ENGINES = ["hf", pytest.param("vllm", marks=pytest.mark.slow)]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_adapter_is_scored_as_the_merged_model(engine: str, tmp_path: Path, caplog: Any) -> None:
    if engine == "vllm":
        pytest.importorskip("vllm", reason="the vllm extra is not installed")
    base = made.model(tmp_path)
    lora(load_model(str(base), "float32", "eval")[0]).save_pretrained(tmp_path / "adapter")  # without a tokenizer
    merged, tokenizer = load_model(str(tmp_path / "adapter"), "float32", "eval")
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    written, weights = {}, {}
    for name in ("adapter", "merged", "model")[: 3 if engine == "hf" else 2]:  # vLLM takes seconds to load each
        with caplog.at_level(logging.WARNING, "llmdistill"):
            done: Any = evaluate(
                made.suite(tmp_path),
                model=str(tmp_path / name),
                engine=engine,
                dtype="float32",
                output_dir=str(tmp_path / f"out-{name}"),
                console=Console(file=io.StringIO()),
            )
        written[name] = sorted((s.problem, s.index, s.text) for s in EvalFolder(done.folder).samples())
        weights[name] = done.results["weights"]
    assert written["adapter"] == written["merged"] != written.get("model")
    assert len(set(weights.values())) == len(weights) and "merged into it" in caplog.text
