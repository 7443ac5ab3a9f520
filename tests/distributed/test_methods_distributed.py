"""What a composition can hold is trained by two processes as by one: DDP, ZeRO-2 and ZeRO-3 over gloo, LoRA too.

One launch a layout; what is trained there is in ``methods_worker.CASES``. Everything is compared with one process to
1e-5; what was measured is 4e-7 at most, and a resumed run equals its own undisturbed one bit for bit.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.distributed import worker
from tests.distributed.launching import begin, end, kill, launched_once
from tests.distributed.methods_worker import CASES, CROSSED, GLOBAL_BATCH, STEPS, trained

SEVERAL = ("two_processes", "zero2", "zero3")
STAGE = {"one_process": None, "two_processes": None, "zero2": 2, "zero3": 3}
TIME_LIMIT = 600  # seconds a launch; 60 to 120 on two busy cores
RESUMED = [name for name, case in CASES.items() if case.resumed]
JUDGED = [name for name, case in CASES.items() if case.judge]
AVERAGED = [
    name for name in JUDGED if CASES[name].judge == "ema" or (CASES[name].judge, CASES[name].lora) == ("initial", False)
]
HELPED = ("cosine", "mi_alpha", "mi_alpha_lora")


class Layout:
    """What one launch saw."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = sorted(self.folder.glob("rank-*.json"))
        self.ranks: list[dict[str, Any]] = [json.loads(file.read_text()) for file in files]

    def numbers(self, case: str, run: str = "undisturbed", rank: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = self.ranks[rank][case][run]
        return found

    def tensors(self, case: str, run: str = "undisturbed") -> dict[str, dict[str, torch.Tensor]]:
        found: dict[str, Any] = torch.load(self.folder / f"{case}.pt")
        return found[run]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Launch file -> what was seen."""
    known = dict[str, Layout]()

    def of(config: str) -> Layout:
        if config not in known:
            words = ["tests.distributed.methods_worker", "{folder}"]
            if config != "one_process":
                words.append(str(of("one_process").folder))  # to go on from
            known[config] = Layout(launched_once(tmp_path_factory, config, *words, time_limit=TIME_LIMIT))
        return known[config]

    return of


def flat(value: Any, at: str = "") -> dict[str, Any]:
    """Nested numbers by their path."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: x for key, inner in items for path, x in flat(inner, f"{at}/{key}").items()}
    return {at: value}


def close(found: Any, expected: Any) -> None:
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for path, value in expected.items():
        assert found[path] == (pytest.approx(value, rel=1e-5, abs=1e-5) if isinstance(value, float) else value), path


def close_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("config", SEVERAL)
def test_two_processes_train_as_one_does(layouts: Any, config: str, case: str) -> None:
    """Losses, those of each term, the norms of their gradients, every other metric, and the weights in the end."""
    alone, found = layouts("one_process"), layouts(config)
    numbers, expected = found.numbers(case), alone.numbers(case)
    assert (numbers["processes"], numbers["zero_stage"]) == (2, STAGE[config])
    assert len(expected["lines"]) == STEPS and all(line["grad_norm"] > 0 for line in expected["lines"])
    close(numbers["lines"], expected["lines"])
    close_tensors(found.tensors(case)["weights"], alone.tensors(case)["weights"])


@pytest.mark.slow
@pytest.mark.parametrize("case", RESUMED)
@pytest.mark.parametrize("config", ("one_process", *SEVERAL))
def test_a_resumed_run_is_the_undisturbed_one(layouts: Any, config: str, case: str) -> None:
    """Weights, averages, helpers and schedules too, bit for bit."""
    found = layouts(config)
    whole, resumed = found.numbers(case), found.numbers(case, "resumed")
    assert resumed["began"] == STEPS // 2
    for what in ("lines", "heard", "schedules"):
        assert resumed[what] == whole[what], what
    for kind, tensors in found.tensors(case).items():
        close_tensors(found.tensors(case, "resumed")[kind], tensors, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ("from one process", "to one process"))
@pytest.mark.parametrize("case", CROSSED)
@pytest.mark.parametrize("config", SEVERAL)
def test_a_run_goes_on_in_another_launch(layouts: Any, config: str, case: str, direction: str, tmp_path: Path) -> None:
    """With what the method remembers, the adapter, the helpers, and the optimizer's memory of them."""
    alone, found = layouts("one_process"), layouts(config)
    if direction == "from one process":
        numbers, tensors = found.numbers(case, direction), found.tensors(case, direction)
    else:
        numbers, tensors = trained(case, tmp_path, found.folder / case / f"checkpoint-{STEPS // 2}")
    assert numbers["began"] == STEPS // 2
    close(numbers["lines"], alone.numbers(case)["lines"])
    for kind, expected in alone.tensors(case).items():
        close_tensors(tensors[kind], expected)


@pytest.mark.slow
@pytest.mark.parametrize("config", SEVERAL)
def test_terms_are_logged_with_their_losses_and_norms(layouts: Any, config: str) -> None:
    for line in layouts(config).numbers("two_terms")["lines"]:
        assert all(line[f"distill/{term}/{name}"] > 0 for term in ("kl", "labels") for name in ("loss", "grad_norm"))


@pytest.mark.slow
@pytest.mark.parametrize("case", ("two_terms", "two_terms_lora"))
@pytest.mark.parametrize("config", SEVERAL)
def test_a_schedule_hears_the_same_on_every_rank_and_as_in_one_process(layouts: Any, config: str, case: str) -> None:
    alone, found = layouts("one_process").numbers(case)["heard"], layouts(config)
    assert [told["step"] for told in alone] == list(range(1, STEPS + 1))
    assert {"kl/domain/a", "kl/domain/b", "kl/author/student", "labels/author/dataset"} <= alone[0]["groups"].keys()
    assert found.numbers(case)["heard"] == found.numbers(case, rank=1)["heard"]
    close(found.numbers(case)["heard"], alone)


@pytest.mark.slow
@pytest.mark.parametrize("config", SEVERAL)
def test_the_state_of_a_survey_agrees(layouts: Any, config: str) -> None:
    """DistiLLM-2's gap of the first round, of all ranks' sequences."""
    alone, found = layouts("one_process").numbers("distillm2")["schedules"], layouts(config)
    assert alone["on_student"]["anchor"] is not None
    assert found.numbers("distillm2")["schedules"] == found.numbers("distillm2", rank=1)["schedules"]
    close(found.numbers("distillm2")["schedules"], alone)


@pytest.mark.slow
@pytest.mark.parametrize("config", SEVERAL)
def test_the_shares_of_domains_move_alike_on_every_rank(layouts: Any, config: str) -> None:
    """And so do the rows that were drawn by them: all of the global batch, whoever trains on them."""
    alone, found = layouts("one_process").numbers("mixture")["schedules"], layouts(config)
    assert sum(alone["mixture"]["drawn"].values()) == STEPS * GLOBAL_BATCH and alone["mixture"]["measured"]
    assert found.numbers("mixture")["schedules"] == found.numbers("mixture", rank=1)["schedules"]
    close(found.numbers("mixture")["schedules"], alone)


@pytest.mark.slow
@pytest.mark.parametrize("case", JUDGED)
@pytest.mark.parametrize("config", ("one_process", *SEVERAL))
def test_judging_moves_no_weight_of_the_student(layouts: Any, config: str, case: str) -> None:
    for rank in range(len(layouts(config).ranks)):
        numbers = layouts(config).numbers(case, rank=rank)
        assert numbers["judged"] >= STEPS and numbers["moved"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", AVERAGED)
@pytest.mark.parametrize("config", SEVERAL)
def test_the_average_is_that_of_one_process(layouts: Any, config: str, case: str) -> None:
    """That all ranks agree on it, the worker asserts."""
    alone, found = layouts("one_process").tensors(case), layouts(config).tensors(case)
    assert alone["average"]
    close_tensors(found["average"], alone["average"])


@pytest.mark.slow
@pytest.mark.parametrize("case", HELPED)
@pytest.mark.parametrize("config", SEVERAL)
def test_helpers_are_trained_alike_and_not_saved_with_the_student(layouts: Any, config: str, case: str) -> None:
    alone, found = layouts("one_process"), layouts(config)
    assert alone.tensors(case)["helpers"]
    close_tensors(found.tensors(case)["helpers"], alone.tensors(case)["helpers"])
    assert found.numbers(case)["saved"] == {"helpers": [], "difference": 0.0}


@pytest.mark.proof
def test_judges_and_helpers_where_fsdp2_shards(layouts: Any, tmp_path: Path) -> None:
    """The student as its own judge (as it is, as it began, its average), with LoRA too; projectors; gone on with from
    what one process wrote; the judge's weights put back bit for bit."""
    alone, cases = layouts("one_process"), sorted({*JUDGED, *HELPED})
    words = ("-m", "tests.distributed.methods_worker", str(tmp_path), str(alone.folder), *cases)
    end(begin("fsdp2", *words), TIME_LIMIT)
    found = Layout(tmp_path)
    assert len(found.ranks) == 2
    for case in cases:
        for run in found.ranks[0][case]:
            close(found.numbers(case, run)["lines"], alone.numbers(case)["lines"])
            for kind, expected in alone.tensors(case).items():
                close_tensors(found.tensors(case, run)[kind], expected)
        assert [found.numbers(case, rank=rank)["moved"] for rank in range(2)] == [0, 0]
        if case in HELPED:
            assert found.numbers(case)["saved"] == {"helpers": [], "difference": 0.0}


# ---------------------------------------------------------------- killed


def write_recipe(folder: Path, steps: int, objective: dict[str, Any] | None = None) -> Path:
    """An average of the student as the teacher, which reads a hint; DistiLLM-2's two terms on two texts, or another
    objective."""
    worker.make_model(0, hidden=32, tied=True).save_pretrained(folder / "student")
    worker.make_tokenizer().save_pretrained(folder / "student")
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
            "hint": f"t{30 + i} t{50 + i}",
        }
        for i, row in enumerate(worker.make_rows(16, 5))
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "student": {"model": str(folder / "student")},
        "teacher": {"student": "ema", "ema_decay": 0.5, "context": "hint"},
        "data": {"train": str(folder / "train.jsonl"), "contexts": {"hint": "hint"}},
        "objective": objective or {"method": "distillm2", "adaptive_alpha": True, "gradual_beta": True},
        "rollouts": {"max_new_tokens": 8},
        "train": {
            **{"max_steps": steps, "save_steps": 1, "save_total_limit": 2, "logging_steps": 1, "learning_rate": 1e-2},
            **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "seed": 3},
        },
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def start(config: str, recipe: Path, run: Path, *flags: str) -> subprocess.Popen[str]:
    return begin(config, "-m", "llmdistill.opd", "--config", str(recipe), "--output_dir", str(run), *flags)


def logged(run: Path) -> dict[int, dict[str, float]]:
    """Step -> what was logged of it; every step once."""
    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []
    skipped = ("time/", "memory/", "epoch", "teacher/positions", "rollout/tokens_per_second", "teacher/bytes")
    steps = [line for line in lines if "loss" in line]
    assert len({line["step"] for line in steps}) == len(steps)
    return {line["step"]: {k: v for k, v in line.items() if not k.startswith(skipped)} for line in steps}


def killed_after(process: subprocess.Popen[str], run: Path, step: int, delay: float) -> None:
    """SIGKILL a moment after a step was logged, wherever the run is then."""
    until = time.monotonic() + TIME_LIMIT
    while process.poll() is None and time.monotonic() < until and max(logged(run), default=0) < step:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[0][-6000:]
    time.sleep(delay)
    kill(process)


def assert_same(torn: Path, whole: Path, steps: int) -> None:
    found, expected = logged(torn), logged(whole)
    assert sorted(found) == sorted(expected) == list(range(1, steps + 1))
    assert found == expected  # bit for bit
    trained, wanted = (load_file(run / "student" / "model.safetensors") for run in (torn, whole))
    close_tensors(trained, wanted, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("config", SEVERAL)
def test_a_run_that_is_killed_and_resumed_is_the_undisturbed_one(tmp_path: Path, config: str) -> None:
    """Both processes at once, as when a machine loses its power."""
    torn_as_whole(tmp_path, config, kills=1)


@pytest.mark.proof
@pytest.mark.parametrize("config", ("one_process", *SEVERAL))
def test_a_run_killed_twenty_times_is_the_undisturbed_one(tmp_path: Path, config: str) -> None:
    """At random moments: in a step, between steps, while a checkpoint is written by one process or the other."""
    torn_as_whole(tmp_path, config, kills=20)


def torn_as_whole(folder: Path, config: str, kills: int) -> None:
    draw, steps = random.Random(0), 8 if kills == 1 else 10 * kills  # about 6 go by at most between two kills
    recipe, whole, torn = write_recipe(folder, steps), folder / "whole", folder / "torn"
    end(start(config, recipe, whole), TIME_LIMIT)
    for n in range(kills):
        process = start(config, recipe, torn, *(["--resume"] if n else []))
        killed_after(process, torn, max(logged(torn), default=0) + (3 if kills == 1 else 1), draw.uniform(0.0, 0.25))
    assert "resuming from" in end(start(config, recipe, torn, "--resume"), TIME_LIMIT)
    assert_same(torn, whole, steps)


@pytest.mark.slow
def test_an_averaged_student_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    """Where weights are whole on every rank, the average is too: each reads the first one's."""
    steps, whole = 4, dict[str, Path]()
    recipe = write_recipe(tmp_path, steps, {"sequences": "dataset"})  # nothing is drawn: the same for any number
    layouts = {"one_process": ("--per_device_train_batch_size", "4"), "two_processes": ()}
    for config, share in layouts.items():
        whole[config] = tmp_path / config
        end(start(config, recipe, whole[config], *share), TIME_LIMIT)
    for config, other in (("one_process", "two_processes"), ("two_processes", "one_process")):
        torn = tmp_path / f"{config}-torn"
        shutil.copytree(whole[config], torn)
        shutil.rmtree(torn / f"checkpoint-{steps}")
        end(start(other, recipe, torn, *layouts[other], "--resume"), TIME_LIMIT)
        found, expected = logged(torn), logged(whole[config])
        assert sorted(found) == sorted(expected)
        for name in ("loss", "grad_norm"):
            assert found[steps][name] == pytest.approx(expected[steps][name], rel=1e-4), name
        averages = [averaged(run / f"checkpoint-{steps}") for run in (torn, whole[config])]
        close_tensors(*averages)


def averaged(checkpoint: Path) -> dict[str, torch.Tensor]:
    state = torch.load(checkpoint / "method_state_0.pt", weights_only=True)
    return state["judges"]["teacher"]["average"]  # type: ignore[no-any-return]
