"""A teacher that is with the host between uses: what of it can be seen without a second device."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmdistill import OPDConfig, OPDTrainer, RolloutConfig, TAIDConfig, TAIDTrainer, UserError
from llmdistill.diffusion.suffix_judge import SuffixCorrected
from llmdistill.models.heads import plain_head
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.placement import Offloaded, Sharded, Whole, placed
from llmdistill.texts import Prompt, Rollout, Sampling
from llmdistill.texts.rollout import collate
from tests import tiny


class Elsewhere(Offloaded):
    """A host whose memory cannot be computed with: weights there have the other sign. What is read of them without
    their having come to the device is wrong."""

    def to_host(self, values: Tensor) -> Tensor:
        return -values if values.is_floating_point() else values

    def to_device(self, values: Tensor) -> Tensor:
        return -values if values.is_floating_point() else values.clone()


def offloaded() -> LocalTeacher:
    model = tiny.llama(1, hidden=48, tied=False)
    return LocalTeacher(model, tiny.tokenizer(), placement=Elsewhere(model, torch.device("cpu")))


def whole() -> LocalTeacher:
    return LocalTeacher(tiny.llama(1, hidden=48, tied=False), tiny.tokenizer())


def rollout() -> Rollout:
    return collate([[5, 6, 7], [8, 9]], [[10, 11, 1], [12, 13, 14, 15]], pad_id=0)


def test_an_offloaded_teacher_says_and_writes_what_one_that_is_there_does() -> None:
    away, there, text = offloaded(), whole(), rollout()
    assert torch.equal(away.dense(text).hidden_NH, there.dense(text).hidden_NH)
    for mine, its in zip(away.hidden_layers(text, [0, 1]), there.hidden_layers(text, [0, 1]), strict=True):
        assert torch.equal(mine, its)
    for mine, its in zip(away.score(text, 5), there.score(text, 5), strict=True):
        assert mine.topk_ids.tolist() == its.topk_ids.tolist()
    sampling, prompts = Sampling(6, seed=1), [Prompt([5, 6], "")]
    assert away.generate(prompts, sampling).input_ids.equal(there.generate(prompts, sampling).input_ids)
    by_bayes = [SuffixCorrected(teacher).score(text, 3) for teacher in (away, there)]
    assert [b.topk_ids.tolist() for b in by_bayes[0]] == [b.topk_ids.tolist() for b in by_bayes[1]]
    wrong = tiny.llama(1, hidden=48, tied=False)
    assert torch.equal(-next(away.model.parameters()), next(wrong.parameters()))  # and is away again


def test_weights_are_on_the_device_only_in_between() -> None:
    """A device map, and that what the device had is freed."""
    teacher = offloaded()
    model, placement = teacher.model, teacher.placement
    assert isinstance(placement, Elsewhere)
    head = {id(p) for p in plain_head(model).parameters()}
    away = [p for p in model.parameters() if id(p) not in head]
    host, on_device = [p.data_ptr() for p in away], list[weakref.ref[Any]]()
    assert len(away) == len(list(model.parameters())) - len(head) > 0
    for _ in range(2):  # entered within itself
        with placement.present(), placement.present():
            assert not set(host) & {p.data_ptr() for p in away}
            on_device += [weakref.ref(p.data.untyped_storage()) for p in away]
        assert host == [p.data_ptr() for p in away]
    with pytest.raises(RuntimeError, match="a pass that fails"), placement.present():
        raise RuntimeError("a pass that fails")
    assert host == [p.data_ptr() for p in away]
    assert [ref() for ref in on_device] == [None] * len(on_device)


@pytest.mark.parametrize("front", ("opd", "taid"))
def test_training_with_an_offloaded_teacher_is_training_with_it(tmp_path: Path, front: str) -> None:
    """Preflight, causality check, evidence, held-out text of its own: all of them have it come first."""
    kind: Any = {"opd": (OPDTrainer, OPDConfig), "taid": (TAIDTrainer, TAIDConfig)}[front]
    weights = []
    for name, teacher in (("there", whole()), ("away", offloaded())):
        args = kind[1](
            output_dir=str(tmp_path / name),
            max_steps=2,
            per_device_train_batch_size=4,
            save_strategy="no",
            eval_strategy="steps",
            eval_steps=1,
            report_to=[],
            rollouts=RolloutConfig(max_new_tokens=6),
        )
        trainer = kind[0](
            tiny.llama(0),
            args,
            teacher,
            train_dataset=tiny.rows(10)[2:],
            eval_dataset=tiny.rows(2),
            processing_class=tiny.tokenizer(),
            preflight=True,
        )
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_what_no_placement_is_for_is_refused() -> None:
    with pytest.raises(UserError, match="teacher.placement is offload, and without a GPU .* Fix: leave it out"):
        placed(tiny.llama(1), torch.device("cpu"), "offload")
    with pytest.raises(UserError, match="teacher.placement is sharded, and there is one process. Fix: "):
        placed(tiny.llama(1), torch.device("cpu"), "sharded")


def test_bayes_over_a_teacher_in_parts_is_refused() -> None:
    teacher = LocalTeacher(tiny.llama(1), tiny.tokenizer(), placement=InParts())
    with pytest.raises(UserError, match="suffix_corrected, and teacher.placement sharded: .* Fix: teacher.placement"):
        SuffixCorrected(teacher)


class InParts(Sharded):
    """As in a launch of several processes, of which this is none."""

    def __init__(self) -> None:
        pass

    present = Whole.present
