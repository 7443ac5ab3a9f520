"""Rounds made ahead: how old their text is, that it is what a round without them would be, and what becomes of it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from llmdistill import DataConfig, DistillationTrainer, OPDConfig, OPDTrainer, RolloutConfig, UserError
from llmdistill.models.generation import HFRollouts
from llmdistill.rollouts.remote import RemoteRollouts
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.remote import RemoteTeacher
from llmdistill.wire import protocol
from tests import tiny
from tests.rollouts.test_remote import QUICK
from tests.service.faulty import Faulty
from tests.trainer.kept import Kept

WAIT_S = 60.0  # for what comes at once, or never


@pytest.fixture
def services() -> Iterator[tuple[Faulty, Faulty]]:
    """Of the student, with other weights than its own at first, and of the teacher."""
    with (
        Faulty(LocalTeacher(tiny.llama(9), tiny.tokenizer())) as student,
        Faulty(LocalTeacher(tiny.llama(2), tiny.tokenizer())) as teacher,
    ):
        yield student, teacher


def trainer(services: tuple[Faulty, Faulty], folder: Path, staleness: int = 1, **settings: Any) -> Kept:
    student, teacher = services
    callbacks, rows, judge = (settings.pop(name, None) for name in ("callbacks", "rows", "judge"))
    options = {"engine": "remote", "url": student.url, "max_new_tokens": 6, "samples_per_prompt": 2}
    rollouts = RolloutConfig(**{**options, "staleness": staleness, **settings.pop("rollouts", {})})
    defaults = {"max_steps": 5, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_strategy": "no"}
    args = OPDConfig(output_dir=str(folder), logging_steps=1, rollouts=rollouts, **{**defaults, **settings})
    engine = RemoteRollouts(student.url, eos_ids=(1,), pad_id=0, batch_tokens=rollouts.batch_tokens, **QUICK)
    return Kept(
        tiny.llama(1),
        args,
        judge or RemoteTeacher(teacher.url, lossless=True, **QUICK),
        train_dataset=tiny.rows(rows or 10, completion=False),
        processing_class=tiny.tokenizer(),
        rollout_engine=engine,
        callbacks=callbacks,
        preflight=False,
        data=DataConfig(max_prompt_tokens=60),
    )


def logged(made: DistillationTrainer, name: str) -> list[float]:
    return [line[name] for line in made.state.log_history if name in line]


class Weights(TrainerCallback):
    """The student's weights after so many steps."""

    def __init__(self) -> None:
        self.by_step: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.by_step[state.global_step] = copy.deepcopy(model)

    on_step_end = on_train_begin


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_text_is_by_the_weights_of_so_many_steps_ago(
    services: tuple[Faulty, Faulty], tmp_path: Path, staleness: int
) -> None:
    weights = Weights()
    run = trainer(services, tmp_path, staleness, callbacks=[weights])
    run.train()
    assert logged(run, "rollout/staleness") == [min(step, staleness) for step in range(5)]
    for step, made in enumerate(run.kept):
        exact = HFRollouts(eos_ids=(1,), pad_id=0)
        exact.sync(weights.by_step[max(step - staleness, 0)], 0)
        expected = exact.generate(made.examples, run._sampling(step))
        assert torch.equal(made.texts["main"].rollout.input_ids, expected.input_ids), step
    run.close()


@pytest.mark.parametrize("estimator", ["full", "sampled"])
def test_with_weights_that_stay_it_is_the_run_without(
    services: tuple[Faulty, Faulty], tmp_path: Path, estimator: str
) -> None:
    """Over several epochs, the last round of each with fewer micro-batches: the same rows, texts and losses."""
    settings = {
        "max_steps": 8,
        "rows": 10,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.0,
        "estimator": estimator,
    }
    runs = [trainer(services, tmp_path / str(s), s, **settings) for s in (0, 2)]
    for run in runs:
        run.train()
        run.close()
    assert [len(made.examples) for made in runs[0].kept] == [4, 4, 2, 4, 4, 2, 4, 4]
    for run in runs[1:]:
        for name in ("loss", "distill/reverse_kl", "teacher/bytes_per_token", "rollout/mean_length"):
            assert logged(run, name) == pytest.approx(logged(runs[0], name), rel=1e-6), name


def test_it_is_made_while_the_step_before_trains_and_judged_before_it_is_whole(
    services: tuple[Faulty, Faulty], tmp_path: Path
) -> None:
    """Nothing here is timed: what has to come first is waited for, and would never come in another order."""
    student, teacher = services
    training, judged = threading.Event(), threading.Event()
    generated: list[bool] = []
    write, score = student.small.answer, teacher.small.answer

    def writes(seen: Any) -> Any:
        if seen.path == protocol.GENERATE:
            asked = len(generated)
            if asked == 4:  # two of the probe, and two of the first round; the next is the second round's first
                generated.append(training.wait(WAIT_S))
                judged.clear()
            elif asked == 5:
                generated.append(judged.wait(WAIT_S))
            else:
                generated.append(True)
        return write(seen)

    def scores(seen: Any) -> Any:
        if seen.path == protocol.SCORE:
            judged.set()
        return score(seen)

    class Begins(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            training.set()

    student.small.answer, teacher.small.answer = writes, scores
    # a request of one prompt: with 6 new tokens it has 16 to 25
    run = trainer(
        services, tmp_path, rollouts={"batch_tokens": 30, "samples_per_prompt": 1}, max_steps=3, callbacks=[Begins()]
    )
    run.train()
    run.close()
    assert len(generated) == 8 and all(generated)


def test_a_resumed_run_trains_on_the_texts_that_were_under_way(services: tuple[Faulty, Faulty], tmp_path: Path) -> None:
    """Also where those under way are of the next epoch: rows are read again, and in the same order."""
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "rows": 6, "max_steps": 6}
    whole = trainer(services, tmp_path / "run", 2, **settings)
    whole.train()
    whole.close()
    for step in (2, 5):
        resumed = trainer(services, tmp_path / f"resumed-{step}", 2, **{**settings, "save_strategy": "no"})
        resumed.train(str(tmp_path / "run" / f"checkpoint-{step}"))
        resumed.close()
        for mine, theirs in zip(resumed.kept, whole.kept[step:], strict=True):
            assert torch.equal(mine.texts["main"].rollout.input_ids, theirs.texts["main"].rollout.input_ids)
            assert mine.texts["main"].rollout.policy_version == theirs.texts["main"].rollout.policy_version
        for mine, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_what_a_service_refuses_stops_the_run_with_its_message(services: tuple[Faulty, Faulty], tmp_path: Path) -> None:
    teacher, asked = services[1], []
    score = teacher.small.answer

    def answer(seen: Any) -> Any:
        if seen.path == protocol.SCORE:
            asked.append(seen)
            if len(asked) > 3:
                teacher.small.restart(LocalTeacher(tiny.llama(3), tiny.tokenizer()))
        return score(seen)

    teacher.small.answer = answer
    run = trainer(services, tmp_path)
    with pytest.raises(UserError, match="the service restarted with other weights"):
        run.train()
    run.close()


def test_services_that_go_down_change_nothing(services: tuple[Faulty, Faulty], tmp_path: Path) -> None:
    """The student's comes back with weights of its own, and gets those that the round is by, not those of now."""
    undisturbed = trainer(services, tmp_path / "a", learning_rate=1e-2)
    undisturbed.train()
    undisturbed.close()

    class Restarts(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            services[0].small.restart(LocalTeacher(tiny.llama(9), tiny.tokenizer()))
            services[1].next("reset", None)

    services[0].small.restart(LocalTeacher(tiny.llama(9), tiny.tokenizer()))
    disturbed = trainer(services, tmp_path / "b", learning_rate=1e-2, callbacks=[Restarts()])
    disturbed.train()
    disturbed.close()
    assert logged(disturbed, "loss") == pytest.approx(logged(undisturbed, "loss"), rel=1e-5)


def test_a_judge_in_this_process_is_asked_when_the_step_is(services: tuple[Faulty, Faulty], tmp_path: Path) -> None:
    """And says the same, beside rollouts that are ahead."""
    elsewhere = trainer(services, tmp_path / "a")
    here = trainer(services, tmp_path / "b", judge=LocalTeacher(tiny.llama(2), tiny.tokenizer()))
    for run in (elsewhere, here):
        run.train()
        run.close()
    assert logged(here, "loss") == pytest.approx(logged(elsewhere, "loss"), rel=1e-4)
    assert here.kept[0].judges["teacher"] is here.judges["teacher"]


def test_evaluating_on_the_way_changes_no_text(services: tuple[Faulty, Faulty], tmp_path: Path) -> None:
    class Looks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            run.sync_engine()

    run = trainer(services, tmp_path / "a")
    run.train()
    losses, engine = logged(run, "loss"), run.rollout_engine
    run.close()
    run = trainer(services, tmp_path / "b", callbacks=[Looks()])
    run.train()
    assert logged(run, "loss") == losses and run.rollout_engine is not engine
    run.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"engine": "hf", "staleness": 1},
            "0 for engine hf, which works in this process. Fix: --rollouts",
        ),
        ({"engine": "vllm", "staleness": 1}, "0 for engine vllm"),
        ({"engine": "remote", "url": "http://a", "staleness": -1}, ">= 0"),
        ({"engine": "remote", "url": "http://a", "staleness": 1, "push_every": 2}, "1 beside rollouts.staleness"),
    ],
)
def test_settings_that_do_not_go_with_it(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RolloutConfig(**settings)


def test_objectives_that_do_not_go_with_it(tmp_path: Path) -> None:
    rollouts = RolloutConfig(engine="remote", url="http://a", staleness=1)
    with pytest.raises(UserError, match="objective.importance_cap is 0"):
        OPDConfig(output_dir=str(tmp_path), rollouts=rollouts, estimator="sampled", importance_cap=0)
    with pytest.raises(UserError, match="objective.mixture_every is 5"):
        OPDConfig(output_dir=str(tmp_path), rollouts=rollouts, mixture_every=5)
    with pytest.raises(UserError, match="HFRollouts samples in this process"):
        OPDTrainer(
            tiny.llama(1),
            OPDConfig(output_dir=str(tmp_path), rollouts=rollouts),
            tiny.llama(2),
            train_dataset=tiny.rows(4),
            processing_class=tiny.tokenizer(),
            rollout_engine=HFRollouts(eos_ids=(1,), pad_id=0),
        )
