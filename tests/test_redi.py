"""The REDI front door: both stages by one command, the baselines through TRL, resume, and settings that contradict."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from llmdistill import redi
from llmdistill.errors import UserError
from llmdistill.objectives.redi import dpo_loss
from llmdistill.pipeline import redi_stages
from llmdistill.recipe.command_line import parse
from llmdistill.record.page.paired import change
from llmdistill.record.run_folder import RunFolder
from llmdistill.redi import REDIConfig
from tests.redi_runs import lines, make_place, read, student, student_logps, words
from tests.trainer.pair_cases import by_hand, encoded, pair_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("redi"))


@pytest.fixture(scope="module")
def undisturbed(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Method -> a run of both stages, made once."""
    known: dict[str, Path] = {}

    def of(method: str) -> Path:
        if method not in known:
            known[method] = tmp_path_factory.mktemp(method) / "run"
            assert redi.main(words(place, known[method], method=method)) == 0
        return known[method]

    return of


@pytest.fixture
def whole(undisturbed: Any) -> Path:
    return undisturbed("redi")


def test_one_command_runs_both_stages_and_records_both(place: Path, whole: Path) -> None:
    for run, name in ((whole / "stage1", "stage 1"), (whole, "stage 2")):
        assert [line["step"] for line in lines(run)] == [1, 2, 3, 4]
        assert all(line["time/student"] > 0 and line["memory/peak_gib"] > 0 for line in lines(run))
        assert read(run, "summary.json")["stage"] == name and read(run, "summary.json")["steps"] == 4
        assert (run / "checkpoint-4" / "trainer_state.json").exists()
    assert [line["redi/chosen_length"] > 0 for line in lines(whole)] == [True] * 4
    # What the measurements say is what the saved students say.
    heldout = encoded(pair_rows(22)[16:])
    stations = {
        place / "student": read(whole / "stage1", "before.json"),
        whole / "stage1" / "student": read(whole / "stage1", "after.json"),
        whole / "student": read(whole, "after.json"),
    }
    for folder, measured in stations.items():
        found = [measured["pairs"]["chosen_logp"], measured["pairs"]["rejected_logp"]]
        assert found == pytest.approx(student_logps(folder, heldout), rel=1e-5)
    assert read(whole, "before.json")["pairs"] == read(whole / "stage1", "after.json")["pairs"]
    # Stage 1 raised the chosen side, stage 2 the margin.
    chosen = [m["pairs"]["chosen_logp"] for m in stations.values()]
    margins = [m["pairs"]["margin"] for m in stations.values()]
    assert chosen[1] > chosen[0] + 0.1 and margins[2] > margins[1] + 0.1


def test_the_table_shows_each_stage_s_change_pair_by_pair(whole: Path) -> None:
    """As the run page does: the means' own intervals overlap, the change has one that is its own."""
    console = Console(file=io.StringIO(), width=160)
    redi_stages._print(RunFolder(whole / "stage1"), RunFolder(whole), console)
    printed = [line for line in console.file.getvalue().splitlines() if "chosen_logp" in line]  # type: ignore[attr-defined]
    (cells,) = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed]
    values = [
        read(whole / f, "before.json" if i == 0 else "after.json") for i, f in enumerate(("stage1", "stage1", "."))
    ]
    assert [cells[1], cells[2], cells[4]] == [f"{v['pairs']['chosen_logp']:.3f}" for v in values]
    for cell, before, after in ((cells[3], *values[:2]), (cells[5], *values[1:])):
        paired = change(before, after, "pairs", "chosen_logp")
        assert paired is not None
        assert cell == f"{paired.difference:+.3f} [{paired.low:+.3f}, {paired.high:+.3f}]"


def test_the_resolved_recipe_can_be_run_again(whole: Path, tmp_path: Path) -> None:
    resolved = yaml.safe_load((whole / "config.yaml").read_text())
    assert "teacher" not in resolved and resolved["objective"]["alpha"] == 0.8
    assert redi.main(["--config", str(whole / "config.yaml"), "--output_dir", str(tmp_path / "again")]) == 0
    assert [line["loss"] for line in lines(tmp_path / "again")] == [line["loss"] for line in lines(whole)]


def test_stage_1_is_the_token_mean_over_the_chosen_sides(place: Path, tmp_path: Path) -> None:
    """All rows in one batch: TRL's loss before its update, on the very ids that stage 2 has."""
    output = tmp_path / "run"
    redi.main(words(place, output, stage1_steps=1, stage1_batch_size=16, max_steps=1))
    pairs = encoded(pair_rows(16))
    lengths = torch.tensor([len(p.chosen) for p in pairs])
    with torch.no_grad():
        means, _ = by_hand(student(place / "student"), pairs)
    (line,) = lines(output / "stage1")
    assert line["loss"] == pytest.approx(-((means * lengths).sum() / lengths.sum()).item(), rel=1e-5)
    assert line["learning_rate"] == 1e-3 and lines(output)[0]["learning_rate"] == 1e-3


def test_positives_of_their_own_and_a_skipped_stage_1(place: Path, tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k in ("prompt", "chosen")} for row in pair_rows(8)]
    (tmp_path / "positives.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    own = {"positives": tmp_path / "positives.jsonl", "stage1_steps": 0, "stage1_epochs": 2, "max_steps": 1}
    redi.main(words(place, tmp_path / "own", **own))
    assert read(tmp_path / "own" / "stage1", "summary.json")["steps"] == 4  # two epochs of 8 rows, 4 a step
    none = {"stage1_steps": 0, "stage1_epochs": 0, "max_steps": 1}
    redi.main(words(place, tmp_path / "none", **none))
    assert not (tmp_path / "none" / "stage1").exists()
    heldout = encoded(pair_rows(22)[16:])
    before = read(tmp_path / "none", "before.json")["pairs"]["chosen_logp"]
    assert before == pytest.approx(student_logps(place / "student", heldout)[0], rel=1e-5)


def test_dpo_is_trained_by_trl_against_the_student_of_stage_1(place: Path, tmp_path: Path) -> None:
    """All pairs in every batch: its first loss is log 2, its second that of the reference formula."""
    run = tmp_path / "run"
    redi.main(
        words(
            place,
            run,
            **{"method": "dpo", "objective.beta": 0.5, "per_device_train_batch_size": 16, "learning_rate": 1e-3},
            **{"max_steps": 2, "save_steps": 1},
        )
    )
    first, second = (line["loss"] for line in lines(run))
    assert first == pytest.approx(0.693147, rel=1e-5)
    pairs = encoded(pair_rows(16))
    a_len, b_len = (torch.tensor([len(getattr(p, side)) for p in pairs]) for side in ("chosen", "rejected"))
    with torch.no_grad():
        summed = [
            x * n
            for folder in (run / "checkpoint-1", run / "stage1" / "student")
            for x, n in zip(by_hand(student(folder), pairs), (a_len, b_len), strict=True)
        ]
    assert second == pytest.approx(dpo_loss(*summed, beta=0.5).item(), rel=1e-4)
    assert second < first - 0.05
    assert read(run, "after.json")["pairs"]["margin"] > read(run, "before.json")["pairs"]["margin"]


@pytest.mark.parametrize("method", ["simpo", "symmetric", "sft"])
def test_the_other_methods_end_with_a_student(place: Path, tmp_path: Path, method: str) -> None:
    """Of a stream they take the rows of their steps; ``symmetric`` reads all rows at the start."""
    run = tmp_path / "run"
    streamed = {} if method == "symmetric" else {"data.streaming": "true", "data.shuffle_buffer": 0}
    assert redi.main(words(place, run, method=method, **streamed)) == 0
    heldout = encoded(pair_rows(22)[16:])
    after = read(run, "after.json")["pairs"]
    assert after["chosen_logp"] == pytest.approx(student_logps(run / "student", heldout)[0], rel=1e-5)
    assert (run / "stage1").exists() == (method != "sft")
    assert read(run, "summary.json")["method"] == method


@pytest.mark.parametrize("method", ["redi", pytest.param("dpo", marks=pytest.mark.slow)])
def test_lora_is_merged_after_each_stage(place: Path, tmp_path: Path, method: str) -> None:
    run = tmp_path / "run"
    redi.main(words(place, run, method=method, lora_r=2, stage1_learning_rate=1e-2, learning_rate=1e-2))
    heldout = encoded(pair_rows(22)[16:])
    for stage in (run / "stage1", run):
        found = read(stage, "after.json")["pairs"]["chosen_logp"]
        assert found == pytest.approx(student_logps(stage / "student", heldout)[0], rel=1e-4)
    assert (run / "adapter" / "adapter_config.json").exists()


def test_trl_reports_to_nobody(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the hub is online and the environment does not forbid it."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _telemetry

    sent: list[Any] = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setattr(_telemetry, "_start_telemetry_thread", lambda: sent.append(1))
    _telemetry.send_telemetry("test")
    assert sent == [1]  # this is what would be seen
    redi.main(words(place, tmp_path / "run", method="dpo", max_steps=1, stage1_steps=1))
    assert sent == [1]


# ---------------------------------------------------------------- resume


class Stop(Exception):
    pass


@pytest.mark.parametrize("method", ["redi", pytest.param("dpo", marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", ["stage1 step 3", "stage1 saved", "stage2 step 3", "stage2 saving"])
def test_interrupted_anywhere_it_goes_on_bit_for_bit(
    place: Path, undisturbed: Any, tmp_path: Path, where: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses and the same weights as the undisturbed run."""
    from llmdistill.record.run_folder import RunFolderCallback

    whole, torn = undisturbed(method), tmp_path / "torn"
    in_stage1, stage_folder = where.startswith("stage1"), torn / "stage1" if where.startswith("stage1") else torn
    with monkeypatch.context() as patch:
        step_end, save, write = RunFolderCallback.on_step_end, redi_stages.save_student, RunFolder.write_json

        def stopping_step(self: Any, args: Any, state: Any, control: Any, **kw: Any) -> None:
            if state.global_step == 3 and self.folder.path == stage_folder:
                raise Stop
            step_end(self, args, state, control, **kw)

        def stopping_save(trainer: Any, folder: Any, student: Any) -> None:
            save(trainer, folder, student)
            if folder.path == stage_folder:  # saved, and not yet marked as finished
                raise Stop

        def stopping_write(self: Any, name: str, value: Any) -> None:
            write(self, name, value)
            if name == "summary.json" and self.path == stage_folder:
                raise Stop

        patch.setattr(RunFolderCallback, "on_step_end", stopping_step if "step 3" in where else step_end)
        patch.setattr(redi_stages, "save_student", stopping_save if where == "stage2 saving" else save)
        patch.setattr(RunFolder, "write_json", stopping_write if where == "stage1 saved" else write)
        with pytest.raises(Stop):
            redi.main(words(place, torn, method=method))
    finished = (torn / "stage1" / "summary.json").exists()
    assert finished == (not in_stage1 or where == "stage1 saved")
    stamp = (torn / "stage1" / "student" / "model.safetensors").stat().st_mtime_ns if finished else 0
    assert redi.main([*words(place, torn, method=method), "--resume"]) == 0
    if finished:  # not done a second time
        assert (torn / "stage1" / "student" / "model.safetensors").stat().st_mtime_ns == stamp
    for stage in (".", "stage1"):
        expected, found = lines(whole / stage), lines(torn / stage)
        pick = [(line["step"], line["loss"], line["grad_norm"]) for line in expected]
        assert [(line["step"], line["loss"], line["grad_norm"]) for line in found] == pick
        weights = [load_file(run / stage / "student" / "model.safetensors") for run in (whole, torn)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        assert read(torn / stage, "before.json")["pairs"] == read(whole / stage, "before.json")["pairs"]
        assert read(torn / stage, "after.json")["pairs"] == read(whole / stage, "after.json")["pairs"]
    assert not list(tmp_path.glob("torn.*"))  # --resume moves nothing aside


@pytest.mark.parametrize("method", ["sft", "dpo", "redi"])
def test_a_finished_stage_that_is_resumed_trains_nothing_more(place: Path, tmp_path: Path, method: str) -> None:
    """Killed between its last checkpoint and summary.json, in the middle of an epoch (step 3 of 4), at a learning rate
    that a further step would show."""
    run, settings = tmp_path / "run", {"save_steps": 1, "lr_scheduler_type": "constant", "stage1_steps": 3}
    command = words(place, run, method=method, **settings, **({} if method == "sft" else {"max_steps": 3}))
    redi.main(command)
    for stage in ("stage1", ".") if method == "redi" else (".",):
        weights = load_file(run / stage / "student" / "model.safetensors")
        before, logged = read(run / stage, "summary.json"), lines(run / stage)
        (run / stage / "summary.json").unlink()
        redi.main([*command, "--resume"])
        assert read(run / stage, "summary.json")["steps"] == before["steps"] == 3
        assert lines(run / stage) == logged
        again = load_file(run / stage / "student" / "model.safetensors")
        assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage1", "."])
def test_killed_in_either_stage_and_resumed_equals_undisturbed(place: Path, tmp_path: Path, stage: str) -> None:
    """By SIGKILL, in a process of its own."""
    settings = {"stage1_steps": 12, "max_steps": 12, "save_steps": 3}

    def start(output: Path, *flags: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "llmdistill.redi", *words(place, output, **settings), *flags]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE)

    whole, torn = tmp_path / "whole", tmp_path / "torn"
    _, errors = (undisturbed := start(whole)).communicate(timeout=240)
    assert undisturbed.returncode == 0, errors.decode()[-2000:]
    killed = start(torn)
    for _ in range(12000):
        if killed.poll() is not None or (torn / stage / "checkpoint-3" / "trainer_state.json").exists():
            break
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (torn / stage / "summary.json").exists(), "it ended before it could be killed"
    _, errors = (resumed := start(torn, "--resume")).communicate(timeout=240)
    assert resumed.returncode == 0, errors.decode()[-2000:]
    assert b"resuming from" in errors
    for folder in (".", "stage1"):
        assert [x["loss"] for x in lines(torn / folder)] == [x["loss"] for x in lines(whole / folder)]


def test_an_earlier_run_is_moved_aside_and_bad_data_leaves_it_alone(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    quick = {"stage1_steps": 0, "stage1_epochs": 0, "max_steps": 1}
    redi.main(words(place, run, **quick))
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"prompt": "2+2=", "chosen": "4", "rejected": "4"}) + "\n")
    with pytest.raises(UserError, match="data.train, row 0: chosen and rejected are the same.*line 1"):
        redi.main(words(place, run, **quick, **{"data.train": bad}))
    assert (run / "summary.json").exists() and not (tmp_path / "run.1").exists()
    redi.main(words(place, run, **quick))
    assert (tmp_path / "run.1" / "summary.json").exists() and (run / "summary.json").exists()


def test_a_guard_that_stops_ends_the_run_with_a_student(place: Path, tmp_path: Path) -> None:
    """A threshold of next to nothing and a learning rate that destroys: it fires within a few steps."""
    run = tmp_path / "run"
    settings = {"method": "symmetric", "learning_rate": 0.3, "guard_window": 1, "guard_drop": 1e-3, "guard_stop": True}
    redi.main(words(place, run, **settings, max_steps=40, save_steps=50))
    summary = read(run, "summary.json")
    assert summary["guard"]["fired_at"] == summary["steps"] < 40
    assert summary["guard"]["fall"] > 1e-3
    assert (run / "student" / "model.safetensors").exists() and (run / "after.json").exists()
    weights = load_file(run / "student" / "model.safetensors")
    shutil.rmtree(run / "student")  # as if it had been killed while saving
    redi.main([*words(place, run, **settings, max_steps=40, save_steps=50), "--resume"])
    assert read(run, "summary.json")["steps"] == summary["steps"]
    again = load_file(run / "student" / "model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


# ---------------------------------------------------------------- settings


def test_help_is_a_screen_of_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert redi.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in ("method", "alpha", "guard_drop", "stage1_epochs", "chosen_column"))


@pytest.mark.parametrize(
    "settings,said",
    [
        ({"method": "simpo", "alpha": 0.5}, "objective.alpha is set, and objective.method simpo does not read it"),
        ({"method": "redi", "objective.beta": 0.5}, "objective.beta is set, and objective.method redi"),
        ({"method": "symmetric", "alpha": 1.0}, "objective.alpha is set"),
        ({"alpha": 1.5}, "objective.alpha is 1.5; it must be >= 0 and <= 1"),
        ({"gamma": -1}, "objective.gamma is -1"),
        ({"method": "dpo", "objective.beta": 0}, "objective.beta is 0.0; it must be > 0"),
        ({"method": "dpo", "guard_stop": True}, "objective.guard_stop is true, and objective.method dpo has no guard"),
        ({"guard_stop": True, "guard_drop": 0, "guard_rejected_drop": 0}, "guard_rejected_drop 0 watch nothing"),
        ({"guard_rejected_drop": -1}, "objective.guard_rejected_drop is -1"),
        ({"eval_strategy": "steps", "eval_steps": 1, "data.heldout": ""}, "train.eval_strategy is 'steps', and data.h"),
        ({"guard_window": 0}, "objective.guard_window is 0"),
        ({"method": "sft", "stage1_steps": 0, "stage1_epochs": 0}, "sft is stage 1 alone"),
        ({"positives": "x.jsonl", "stage1_steps": 0, "stage1_epochs": 0}, "objective.positives is 'x.jsonl'"),
        ({"stage1_batch_size": 0}, "objective.stage1_batch_size is 0"),
        ({"max_completion_tokens": -1}, "objective.max_completion_tokens is -1"),
        ({"teacher.model": "somewhere"}, "the recipe has a teacher, 'somewhere', and REDI asks none"),
        ({"data.train": ""}, "data.train is empty"),
        ({"skip-check": "dsk"}, "--skip-check dsk: unknown check; did you mean .disk.\\? The checks are width"),
        ({"chosen_column": "right"}, "data.train has no column 'right'.*--objective.chosen_column"),
    ],
)
def test_settings_that_contradict_are_refused_before_anything_is_written(
    place: Path, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        redi.main(words(place, tmp_path / "run", **settings))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_methods_have_the_papers_defaults_and_trl_ones_have_no_trainer_here(tmp_path: Path) -> None:
    def config(method: Any) -> REDIConfig:
        return REDIConfig(output_dir=str(tmp_path), method=method)

    assert (config("redi").alpha, config("redi").gamma) == (0.8, 0.0)
    assert (config("simpo").beta, config("simpo").margin, config("dpo").beta) == (2.0, 1.0, 0.001)
    for method in ("dpo", "sft"):
        with pytest.raises(UserError, match="which TRL trains"):
            config(method).loss()


@pytest.mark.parametrize("method", ["symmetric", "simpo", "dpo"])
def test_a_recipe_for_one_method_runs_with_another(tmp_path: Path, method: Any) -> None:
    """A value that is some method's default asks for nothing."""
    config = REDIConfig(output_dir=str(tmp_path), method=method, alpha=0.8, margin=1.0)
    assert config.alpha is None and config.margin == (1.0 if method == "simpo" else None)


def test_what_a_method_does_not_read_is_said(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[1] / "recipes" / "redi.yaml"

    def said(method: str) -> list[str]:
        args = parse(REDIConfig, ["--config", str(recipe), "--method", method]).args
        assert isinstance(args, REDIConfig)
        return args.not_read()

    assert said("redi") == said("symmetric") == said("simpo") == said("dpo") == []
    assert said("sft") == [
        "train.learning_rate (stage 2's; objective.stage1_learning_rate is read)",
        "train.max_steps (stage 2's; objective.stage1_steps is read)",
    ]
    dpo = REDIConfig(output_dir=str(tmp_path), method="dpo", guard_window=3)
    assert dpo.not_read() == ["objective.guard_window (it has no guard)"]
