"""What a trainer is given must fit together, and what it remembers belongs to one run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llmdistill import DistillationTrainer, OPDConfig, OPDTrainer, RolloutConfig, TAIDConfig, TAIDTrainer, UserError
from llmdistill.texts import Prompt
from llmdistill.texts.sources import Adaptive, Mixed
from tests import tiny
from tests.trainer.test_gopd import length_reward
from tests.trainer.test_several_teachers import domain_rows, two


def opd(folder: Path, student: Any = None, teacher: Any = None, **settings: Any) -> OPDTrainer:
    given = {k: settings.pop(k) for k in ("reward", "sequences", "train_dataset", "eval_dataset") if k in settings}
    base = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", "logging_steps": 1}
    settings.setdefault("rollouts", RolloutConfig(max_new_tokens=4))
    return OPDTrainer(
        tiny.llama(1) if student is None else student,
        OPDConfig(output_dir=str(folder / "run"), **{**base, **settings}),
        tiny.llama(2) if teacher is None else teacher,
        processing_class=tiny.tokenizer(),
        **{"train_dataset": tiny.rows(16), **given},
    )


def taid(folder: Path, **settings: Any) -> TAIDTrainer:
    base = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "no", "learning_rate": 3e-3}
    return TAIDTrainer(
        tiny.llama(1),
        TAIDConfig(output_dir=str(folder / "run"), logging_steps=1, **{**base, **settings}),
        tiny.llama(2),
        train_dataset=tiny.rows(16),
        eval_dataset=tiny.rows(4),
        processing_class=tiny.tokenizer(),
    )


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("policy", [Mixed(0.5), Adaptive()])
def test_a_reward_compares_fresh_samples_of_one_prompt(tmp_path: Path, policy: Any) -> None:
    rollouts = RolloutConfig(max_new_tokens=4, samples_per_prompt=2)
    with pytest.raises(UserError, match="text is of dataset, student: a reward is compared over fresh samples"):
        opd(tmp_path, reward=length_reward, reward_weight=1.0, sequences=policy, rollouts=rollouts)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_reward_that_is_no_number_names_the_row(tmp_path: Path, broken: float) -> None:
    def reward(prompts: Any, texts: Any, row: list[int]) -> list[float]:
        return [broken if r == 3 else 0.0 for r in row]

    rollouts = RolloutConfig(max_new_tokens=4, samples_per_prompt=2)
    t = opd(tmp_path, reward=reward, reward_weight=1.0, rollouts=rollouts, max_steps=4)
    with pytest.raises(UserError, match=f"the reward is {broken} on row 3; it must be a finite number"):
        t.train()


def test_a_model_is_not_trained_as_its_own_teacher(tmp_path: Path) -> None:
    """It is frozen by that; its loss alone (which is 0) may be asked for."""
    model = tiny.llama(1)
    with pytest.raises(UserError, match="teacher is the student itself.*deepcopy"):
        opd(tmp_path, model, model).train()
    args = OPDConfig(output_dir=str(tmp_path / "run"), reward_scale=1.25)
    rows = tiny.rows(4)
    t = OPDTrainer(model, args, tiny.llama(2), reference=model, train_dataset=rows, processing_class=tiny.tokenizer())
    with pytest.raises(UserError, match="reference is the student itself.*deepcopy"):
        t.train()


def test_an_objective_without_its_reference_stops_before_the_first_step(tmp_path: Path) -> None:
    args = OPDConfig(output_dir=str(tmp_path / "run"), reward_scale=1.25)
    t = DistillationTrainer(
        tiny.llama(1),
        args,
        tiny.llama(2),
        method=args.build(),
        train_dataset=tiny.rows(4),
        processing_class=tiny.tokenizer(),
    )
    with pytest.raises(
        UserError, match="reads a reference model .term 'divergence'., and there is none. Fix: reference=MODEL"
    ):
        t.train()
    assert t.state.global_step == 0


def test_an_unknown_domain_is_found_before_the_first_step_by_its_row(tmp_path: Path) -> None:
    rows = domain_rows(16)
    rows[11]["domain"] = "law"
    t = opd(tmp_path, teacher=two(), train_dataset=rows)
    with pytest.raises(UserError, match="^row 11 has domain 'law', and no teacher takes it"):
        t.train()
    assert t.state.global_step == 0


def test_sequences_past_the_context_are_warned_of(tmp_path: Path) -> None:
    t = opd(tmp_path, rollouts=RolloutConfig(max_new_tokens=4), max_steps=1)
    t.train_dataset[5] = Prompt([7] * 254, "long", row=5)  # type: ignore[index]
    with pytest.warns(UserWarning, match="row 5 and its completion may need 258 positions, and the models have 256"):
        t.train()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "there are no rows"),
        ([{"words": "x"}], "row 0 has no column 'prompt', it has 'words'. Fix: --data.prompt_column"),
        ([{"prompt": "x", "completion": " \n"}], "row 0: completion is empty"),
        ([{"prompt": "x", "completion": [{"role": "assistant", "content": ""}]}], "row 0: completion is empty"),
    ],
)
def test_rows_that_cannot_be_trained_on(tmp_path: Path, rows: Any, said: str) -> None:
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        TAIDTrainer(
            tiny.llama(1),
            TAIDConfig(output_dir=str(tmp_path)),
            tiny.llama(2),
            train_dataset=rows,
            processing_class=tiny.tokenizer(),
        )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"student_fraction": 0.3}, "objective.student_fraction is 0.3, and objective.sequences student does not"),
        ({"off_policy": "teacher"}, "objective.off_policy is teacher.*Fix: leave it out, or --sequences mixed"),
        (
            {"replay_size": 5, "sequences": "mixed"},
            "objective.replay_size is 5, and objective.sequences mixed does",
        ),
        (
            {"estimator": "sampled", "rollouts": RolloutConfig(temperature=0.0)},
            "rollouts.temperature is 0, and",
        ),
        (
            {"reward": "math", "reward_weight": 1.0, "rollouts": RolloutConfig(temperature=0.0, samples_per_prompt=2)},
            "at rollouts.temperature 0 they are all the same",
        ),
    ],
)
def test_settings_that_nothing_reads_are_refused(tmp_path: Path, settings: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        OPDConfig(output_dir=str(tmp_path), **settings)


def test_settings_of_taid_are_taids(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="objective.t_start is 0.2, and objective.divergence jsd does not read it"):
        TAIDConfig(output_dir=str(tmp_path), divergence="jsd", beta=0.5, t_start=0.2)


# ---------------------------------------------------------------- one run's state


def test_a_second_run_starts_where_the_method_starts(tmp_path: Path) -> None:
    t = taid(tmp_path)
    curves = []
    for _ in range(2):
        t.train()
        curves.append([line["distill/schedule"] for line in t.state.log_history if "distill/schedule" in line])
    assert len(curves[0]) == 4 and curves[1] == pytest.approx(curves[0], abs=1e-3) and curves[0][-1] == 1.0


def test_another_method_does_not_go_on_from_a_schedule_s_checkpoint(tmp_path: Path) -> None:
    taid(tmp_path, save_strategy="steps", save_steps=2).train()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(UserError, match="method_state_0.pt is not the state of this method"):
        taid(tmp_path, divergence="forward_kl").train(resume_from_checkpoint=checkpoint)


def test_looking_does_not_move_a_schedule(tmp_path: Path) -> None:
    policy = Adaptive(eps=-1e9)  # every validation moves it
    t = opd(tmp_path, sequences=policy, eval_dataset=tiny.rows(4), eval_strategy="steps", eval_steps=1, max_steps=3)
    t.evaluate()
    t.evaluate(tiny.rows(6)[4:])
    assert policy.phi == 0.0 and policy.last_loss is None
    t.train()
    assert policy.phi == pytest.approx(0.3)  # four validations, the first, before training, is remembered only


def test_other_held_out_rows_are_other_text(tmp_path: Path) -> None:
    a, b = tiny.rows(8)[:4], tiny.rows(8)[4:]
    t = opd(tmp_path, eval_dataset=a)
    first, second, again = t.evaluate(), t.evaluate(b), t.evaluate(a)
    alone = opd(tmp_path, eval_dataset=b).evaluate()
    name = "eval_teacher/forward_kl"
    assert second[name] == alone[name] != first[name] == again[name]


def test_the_best_checkpoint_is_by_the_held_out_divergence(tmp_path: Path) -> None:
    """``metric_for_best_model`` is eval_loss unless it is said otherwise."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    t = opd(
        tmp_path, eval_dataset=tiny.rows(4), load_best_model_at_end=True, learning_rate=5e-2, max_steps=3, **settings
    )
    t.train()
    losses = {line["step"]: line["eval_loss"] for line in t.state.log_history if "eval_loss" in line}
    best = min(losses, key=lambda step: losses[step])
    assert t.state.best_model_checkpoint is not None and t.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert t.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)


@pytest.mark.parametrize(
    ("metric", "best"), [("student/reverse_kl", min), ("eval_teacher/forward_kl", min), ("student/top1_agreement", max)]
)
def test_our_metrics_know_which_way_is_better(tmp_path: Path, metric: str, best: Any) -> None:
    """Transformers takes all that is not called "…loss" for better when higher, and kept the worst checkpoint."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    t = opd(
        tmp_path,
        eval_dataset=tiny.rows(4),
        load_best_model_at_end=True,
        learning_rate=5e-2,
        metric_for_best_model=metric,
        **settings,
    )
    t.train()
    name = f"eval_{metric.removeprefix('eval_')}"
    values = {line["step"]: line[name] for line in t.state.log_history if name in line}
    assert t.state.best_metric == best(values.values()) and len(values) == 3


def test_an_evaluation_needs_rows_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train.eval_strategy is 'steps', and data.heldout is empty"):
        opd(tmp_path, eval_strategy="steps", eval_steps=1)


@pytest.mark.parametrize("max_steps", [-1, 2])
def test_no_step_is_no_success(tmp_path: Path, max_steps: int) -> None:
    """Three rows make no batch of four, and the last one is dropped."""
    settings = {"dataloader_drop_last": True, "per_device_train_batch_size": 4, "max_steps": max_steps}
    with pytest.raises(UserError, match="no step was trained: 3 rows make not one batch of 4"):
        opd(tmp_path, train_dataset=tiny.rows(8)[:3], **settings).train()


def test_what_a_user_says_of_a_metric_holds(tmp_path: Path) -> None:
    args = OPDConfig(str(tmp_path), metric_for_best_model="student/reverse_kl", greater_is_better=True)
    assert args.greater_is_better is True
    with pytest.raises(UserError, match="it must be loss, or TEXT/METRIC"):  # no evaluation of the trainer's has it
        OPDConfig(str(tmp_path), metric_for_best_model="eval/gsm8k/avg@1")


def test_a_teacher_that_excludes_a_token_gives_no_nan() -> None:
    from llmdistill.objectives.policy import gopd_advantage

    s, t, r = torch.tensor([-1.0]), torch.tensor([-math.inf]), torch.tensor([-2.0])
    assert gopd_advantage(s, t, r, 0.0).item() == -1.0
    assert gopd_advantage(s, t, r, 0.5).item() == -math.inf


def test_a_resumed_run_takes_the_learning_rate_it_is_given(tmp_path: Path) -> None:
    """What the message about a diverged run advises. With the rate unchanged a resumed run is bitwise the same."""

    def rates(t: OPDTrainer) -> dict[int, float]:
        return {line["step"]: line["learning_rate"] for line in t.state.log_history if "learning_rate" in line}

    settings: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "warmup_steps": 1}
    whole = opd(tmp_path, learning_rate=1e-2, **settings)
    whole.train()
    resumed = opd(tmp_path, learning_rate=1e-3, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for step in (3, 4, 5, 6):
        assert rates(resumed)[step] == pytest.approx(rates(whole)[step] / 10, rel=1e-9)
