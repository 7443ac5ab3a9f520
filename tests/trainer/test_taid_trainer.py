"""TAID in the trainer: its schedule moves once a step by the global loss and by nothing else, and is in checkpoints."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llmdistill import OPDConfig, OPDTrainer, RolloutConfig, TAIDConfig, TAIDTrainer, UserError, cli
from llmdistill.objectives.taid import TAIDSchedule
from llmdistill.taid import main
from tests import tiny
from tests.distributed.launching import launch
from tests.trainer.test_gopd import bitwise, weights

STEPS = 6
QUICK = {"t_start": 0.2, "t_rate": 0.3, "t_momentum": 0.5}  # t moves far from the line


def make(folder: Path, policy: Any = None, **settings: Any) -> TAIDTrainer:
    quick = QUICK if settings.get("divergence", "taid") == "taid" else {}
    settings = {"max_steps": STEPS, "per_device_train_batch_size": 4, "save_strategy": "no", **quick, **settings}
    settings.setdefault("rollouts", RolloutConfig(max_new_tokens=5))
    settings.setdefault("learning_rate", 3e-3)
    args = TAIDConfig(output_dir=str(folder), logging_steps=1, **settings)
    return TAIDTrainer(
        tiny.llama(1),
        args,
        tiny.llama(2),
        train_dataset=tiny.rows(32),
        eval_dataset=tiny.rows(3),
        processing_class=tiny.tokenizer(),
        **({} if policy is None else {"sequences": policy}),
    )


def schedule(trainer: Any) -> TAIDSchedule:
    return trainer.method.schedules["t"].schedule  # type: ignore[no-any-return]


def logged(trainer: Any, *names: str) -> list[tuple[float, ...]]:
    return [tuple(line[n] for n in names) for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("driver", ["kl", "cross_entropy"])
def test_stopped_and_resumed_is_the_undisturbed_run_bit_for_bit(tmp_path: Path, driver: Any) -> None:
    whole = make(tmp_path / "whole", t_driver=driver, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = make(tmp_path / "whole", t_driver=driver, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    names = ("loss", "grad_norm", "distill/schedule", "distill/reverse_kl")
    assert len(logged(whole, *names)) == STEPS
    assert logged(resumed, *names)[-2:] == logged(whole, *names)[-2:]
    assert schedule(resumed).state_dict() == schedule(whole).state_dict()
    assert bitwise(weights(resumed.model), weights(whole.model))
    assert schedule(whole).t > 0.2 and schedule(whole).momentum != 0


def test_resume_true_takes_the_newest_checkpoint_and_its_state(tmp_path: Path) -> None:
    first = make(tmp_path / "run", save_strategy="steps", save_steps=2)
    first.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    again = make(tmp_path / "run", save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=True)
    assert len(logged(again, "loss")) == STEPS and bitwise(weights(again.model), weights(first.model))
    assert schedule(again).state_dict() == schedule(first).state_dict()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        make(tmp_path / "empty").train(resume_from_checkpoint=True)


def test_t_moves_once_a_step_by_the_loss_of_all_micro_batches(tmp_path: Path) -> None:
    """Eight in one batch, or one at a time: the same t; and it is what is logged, told the number of steps."""
    runs = []
    for size, accumulation in ((8, 1), (2, 4)):
        t = make(
            tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=4,
        )
        calls: list[tuple[float, int, float]] = []
        update = schedule(t).update

        def watched(loss: float, step: int, update: Any = update, calls: Any = calls) -> float:
            calls.append((loss, step, update(loss, step)))
            return calls[-1][2]

        schedule(t).update = watched  # type: ignore[method-assign]
        t.train()
        assert [step for _, step, _ in calls] == [1, 2, 3, 4] and schedule(t).num_steps == 4
        assert [x for (x,) in logged(t, "distill/schedule")] == [t_ for *_, t_ in calls]
        assert [loss for loss, *_ in calls] == pytest.approx([x for (x,) in logged(t, "loss")], abs=1e-4)
        runs.append(calls)
    for a, b in zip(*runs, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    assert runs[0][0][2] == 0.2 and runs[0][-1][2] == 1.0


def test_evaluation_moves_nothing(tmp_path: Path) -> None:
    plain = make(tmp_path / "plain", max_steps=3)
    plain.train()
    watched = make(tmp_path / "watched", max_steps=3, eval_strategy="steps", eval_steps=1)
    state = schedule(watched).state_dict()
    watched.evaluate()
    assert str(schedule(watched).state_dict()) == str(state)  # with its NaN
    watched.train()
    assert logged(watched, "loss", "distill/schedule") == logged(plain, "loss", "distill/schedule")
    assert bitwise(weights(watched.model), weights(plain.model))
    after = schedule(watched).state_dict()
    watched.evaluate()
    assert schedule(watched).state_dict() == after


@pytest.mark.parametrize("mean", ["token", "sequence"])
@pytest.mark.parametrize("driver", ["kl", "cross_entropy"])
def test_what_drives_t_is_the_value_by_hand(tmp_path: Path, driver: Any, mean: Any) -> None:
    """-sum p_t log S or KL(p_t || S), averaged as the loss is: over tokens, or over sequences of their means."""
    t = make(tmp_path, t_driver=driver, mean=mean, max_steps=1, gradient_accumulation_steps=2)
    fed = []
    schedule(t).update = lambda loss, step: fed.append(loss) or 0.2  # type: ignore[method-assign,func-returns-value]
    drawn = []
    t.draw = lambda prompts, draw=t.draw: drawn.append(draw(prompts)["main"].rollout) or draw(prompts)  # type: ignore[method-assign]
    t.train()
    total = 0.0
    for ids, mask, attention in zip(drawn[0].input_ids, drawn[0].completion_mask, drawn[0].attention_mask, strict=True):
        n, start = int(attention.sum()), int(mask.nonzero()[0]) - 1
        s, z = (m(ids[None, :n]).logits[0, start:-1].detach().double() for m in (tiny.llama(1), tiny.llama(2)))
        log_p = (0.8 * s + 0.2 * z).log_softmax(-1)
        cross = -(log_p.exp() * s.log_softmax(-1)).sum()
        value = float(cross if driver == "cross_entropy" else cross + (log_p.exp() * log_p).sum())
        total += value / (len(s) * len(drawn[0]) if mean == "sequence" else drawn[0].num_rows)
    assert len(drawn[0]) == 8
    assert fed == [pytest.approx(total, rel=1e-4)]
    line = next(x for x in t.state.log_history if "loss" in x)
    assert ("distill/target_entropy" in line) == (driver == "cross_entropy")


def test_a_round_without_a_counted_token_moves_nothing(tmp_path: Path) -> None:
    cut = RolloutConfig(max_new_tokens=1, mask_truncated=True)
    t = make(tmp_path, sequences="student", rollouts=cut, max_steps=3)
    t.model.lm_head.weight.data[1] = 0.0
    t.rollout_engine.eos_ids = [-5]  # nothing ends: everything is cut off
    t.train()
    assert schedule(t).t == 0.2 and schedule(t).momentum == 0


def test_a_checkpoint_without_the_state_or_of_another_method_is_refused(tmp_path: Path) -> None:
    saves = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make(tmp_path / "run", **saves).train()
    folder = tmp_path / "run" / "checkpoint-1"
    assert torch.load(folder / "method_state_0.pt", weights_only=True)["schedules"]["t"]["t"] == 0.2
    (folder / "method_state_0.pt").unlink()
    with pytest.raises(UserError, match=r"checkpoint-1 has no method_state_0.pt.*Fix: resume from one"):
        make(tmp_path / "run", **saves).train(resume_from_checkpoint=str(folder))
    args = OPDConfig(output_dir=str(tmp_path / "opd"), rollouts=RolloutConfig(max_new_tokens=2), **saves)
    OPDTrainer(
        tiny.llama(1), args, tiny.llama(2), train_dataset=tiny.rows(8), processing_class=tiny.tokenizer()
    ).train()
    file, pickled, saved = tmp_path / "opd" / "checkpoint-1" / "method_state_0.pt", io.BytesIO(), io.BytesIO()
    pickle.dump(Runs(str(tmp_path / "ran")), pickled)
    torch.save([], saved)
    for content in (None, b"", b"{", file.read_bytes()[:100], saved.getvalue(), pickled.getvalue()):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(UserError, match=r"method_state_0.pt is not the state of this method.*Fix: resume from"):
            make(tmp_path / "opd", **saves).train(resume_from_checkpoint=str(tmp_path / "opd" / "checkpoint-1"))
    assert not (tmp_path / "ran").exists()


class Runs:
    """What a pickle may do to whoever loads it."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return open, (self.file, "w")


@pytest.mark.parametrize(
    "settings",
    [
        {"divergence": "forward_kl"},
        {"divergence": "jsd", "beta": 0.3},
        {"divergence": "adaptive_kl", "estimator": "top_k", "top_k": 4},
        {"divergence": "f_divergence", "name": "squared_hellinger"},
        {"divergence": "reverse_kl", "estimator": "sampled", "sequences": "student"},
        {"sequences": "teacher"},
        {"divergence": "reverse_kl", "estimator": "top_k", "top_k": 4, "support": "union"},
        {"xi": 0.5},  # one target in place of TAID's, whose t then has nothing to move it
    ],
    ids=str,
)
def test_every_composition_trains(tmp_path: Path, settings: dict[str, Any]) -> None:
    t = make(tmp_path, max_steps=2, **settings)
    before = weights(t.model)
    t.train()
    assert len(logged(t, "loss")) == 2 and not bitwise(weights(t.model), before)
    scheduled = settings.get("divergence", "taid") == "taid" and "xi" not in settings
    assert ("distill/schedule" in t.state.log_history[0]) == scheduled


@pytest.mark.parametrize(
    "settings,said",
    [
        ({"t_start": 0.0}, "objective.t_start is 0.0; it must be > 0"),
        ({"t_start": 0.9, "t_end": 0.5}, "objective.t_start is 0.9 and objective.t_end 0.5"),
        ({"t_rate": -1.0}, "objective.t_rate is -1.0; it must be >= 0"),
        ({"t_momentum": 1.0}, "objective.t_momentum is 1.0; it must be >= 0 and < 1"),
        (
            {"estimator": "sampled"},
            "objective.estimator sampled estimates the reverse KL, objective.divergence is taid",
        ),
        ({"estimator": "top_k"}, "objective.estimator is top_k; it must be full for divergence taid"),
        ({"alpha": 0.1}, "objective.alpha is 0.1, and objective.divergence taid does not read it"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        TAIDConfig(output_dir=str(tmp_path), **settings)
    assert said in str(error.value) and "Fix:" in str(error.value)


# ---------------------------------------------------------------- from a recipe


@pytest.fixture
def words(command: list[str], tiny_run: Path, tmp_path: Path) -> list[str]:
    for name, part in (("train", tiny.rows(20)[:16]), ("heldout", tiny.rows(20)[16:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    data = {"data.train": tmp_path / "train.jsonl", "data.heldout": tmp_path / "heldout.jsonl"}
    return [*command, *(text for key, value in data.items() for text in (f"--{key}", str(value)))]


def test_the_front_door(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--t_driver", "cross_entropy", "--t_start", "0.3", "--save_strategy", "steps"]) == 0
    run = tmp_path / "run"
    lines = [x for x in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in x]
    assert [x["step"] for x in lines] == [1, 2] and [x["distill/schedule"] for x in lines] == [0.3, 1.0]
    assert (run / "report.html").stat().st_size > 0 and (run / "checkpoint-2" / "method_state_0.pt").exists()
    capsys.readouterr()
    assert cli.main(["doctor", "--method", "taid", *words, "--output_dir", str(tmp_path / "none")]) == 0
    assert "teacher against itself" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match=r"row 0: nothing is empty. Fix: --data.completion_column"):
        main([*words, "--data.completion_column", "nothing"])


def test_gopd_with_a_verified_reward_from_the_command_line(command: list[str], tmp_path: Path) -> None:
    from llmdistill.opd import main as opd

    rows = [{"prompt": f"What is {i}+1? ", "answer": i + 1} for i in range(8)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [*command, "--data.train", str(tmp_path / "sums.jsonl"), "--reward_scale", "1.25", "--reward", "math"]
    assert opd([*found, "--reward_weight", "0.5", "--samples_per_prompt", "2", "--estimator", "sampled"]) == 0
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [0 <= x["rollout/reward"] <= 1 for x in lines if "loss" in x] == [True, True]
    with pytest.raises(UserError, match=r"8 rows have no answer to verify \(first: row 0\)\. Fix: --data"):
        opd([*found, "--reward_weight", "0.5", "--samples_per_prompt", "2", "--data.answer_column", "solution"])


@pytest.mark.slow
def test_help() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llmdistill.taid", "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for word in ("t_start", "t_driver", "taid", "sequences", "importance_cap"):
        assert word in done.stdout


# ---------------------------------------------------------------- two processes


@pytest.mark.slow
def test_two_processes_have_the_t_of_one_and_agree_on_every_round(tmp_path: Path) -> None:
    found = {}
    for config, ranks in (("one_process", 1), ("two_processes", 2)):
        folder = tmp_path / config
        folder.mkdir()
        launch(config, "-m", "tests.distributed.taid_worker", str(folder))
        found[config] = [json.loads((folder / f"rank-{r}.json").read_text()) for r in range(ranks)]
    (alone,), (first, second) = found["one_process"], found["two_processes"]
    for driver in ("kl", "cross_entropy"):
        assert first[driver] == second[driver]
        assert len(alone[driver]) == 4
        for a, b in zip(first[driver], alone[driver], strict=True):
            assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    for policy in ("mixed", "adaptive"):
        assert first[policy] == second[policy]
    assert first["mixed"] == alone["mixed"] and len(set(first["mixed"])) == 2
    assert {"dataset", "student", "replay"} == set(first["adaptive"])
    assert torch.tensor(alone["kl"]).shape == (4, 2)
