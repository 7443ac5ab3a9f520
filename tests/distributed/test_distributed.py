"""Two processes train as one does: DDP, ZeRO-2, ZeRO-3 and FSDP2 over gloo, with the recipes' launch files."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmdistill.errors import UserError
from llmdistill.recipe.launches import (
    check_cpu_launch,
    check_fsdp_launch,
    check_parallelism,
    launched_processes,
    whole_models,
)
from tests.alive import FILE_BYTES
from tests.distributed import worker
from tests.distributed.launching import launch, launched_once

SEVERAL = ("two_processes", "zero2", "zero3", "fsdp2")
CELLS = [(c, run) for c in SEVERAL for run in (worker.RUNS if c != "fsdp2" else (worker.RUNS[0], worker.RUNS[3]))]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Launch file -> what its worker wrote, and ``folder``."""

    def of(config: str) -> dict[str, Any]:
        words = ["{folder}/out.json", "{folder}"]
        if config != "one_process":
            words.append(of("one_process")["folder"])  # to go on from
        folder = launched_once(tmp_path_factory, config, "tests.distributed.worker", *words)
        found: dict[str, Any] = json.loads((folder / "out.json").read_text())
        return {**found, "folder": str(folder)}

    return of


@pytest.mark.slow
@pytest.mark.parametrize("config", SEVERAL)
def test_as_many_processes_as_asked_for_and_really_sharded(results: Any, config: str) -> None:
    stage = {"zero2": 2, "zero3": 3}.get(config)
    for run in (run for c, run in CELLS if c == config):
        alone, found = results("one_process")[run], results(config)[run]
        assert (alone["processes"], found["processes"]) == (1, 2)
        assert found["zero_stage"] == stage
        share = 2 if config in ("zero3", "fsdp2") else 1
        # Every parameter has an even number of elements, so no shard is padded.
        assert found["local_parameters"] * share == alone["local_parameters"]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "run"), CELLS)
def test_the_numbers_do_not_depend_on_how_many_processes_share_the_batch(results: Any, config: str, run: str) -> None:
    alone, found = results("one_process")[run], results(config)[run]
    assert len(alone["losses"]) == worker.STEPS
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5, abs=1e-5)
    # Adam hides a gradient of the wrong scale from the losses; its norm does not. Measured: 3e-6 apart at most.
    for name in ("grad_norm", "distill/reverse_kl", "distill/top1_agreement", "rollout/mean_length"):
        assert [step[name] for step in found["logged"]] == pytest.approx(
            [step[name] for step in alone["logged"]], rel=1e-4
        )
    # evaluate() before training and after it: the same sequences in the same order, each counted once.
    for theirs, ours in zip(found["evaluated"], alone["evaluated"], strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "run"), CELLS)
def test_a_resumed_run_goes_on_as_the_undisturbed_one(results: Any, config: str, run: str) -> None:
    found = results(config)[run]
    assert found["resumed_at"] == worker.STEPS // 2
    assert found["resumed"] == pytest.approx(found["losses"], rel=1e-5, abs=1e-5)
    assert found["steps_in_file"] == list(range(1, worker.STEPS + 1))  # the lines after the checkpoint only once


@pytest.mark.slow
@pytest.mark.parametrize("direction", ("from one process", "to one process"))
@pytest.mark.parametrize("config", SEVERAL)
def test_a_run_goes_on_in_another_launch(results: Any, config: str, direction: str, tmp_path: Path) -> None:
    """With its weights, the optimizer's moments and the schedule: losses and norms of gradients, step by step."""
    whole, half = results("one_process")["tied/dataset"], worker.STEPS // 2
    if direction == "from one process":
        found = results(config)[direction]
    else:
        one = Path(results("one_process")["folder"]) / "tied-dataset"
        found = worker.gone_on(tmp_path, Path(results(config)["folder"]) / "tied-dataset", one)
    assert found["resumed_at"] == half
    for name in ("loss", "grad_norm", "learning_rate"):
        expected = [step[name] for step in whole["logged"][half:]]
        assert [step[name] for step in found["logged"]] == pytest.approx(expected, rel=1e-5, abs=1e-5), name
    # Loaded again, as load_best_model_at_end does. A step moves weights by 1e-2; those of two processes are 7e-5 apart,
    # for Adam divides gradients that are rounding by their size.
    assert found["best"] < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("config", "run"), CELLS)
def test_the_saved_student_is_the_trained_one(results: Any, config: str, run: str) -> None:
    assert results(config)[run]["saved_difference"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("config", ("zero3", "fsdp2"))
def test_a_sharded_student_is_never_whole_in_a_process_that_saves_it(results: Any, config: str) -> None:
    for run in (run for c, run in CELLS if c == config):
        most, everything, largest = results(config)[run]["saved_alive"]
        assert most <= FILE_BYTES + 2 * largest and 2 * most < everything
        assert results(config)[run]["saved_files"] >= everything // FILE_BYTES


@pytest.mark.slow
def test_front_door_in_two_processes_writes_one_run_folder(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    launch("two_processes", "-m", "llmdistill.opd", "--config", str(recipe))
    run = tmp_path / "run"
    written = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    assert written >= {
        "config.yaml",
        "metrics.jsonl",
        "before.json",
        "after.json",
        "summary.json",
        "checkpoint-2/rng_state_1.pth",
        "completions/step-000002.parquet",
        "student/model.safetensors",
    }
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kinds = Counter((line["step"], key) for line in lines for key in ("loss", "train_runtime") if key in line)
    assert kinds == {(1, "loss"): 1, (2, "loss"): 1, (2, "train_runtime"): 1}
    # The five held-out sequences of both processes, not the three of the first.
    assert len(json.loads((run / "after.json").read_text())["sequences"]["student"]["reverse_kl"]) == 5
    assert not list(tmp_path.glob("run.*"))  # no second process moved the first one's folder aside


def write_recipe(folder: Path) -> Path:
    """Models, prompts and recipe of a run of two steps."""
    tokenizer = worker.make_tokenizer()
    for name, seed in (("student", 0), ("teacher", 1)):
        worker.make_model(seed, hidden=32, tied=True).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, count in (("train", 16), ("heldout", 5)):
        rows = ({"prompt": [{"role": "user", "content": row["prompt"]}]} for row in worker.make_rows(count, count))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "student": {"model": str(folder / "student")},
        "teacher": {"model": str(folder / "teacher"), "dtype": "float32"},
        # A stream: each process reads all of it and takes its share of every batch.
        "data": {"train": str(folder / "train.jsonl"), "heldout": str(folder / "heldout.jsonl"), "streaming": True},
        "rollouts": {"max_new_tokens": 8},
        "train": {
            "output_dir": str(folder / "run"),
            "max_steps": 2,
            "save_steps": 2,
            "logging_steps": 1,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


@pytest.mark.parametrize("settings", ({}, {"FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}))
def test_fsdp_that_would_train_something_else_is_refused(settings: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"Fix: .*recipes/accelerate/fsdp2.yaml"):
        check_fsdp_launch({"ACCELERATE_USE_FSDP": "true", **settings})


def test_a_launch_that_silently_starts_one_process_is_named() -> None:
    """A contract with accelerate: what `accelerate launch --num_processes 2` does where there is no GPU."""
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    args = launch_command_parser().parse_args(["--num_processes=2", "--num_machines=1", "--cpu", "x.py"])
    args.use_cpu, args.mixed_precision, args.dynamo_backend, args.num_cpu_threads_per_process = True, "no", "no", 1
    _, env = prepare_simple_launcher_cmd_env(args)
    set_by_it = {k: v for k, v in env.items() if os.environ.get(k) != v}
    assert launched_processes(set_by_it) == 1
    with pytest.warns(UserWarning, match="started one"):
        check_cpu_launch(set_by_it)


@pytest.mark.parametrize("kind", ["cp", "sp", "tp"])
def test_a_launch_that_would_part_a_text_among_processes_is_refused(kind: str) -> None:
    """A contract with accelerate: what its launcher sets for ``parallelism_config_cp_size: 2``."""
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_extend_env_parallelism_config

    args = launch_command_parser().parse_args([f"--parallelism_config_{kind}_size", "2", "x.py"])
    env = prepare_extend_env_parallelism_config(args, {})
    with pytest.raises(UserError, match=f"parallelism_config_{kind}_size is 2.*docs/training.md"):
        check_parallelism(env)
    check_parallelism({**env, f"PARALLELISM_CONFIG_{kind.upper()}_SIZE": "1"})


def test_an_ordinary_launch_passes(recwarn: pytest.WarningsRecorder) -> None:
    check_cpu_launch({})
    check_parallelism({})
    check_cpu_launch({"ACCELERATE_DYNAMO_BACKEND": "NO", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"})
    with whole_models():  # without ZeRO-3: nothing
        pass
    assert not recwarn.list
