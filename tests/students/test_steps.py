"""Steps that say nothing, teachers that are the student, parts that text never reaches."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llmdistill import OPDConfig, OPDTrainer, RolloutConfig, UserError
from llmdistill.models.adapters import adapted
from llmdistill.models.unused import freeze_unused
from tests import tiny
from tests.students.architectures import small
from tests.students.multimodal import wrapped


def trainer(student: Any, teacher: Any, tmp_path: Path, rows: Any = None, **settings: Any) -> OPDTrainer:
    peft_config = settings.pop("peft_config", None)
    rollouts = RolloutConfig(max_new_tokens=4, **settings.pop("rollouts", {}))
    args = OPDConfig(output_dir=str(tmp_path / "run"), rollouts=rollouts, **{"max_steps": 1, **settings})
    return OPDTrainer(
        student,
        args,
        teacher,
        train_dataset=tiny.rows(8) if rows is None else rows,
        processing_class=tiny.tokenizer(),
        peft_config=peft_config,
    )


def uncounted(rollout: Any) -> Any:
    return replace(rollout, completion_mask=torch.zeros_like(rollout.completion_mask))


def test_a_step_in_which_nothing_counts_changes_no_weight(tmp_path: Path) -> None:
    """Every completion of the second step is cut off and left out: neither decay nor momentum moves a weight."""
    student = tiny.llama(1)
    run = trainer(
        student,
        tiny.llama(2),
        tmp_path,
        max_steps=2,
        weight_decay=0.1,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    seen: list[dict[str, torch.Tensor]] = []
    draw = type(run).draw

    def drawn(examples: Any) -> Any:
        seen.append({name: p.detach().clone() for name, p in student.named_parameters()})
        texts = draw(run, examples)
        if len(seen) == 2:
            texts = {
                name: replace(
                    t, rollout=replace(t.rollout, completion_mask=torch.zeros_like(t.rollout.completion_mask))
                )
                for name, t in texts.items()
            }
        return texts

    run.draw = drawn  # type: ignore[method-assign]
    run.train()
    assert run.state.global_step == 2
    assert any(not torch.equal(seen[0][name], seen[1][name]) for name in seen[0])  # the first step did train
    assert all(torch.equal(seen[1][name], p) for name, p in student.named_parameters())


@pytest.mark.parametrize("share", ["itself", "below its adapter", "one matrix"])
def test_a_teacher_that_shares_weights_with_the_student_is_refused(share: str, tmp_path: Path) -> None:
    student: Any = tiny.llama(1)
    teacher = student
    if share == "below its adapter":
        student = get_peft_model(student, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
        teacher = student.get_base_model()
    elif share == "one matrix":
        teacher = copy.deepcopy(student)
        teacher.model.embed_tokens.weight = student.model.embed_tokens.weight
    with pytest.raises(UserError, match="teacher is the student itself, or shares weights"):
        trainer(student, teacher, tmp_path).train()


# ---------------------------------------------------------------- what text does not run


def test_towers_are_frozen_and_the_rest_is_not() -> None:
    model = wrapped("gemma3")
    assert set(freeze_unused(model)) == {"model.vision_tower", "model.multi_modal_projector"}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "language_model" in name or "lm_head" in name}


def test_layers_that_look_at_images_are_frozen_too() -> None:
    """Mllama's stand between those of text: text passes them by."""
    model = wrapped("mllama")
    frozen = freeze_unused(model)
    assert "model.language_model.layers.1" in frozen and "model.language_model.layers.0" not in frozen
    model(input_ids=torch.randint(4, 260, (2, 16))).logits.sum().backward()
    assert {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None} == set()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "mistral3", "voxtral"])
def test_all_that_is_trained_of_a_class_of_several_modalities_gets_a_gradient(name: str) -> None:
    model = wrapped(name)
    assert freeze_unused(model)
    model(input_ids=torch.randint(4, 260, (2, 16))).logits.sum().backward()
    assert {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None} == set()
    assert all(p.requires_grad for p in model.get_output_embeddings().parameters())


def test_every_trained_weight_of_an_adapted_mixture_gets_a_gradient() -> None:
    """DistributedDataParallel waits for all of them; experts are fused, so text reaches the adapters of all."""
    for architecture in ("qwen3_moe", "llama4_text", "gpt_oss"):
        student: Any = adapted(small(architecture), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
        freeze_unused(student)
        student(input_ids=torch.randint(4, 260, (2, 16))).logits.sum().backward()
        lacking = [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None]
        assert not lacking


def test_a_plain_decoder_is_left_as_it_is() -> None:
    assert freeze_unused(small("qwen3_moe")) == []
    assert freeze_unused(adapted(tiny.llama(0), LoraConfig(target_modules="all-linear"))) == []
