"""Scoring the student while it is trained."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from llmdistill.errors import UserError
from llmdistill.evals.callback import EvalCallback
from llmdistill.evals.engines.local import HFEngine, VLLMSampler
from llmdistill.evals.records import EvalFolder
from llmdistill.opd import main
from tests import tiny
from tests.evals import made
from tests.evals.test_at_size import Waiting


def numbers(run: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["eval/sums/avg@1"]) for row in rows if "eval/sums/avg@1" in row]


def test_a_recipe_names_suites(command: list[str], tmp_path: Path) -> None:
    """Before the first step, at every nth, after the last; and again where a resumed run has not been."""
    suite = made.suite(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"evals": {"suites": [str(suite)], "every_steps": 2, "problems": 4, "longest": 6}}))
    words = ["--config", str(recipe), *command, "--max_steps", "5", "--save_strategy", "steps", "--save_steps", "3"]
    assert main(words) == 0
    run = tmp_path / "run"
    assert [step for step, _ in numbers(run)] == [0, 2, 4, 5]
    assert all(0 <= value <= 1 for _, value in numbers(run))
    folder = run / "evals" / "step-000004" / "sums"
    assert json.loads((folder / "results.json").read_text())["problems"] == 4 and (folder / "report.html").is_file()
    before = numbers(run)
    shutil.rmtree(run / "checkpoint-5")  # killed behind the checkpoint of step 3
    assert main([*words, "--resume"]) == 0
    assert numbers(run) == before


def test_training_is_what_it_was(make_trainer, tmp_path: Path) -> None:
    """Evaluating draws no random number that training would have drawn, and leaves the model training."""
    ends = []
    for evaluated in (False, True):
        torch.manual_seed(0)
        trainer = make_trainer(save_strategy="no", learning_rate=1e-2)
        if evaluated:
            callback = EvalCallback(
                trainer, [str(made.suite(tmp_path))], every_steps=1, problems=3, samples=2, longest=5
            )
            trainer.add_callback(callback)
        trainer.train()
        assert trainer.model.training
        ends.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_a_problem_is_graded_while_others_are_drawn(
    make_trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine does not go on to the second problem before the first one has its grades."""
    trainer = make_trainer(save_strategy="no")
    suite = made.suite(tmp_path, sampling={"n": 2, "temperature": 1.0, "max_new_tokens": 4})
    callback = EvalCallback(trainer, [str(suite)], problems=3)
    steps = Path(trainer.args.output_dir) / "evals" / "step-000000"
    monkeypatch.setattr(callback, "_engine", lambda jobs: nullcontext(Waiting(steps)))
    callback.evaluate(trainer.state)
    results = json.loads((steps / "sums" / "results.json").read_text())
    assert results["problems"] == 3 and not (steps / "sums" / "grading.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("every", "drawn"), [(1, VLLMSampler), (2, HFEngine)])
def test_the_run_s_own_engine_draws(
    make_trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, drawn: type
) -> None:
    """With the weights of now: greedy, it writes what generate would. Training is what it was."""
    pytest.importorskip("vllm", reason="the vllm extra is not installed")
    suite = str(made.suite(tmp_path, sampling={"n": 1, "temperature": 0.0, "max_new_tokens": 5}))
    seen, ends, draw = list[type](), list[dict[str, torch.Tensor]](), EvalCallback._draw

    def noted(self: EvalCallback, jobs: Any, engine: Any, console: Any) -> None:
        seen.append(type(engine))
        draw(self, jobs, engine, console)

    monkeypatch.setattr(EvalCallback, "_draw", noted)
    for evaluated in (True, False):
        torch.manual_seed(0)
        rollouts = {"engine": "vllm", "kv_cache_gib": 0.05, "push_every": every, "dtype": "float32"}
        trainer = make_trainer(save_strategy="no", learning_rate=1e-2, rollouts=rollouts)
        try:
            callback = EvalCallback(trainer, [suite], every_steps=1, problems=3, samples=1, longest=5)
            if evaluated:
                trainer.add_callback(callback)
            trainer.train()
            if evaluated:
                job = callback.jobs[0]
                samples = EvalFolder(Path(trainer.args.output_dir) / "evals" / "step-000002" / "sums").samples()
                now = HFEngine(trainer.model, trainer.processing_class).draw(job.asked, job.sampling, ())
                assert {s.problem: s.text for s in now} == {s.problem: s.text for s in samples} and len(samples) == 3
            ends.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
        finally:
            trainer.close()
    assert set(seen) == {drawn}
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_a_suite_that_cannot_be_stops_before_training(make_trainer, tmp_path: Path) -> None:
    trainer = make_trainer(save_strategy="no")
    with pytest.raises(UserError, match="neither a file nor one of"):
        EvalCallback(trainer, ["gsm9k"])
    with pytest.raises(UserError, match="is not in"):
        EvalCallback(trainer, [str(made.suite(tmp_path, data={"file": "gone.jsonl"}))])


def test_what_would_share_a_folder_or_draw_one_sample_twice_is_refused(make_trainer, tmp_path: Path) -> None:
    trainer, suite = make_trainer(save_strategy="no"), str(made.suite(tmp_path))
    with pytest.raises(UserError, match="evals.suites has 'sums' twice"):
        EvalCallback(trainer, [suite, suite])
    greedy = str(made.suite(tmp_path, sampling={"n": 1, "max_new_tokens": 4}))
    with pytest.raises(UserError, match="Fix: evals.samples 1"):
        EvalCallback(trainer, [greedy], samples=2)


def test_the_saved_student_keeps_its_generation_settings(make_trainer, tmp_path: Path) -> None:
    """Sampling sets them aside; with adapters the wrapper hands its own down to the model below."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny.llama(1, tied=False), LoraConfig(r=2, target_modules="all-linear"))
    trainer = make_trainer(student=adapted, save_strategy="no")
    before = adapted.get_base_model().generation_config.to_dict()
    trainer.add_callback(EvalCallback(trainer, [str(made.suite(tmp_path))], problems=2, samples=1, longest=3))
    trainer.train()
    assert adapted.get_base_model().generation_config.to_dict() == before


@pytest.mark.slow
def test_sharded_over_ranks_with_unequal_shares(tmp_path: Path) -> None:
    """ZeRO-3 on two processes with three problems, then with one: a rank with less to draw holds nobody up."""
    pytest.importorskip("deepspeed", reason="the deepspeed extra is not installed")
    root = Path(__file__).resolve().parents[2]
    script = tmp_path / "train.py"
    script.write_text(SHARDED)
    config = root / "recipes" / "accelerate" / "zero3.yaml"
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    made.suite(tmp_path)
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        "--num_processes",
        "2",
    ]
    for problems in ("3", "1"):
        words = [str(script), str(tmp_path), problems]
        subprocess.run([*launcher, *words], check=True, env=environment, timeout=240, capture_output=True)
        results = json.loads((tmp_path / problems / "evals" / "step-000001" / "sums" / "results.json").read_text())
        assert results["problems"] == int(problems)


SHARDED = """
import sys
from pathlib import Path
from llmdistill import OPDConfig, OPDTrainer, RolloutConfig
from llmdistill.recipe.launches import leave_group
from llmdistill.evals.callback import EvalCallback
from llmdistill.evals.engines.local import HFEngine, VLLMSampler
from llmdistill.evals.records import EvalFolder
from tests import tiny

folder, problems = Path(sys.argv[1]), sys.argv[2]
args = OPDConfig(output_dir=str(folder / problems), max_steps=1, save_strategy="no", per_device_train_batch_size=2,
                 rollouts=RolloutConfig(max_new_tokens=6))
trainer = OPDTrainer(tiny.llama(1), args, tiny.llama(2), train_dataset=tiny.rows(8, completion=False),
                     processing_class=tiny.tokenizer())
suites = [str(folder / "sums.yaml")]
trainer.add_callback(EvalCallback(trainer, suites, problems=int(problems), samples=1, longest=9, batch=1))
trainer.train()
leave_group()
"""
