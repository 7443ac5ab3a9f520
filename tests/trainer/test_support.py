"""Evidence about the tokens the student finds likeliest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmdistill import OPDConfig, OPDTrainer, RolloutConfig
from llmdistill.errors import UserError
from llmdistill.models.heads import head_of
from llmdistill.texts import position_ids, predicting_rows
from llmdistill.texts.batches import Passes
from llmdistill.training.likeliest import likeliest_ids
from tests import tiny
from tests.trainer.batches import micro_batch
from tests.trainer.test_loss import SEQUENCES, batch


def trainer(folder: Path, student: Any, **settings: Any) -> OPDTrainer:
    args = OPDConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        rollouts=RolloutConfig(max_new_tokens=6),
        **settings,
    )
    return OPDTrainer(
        student,
        args,
        tiny.llama(2),
        train_dataset=tiny.rows(8, completion=False),
        processing_class=tiny.tokenizer(),
    )


def loss(t: OPDTrainer) -> float:
    return t.compute_loss(t.model, {"micro_batch": micro_batch(t, batch(SEQUENCES))}).item()  # type: ignore[no-any-return]


def test_the_ids_are_the_likeliest_of_every_counted_position() -> None:
    model, rollout = tiny.llama(1), batch(SEQUENCES)
    logits = model(
        rollout.input_ids, attention_mask=rollout.attention_mask, position_ids=position_ids(rollout.attention_mask)
    ).logits
    rows = predicting_rows(logits, rollout.completion_mask)
    for cut in (264, 200):  # ids past what both models know are not asked about
        found = likeliest_ids(
            model.train(), head_of(model), rollout, 5, vocab_size=cut, chunk_tokens=3, passes=Passes(3)
        )
        assert torch.equal(found, rows[:, :cut].topk(5).indices) and model.training


def test_the_students_tokens_show_more_of_a_reverse_kl_and_both_lists_most(tmp_path: Path) -> None:
    """The student writes what the teacher finds unlikely: its own tokens are where the divergence is."""
    student = tiny.llama(1)
    full = loss(trainer(tmp_path, student, estimator="full"))
    seen = {
        s: loss(trainer(tmp_path, student, estimator="top_k", top_k=4, support=s))
        for s in ("teacher", "student", "union")
    }
    assert seen["teacher"] < seen["student"] < seen["union"] < full
    assert seen["student"] > seen["teacher"] + 0.3 * (full - seen["teacher"])
    everything = loss(trainer(tmp_path, student, estimator="top_k", top_k=264, support="student"))
    assert everything == pytest.approx(full, rel=1e-5)


@pytest.mark.parametrize("support", ["student", "union"])
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(tmp_path: Path, support: str) -> None:
    assert abs(loss(trainer(tmp_path, tiny.llama(2), estimator="top_k", top_k=4, support=support))) < 1e-6


def test_training_asks_about_the_students_tokens_of_the_moment(tmp_path: Path) -> None:
    t = trainer(tmp_path, tiny.llama(1), estimator="top_k", top_k=4, support="student", learning_rate=1e-2)
    asked: list[torch.Tensor] = []
    score = t.teacher.score
    t.teacher.score = lambda rollout, top_k, chosen=None: asked.append(chosen) or score(rollout, top_k, chosen)  # type: ignore[method-assign]
    t.train()
    assert len(asked) == 2 and all(c.shape[1] == 4 for c in asked)


@pytest.mark.parametrize("support", ["student", "union", "teacher"])
def test_a_list_longer_than_the_vocabulary_is_refused_with_the_preflight_left_out(tmp_path: Path, support: str) -> None:
    t = trainer(tmp_path, tiny.llama(1), estimator="top_k", top_k=265, support=support)
    t.wants_preflight = False
    with pytest.raises(UserError, match="^objective.top_k is 265, the vocabulary has 264 columns. Fix: at most 264"):
        t.train()


def test_support_without_a_list_is_refused() -> None:
    with pytest.raises(UserError, match="objective.support is student"):
        OPDConfig(output_dir="x", estimator="full", support="student")
