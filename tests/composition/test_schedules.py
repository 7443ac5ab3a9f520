"""A schedule made by hand: what it is told, and that its state goes with a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmdistill import Ask, DistillationTrainer, Method, OPDConfig, Term
from llmdistill.composition.method import Measured, Schedule
from llmdistill.objectives.divergences import reverse_kl
from llmdistill.objectives.labels import cross_entropy
from llmdistill.recipe.config import RolloutConfig
from llmdistill.recipe.data_config import DataConfig
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.mixture import RoutedTeacher
from llmdistill.texts.sources import Only
from tests import tiny
from tests.composition.test_student_judge import StopAt

ROWS = [{**row, "domain": "even" if i % 2 == 0 else "odd", "w": 1.0 + i % 3} for i, row in enumerate(tiny.rows(16))]


class Halving(Schedule):
    """A weight that falls with the measured loss."""

    def __init__(self) -> None:
        self.weight, self.totals, self.heard = 1.0, list[int](), list[Measured]()

    def start(self, total_steps: int) -> None:
        self.totals.append(total_steps)

    def update(self, measured: Measured) -> None:
        self.heard.append(measured)
        self.weight *= 0.9 / (1.0 + measured.losses["ce"] / 100)

    def numbers(self) -> dict[str, float]:
        return {"weight": self.weight}

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight = state["weight"]


def make(folder: Path, schedule: Halving, **settings: Any) -> DistillationTrainer:
    terms = (
        Term("kl", reverse_kl, (Ask("teacher"),), text="own", watch={"twice": lambda s, t: 2 * reverse_kl(s, t)}),
        Term("ce", cross_entropy, (), ("tokens",), text="data", weight=lambda: schedule.weight, mean="sequence"),
    )
    texts = {"own": Only("student"), "data": Only("dataset")}
    shared: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "no"}
    shared |= {"logging_steps": 1, "learning_rate": 1e-3, "rollouts": RolloutConfig(max_new_tokens=5)}
    return DistillationTrainer(
        tiny.llama(1),
        OPDConfig(output_dir=str(folder), **{**shared, **settings}),
        tiny.llama(2),
        method=Method(terms, texts, {"halving": schedule}),
        train_dataset=ROWS,
        processing_class=tiny.tokenizer(),
        data=DataConfig(weight_column="w"),
    )


@pytest.mark.parametrize(("size", "steps"), [(4, 1), (2, 2), (1, 4)])
def test_it_hears_the_run_s_length_and_sums_of_the_global_batch(tmp_path: Path, size: int, steps: int) -> None:
    """By domain and by author; weighted as the losses are; once per optimizer step however that is cut."""
    schedule = Halving()
    t = make(tmp_path, schedule, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
    t.train()
    assert schedule.totals == [4] and [m.step for m in schedule.heard] == [1, 2, 3, 4]
    lines = [x for x in t.state.log_history if "loss" in x]
    weight = 1.0
    for line, m in zip(lines, schedule.heard, strict=True):
        assert line["distill/kl/loss"] == pytest.approx(m.losses["kl"], rel=1e-4)
        assert line["distill/ce/loss"] == pytest.approx(m.losses["ce"], rel=1e-4)
        assert line["loss"] == pytest.approx(m.losses["kl"] + weight * m.losses["ce"], rel=1e-4)
        assert m.watched["kl", "twice"] == pytest.approx(2 * m.losses["kl"], rel=1e-4)
        assert m.by("kl", "author").keys() == {"student"} and m.by("ce", "author").keys() == {"dataset"}
        for term in ("kl", "ce"):
            sums = [v for (name, axis, _), v in m.groups.items() if (name, axis) == (term, "domain")]
            assert set(m.by(term, "domain")) == {"even", "odd"}
            mean = sum(s for s, _ in sums) / sum(n for _, n in sums)
            assert mean == pytest.approx(m.losses[term], rel=1e-4)
            assert m.by(term, "author").popitem()[1] == pytest.approx(m.losses[term], rel=1e-4)
        weight *= 0.9 / (1.0 + m.losses["ce"] / 100)
        assert line["distill/weight"] == pytest.approx(weight, rel=1e-5)


def test_stopped_and_resumed_equals_undisturbed(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = make(tmp_path / "whole", a := Halving())
    whole.train()
    first = make(tmp_path / "torn", Halving(), **saving)
    first.add_callback(StopAt(2))
    first.train()
    again = make(tmp_path / "torn", b := Halving(), **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "torn" / "checkpoint-2"))
    assert a.weight == b.weight and b.totals == [4] and [m.step for m in b.heard] == [3, 4]
    losses = [[x["loss"] for x in t.state.log_history if "loss" in x] for t in (whole, again)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_trained_again_it_starts_anew(tmp_path: Path) -> None:
    """A second train() is a run of its own; evaluation in between tells it nothing."""
    t = make(tmp_path, schedule := Halving())
    t.train()
    after = schedule.weight
    t.eval_dataset = t.train_dataset  # type: ignore[assignment]
    t.evaluate()
    assert schedule.weight == after and len(schedule.heard) == 4
    t.train()
    assert schedule.totals == [4, 4] and schedule.heard[4].step == 1


def test_it_hears_sums_by_the_teacher_that_a_row_is_routed_to(tmp_path: Path) -> None:
    """The teachers' shares are those of their domains, and together the loss of the step."""

    class Listening(Schedule):
        def __init__(self) -> None:
            self.heard = list[Measured]()

        def update(self, measured: Measured) -> None:
            self.heard.append(measured)

    members = [LocalTeacher(tiny.llama(seed), tiny.tokenizer()) for seed in (2, 3)]
    teacher = RoutedTeacher({"first": (members[0], ["even"]), "second": (members[1], ["odd"])})
    schedule = Listening()
    method = Method((Term("kl", reverse_kl, (Ask(),)),), {"main": Only("dataset")}, {"s": schedule})
    args = OPDConfig(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=8, save_strategy="no")
    DistillationTrainer(
        tiny.llama(1), args, teacher, method=method, train_dataset=ROWS, processing_class=tiny.tokenizer()
    ).train()
    (heard,) = schedule.heard
    by_teacher, by_domain = heard.by("kl", "teacher"), heard.by("kl", "domain")
    assert by_teacher == {"first": by_domain["even"], "second": by_domain["odd"]}
    total, rows = map(sum, zip(*(v for (_, axis, _), v in heard.groups.items() if axis == "teacher"), strict=True))
    assert total / rows == pytest.approx(heard.losses["kl"], rel=1e-5)
