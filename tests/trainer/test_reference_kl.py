"""A KL to a reference is an ordinary second term."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmdistill import OPDConfig, OPDTrainer, RolloutConfig, UserError
from tests import tiny
from tests.trainer.batches import micro_batch
from tests.trainer.test_loss import SEQUENCES, batch


def make(folder: Path, **settings: Any) -> OPDTrainer:
    args = OPDConfig(output_dir=str(folder), rollouts=RolloutConfig(max_new_tokens=4), report_to="none", **settings)
    return OPDTrainer(tiny.llama(1), args, tiny.llama(2), reference=tiny.llama(3), processing_class=tiny.tokenizer())


def loss(trainer: OPDTrainer) -> float:
    trainer.model.train()
    value = trainer.compute_loss(trainer.model, {"micro_batch": micro_batch(trainer, batch(SEQUENCES))})
    return value.item()  # type: ignore[no-any-return]


def test_it_adds_its_share(tmp_path: Path) -> None:
    """The loss is that of the divergence and the weight times that of the reference in the teacher's place."""
    alone = OPDTrainer(
        tiny.llama(1),
        OPDConfig(output_dir=str(tmp_path), report_to="none"),
        tiny.llama(3),
        processing_class=tiny.tokenizer(),
    )
    both, plain = loss(make(tmp_path, reference_kl=0.25)), loss(make(tmp_path))
    assert both == pytest.approx(plain + 0.25 * loss(alone), rel=1e-5) and both > plain


def test_it_needs_a_reference(tmp_path: Path) -> None:
    args = OPDConfig(output_dir=str(tmp_path), reference_kl=0.1, reference="")
    with pytest.raises(UserError, match="objective.reference_kl is 0.1 and there is no reference.*--reference_kl 0"):
        OPDTrainer(tiny.llama(1), args, tiny.llama(2), processing_class=tiny.tokenizer())
