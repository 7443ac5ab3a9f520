"""What users get wrong: one clear line each, exit status 2, nothing lost that was written before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmdistill.opd import main
from llmdistill.recipe.command_line import run_front_door
from tests import tiny


@pytest.fixture
def refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    """``refused(*words)`` runs the front door on a sound recipe changed by ``words`` and returns its error.

    That is one line, or one for each failed check, and the last thing one reads.
    """

    def run(*words: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            run_front_door(main, [*command, *words])
        err = capsys.readouterr().err
        assert exit_.value.code == 2, err
        assert "Traceback" not in err
        before, mark, error = err.rpartition("error: ")
        assert mark and "error: " not in before
        first, *more = error.rstrip().splitlines()
        assert all(x.startswith("  ") for x in more) and first.startswith(f"{len(more)} preflight" if more else "")
        return str(error)

    return run


def write_rows(folder: Path, *prompts: Any, column: str = "prompt") -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({column: p}) + "\n" for p in prompts))
    return str(file)


def saved(folder: Path, model: Any, tokenizer: Any = None) -> str:
    model.save_pretrained(folder)
    (tokenizer or tiny.tokenizer()).save_pretrained(folder)
    return str(folder)


def test_missing_model(refused: Any, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    assert f"student.model {nowhere!r} cannot be loaded" in refused("--student.model", nowhere)
    assert f"teacher.model {nowhere!r} cannot be loaded" in refused("--teacher.model", nowhere)
    assert "student.model is empty" in refused("--student.model=")


def test_data(refused: Any, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere.jsonl")
    assert f"data.train {nowhere!r}: there is no such file. Fix: " in refused("--data.train", nowhere)
    assert f"data.train 'gone.jsonl': there is no such file in {Path.cwd()}. Fix: " in refused(
        "--data.train", "gone.jsonl"
    )
    other = write_rows(tmp_path, "1+1=", column="words")
    line = refused("--data.train", other)
    assert "has no column 'prompt' (it has words). Fix: --data.prompt_column NAME" in line
    line = refused("--data.train", write_rows(tmp_path, "1+1=", ""))
    assert "row 1: prompt is empty" in line and "rows.jsonl, line 2.)" in line
    empty_chat = [{"role": "user", "content": ""}]
    assert "no message with content" in refused("--data.train", write_rows(tmp_path, empty_chat))
    long = write_rows(tmp_path, "1+1=", "x" * 300)
    line = refused("--data.train", long, "--data.max_prompt_tokens", "99")
    assert "row 1: the prompt has 300 tokens, data.max_prompt_tokens is 99" in line
    assert "need 306 positions, the student has 256" in refused("--data.train", long)


def test_no_chat_template(refused: Any, tmp_path: Path) -> None:
    bare = saved(tmp_path / "bare", tiny.llama(1), tiny.tokenizer(None))
    assert "the student's tokenizer has no chat template" in refused("--student.model", bare)


def test_settings(refused: Any) -> None:
    assert "did you mean 'temperature'" in refused("--temperatur", "1")
    assert "rollouts.temperature is -0.5; it must be >= 0" in refused("--temperature", "-0.5")
    line = refused("--estimator", "top_k", "--objective.top_k", "265")
    assert "objective.top_k is 265, the vocabulary has 264 columns. Fix: at most 264." in line
    assert "did you mean 'disk'" in refused("--skip-check", "dsk")


def test_heldout_prompts_in_the_training_set(refused: Any, tiny_run: Path) -> None:
    assert "20 of 20 held-out prompts are also trained on" in refused("--data.heldout", str(tiny_run / "train.jsonl"))


def test_damaged_student(refused: Any, tmp_path: Path) -> None:
    damaged = tiny.llama(1)
    damaged.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    line = refused("--student.model", saved(tmp_path / "damaged", damaged))
    assert "head: the student's logits are NaN" in line


@pytest.mark.parametrize(("temperature", "every"), [("0", "9"), ("1", "9"), ("1", "1")])
def test_weights_that_explode_keep_what_was_written(refused: Any, tmp_path: Path, temperature: str, every: str) -> None:
    """The steps before are in metrics.jsonl, and no checkpoint is of weights that are lost: --resume takes the newest.

    Greedy decoding runs on NaN logits and the loss finds them; sampling must say so itself; so must a checkpoint.
    """
    words = ["--max_steps", "9", "--learning_rate", "1e30", "--save_strategy", "steps", "--save_steps", every]
    line = refused(*words, "--temperature", temperature)
    assert "learning_rate" in line and ("since the update of step 1; they were not saved" in line) == (every == "1")
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [x["step"] for x in lines if "loss" in x]
    assert steps and steps == list(range(1, len(steps) + 1))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_mistake_leaves_an_earlier_run_alone(refused: Any, tmp_path: Path) -> None:
    """Nothing is overwritten: what was in output_dir is still there, or beside it, byte for byte."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    refused("--max_new_tokens", "999")
    kept = [f for f in tmp_path.glob("run*/metrics.jsonl") if f.read_text() == '{"step": 1}\n']
    assert len(kept) == 1


def test_through_the_real_door(command: list[str], tmp_path: Path) -> None:
    """A process of its own: status 2, the one line last, no traceback."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-m", "llmdistill.opd", *command, "--student.model", str(tmp_path / "nowhere")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.rstrip().splitlines()[-1].startswith("error: student.model")
    assert "Traceback" not in done.stderr
