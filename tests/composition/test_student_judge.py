"""The student as its own judge: which weights it judges with, and that nothing of the student is changed by it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from llmdistill import OPDConfig, OPDTrainer
from llmdistill.recipe.config import RolloutConfig
from llmdistill.recipe.data_config import DataConfig
from llmdistill.teachers.student import StudentTeacher
from tests import tiny
from tests.methods import rounds

ROWS = [{**row, "hint": f"hint {i}" if i % 3 else None} for i, row in enumerate(tiny.rows(16))]
DECAY = 0.7


class Weights(TrainerCallback):
    """The student's weights after each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({n: p.detach().clone() for n, p in model.named_parameters()})


def make(folder: Path, which: Any, *, student: Any = None, peft: Any = None, **settings: Any) -> OPDTrainer:
    shared: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "rollouts": RolloutConfig(max_new_tokens=5),
    }
    return OPDTrainer(
        student or tiny.llama(1),
        OPDConfig(output_dir=str(folder), **{**shared, **settings}),
        StudentTeacher(which, DECAY),
        train_dataset=ROWS,
        processing_class=tiny.tokenizer(),
        peft_config=peft,
        data=DataConfig(contexts={rounds.CONTEXT: "hint"}),
        contexts={"teacher": rounds.CONTEXT},
    )


def lora(**more: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, **more)


def judged(t: OPDTrainer) -> Tensor:
    """Log-probs of the judge over the rows of a hand-made round, [N, V]."""
    (logits,) = t.judges["teacher"].dense(rounds.rollout()).chunk(slice(0, 11), None)  # type: ignore[attr-defined]
    return logits.detach().double().log_softmax(-1)


def test_ema_is_the_average_that_a_hand_computes(tmp_path: Path) -> None:
    """theta' <- decay theta' + (1 - decay) theta, once per optimizer step, from the start; and it judges with that."""
    student, seen = tiny.llama(1), Weights()
    average = {n: p.detach().clone() for n, p in student.named_parameters()}
    t = make(tmp_path, "ema", student=student, gradient_accumulation_steps=2)
    t.add_callback(seen)
    t.train()
    assert len(seen.steps) == 4
    for weights in seen.steps:
        average = {n: DECAY * average[n] + (1 - DECAY) * weights[n] for n in average}
    for name, value in t.judges["teacher"].state_dict()["average"].items():  # type: ignore[attr-defined]
        torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-6)
    twin = copy.deepcopy(student)
    twin.load_state_dict(average, strict=False)
    torch.testing.assert_close(judged(t), torch.cat(rounds.logps(twin)).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapted", [False, True])
def test_the_initial_one_stays_what_it_was(tmp_path: Path, adapted: bool) -> None:
    """With an adapter it is the model below, and no copy is kept."""
    student = tiny.llama(1)
    start = torch.cat(rounds.logps(student)).detach()
    t = make(tmp_path, "initial", student=student, peft=lora() if adapted else None)
    t.train()
    torch.testing.assert_close(judged(t), start, rtol=1e-4, atol=1e-4)
    now = torch.cat(rounds.logps(t.model)).detach()
    assert float((now - start).abs().max()) > 0.1
    state = t.judges["teacher"].state_dict()  # type: ignore[attr-defined]
    assert bool(state) != adapted and not (adapted and t.judges["teacher"].average)  # type: ignore[attr-defined]


def test_the_live_one_is_the_student_of_now(tmp_path: Path) -> None:
    t = make(tmp_path, "live", peft=lora())
    t.train()
    torch.testing.assert_close(judged(t), torch.cat(rounds.logps(t.model)).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", ["live", "initial", "ema"])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", ["dense", "score", "hidden_layers"])
def test_judging_leaves_the_student_as_it_was(tmp_path: Path, which: Any, adapted: bool, kind: str) -> None:
    """Bit for bit, modes of all modules and gradients included; it judges without dropout, so twice alike."""
    student = tiny.llama(1, attention_dropout=0.5)
    t = make(tmp_path, which, student=student, peft=lora(lora_dropout=0.5) if adapted else None)
    with torch.no_grad():
        for parameter in t.model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.07)
    t.model.train()
    t.model.base_model.eval() if not adapted else None  # a part in another mode than the whole
    for parameter in t.model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    judge: Any = t.judges["teacher"]
    before = {n: p.detach().clone() for n, p in t.model.named_parameters()}
    modes = {n: m.training for n, m in t.model.named_modules()}
    trained = {n: p.requires_grad for n, p in t.model.named_parameters()}

    def ask() -> list[Tensor]:
        rollout = rounds.rollout()
        if kind == "dense":
            return [judged(t)]
        if kind == "score":
            return [b.token_logprobs for b in judge.score(rollout, 3)]
        return list(judge.hidden_layers(rollout, (0, -1)))

    first, second = ask(), ask()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(x.requires_grad for x in first)
    assert {n: m.training for n, m in t.model.named_modules()} == modes
    assert {n: p.requires_grad for n, p in t.model.named_parameters()} == trained
    for name, parameter in t.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None or bool((parameter.grad == 1).all())


@pytest.mark.parametrize("which", ["initial", "ema"])
@pytest.mark.parametrize("adapted", [False, True])
def test_stopped_and_resumed_equals_undisturbed(tmp_path: Path, which: Any, adapted: bool) -> None:
    """The average, and the start, are in the checkpoint: nowhere else after the first step."""
    peft = lora if adapted else lambda: None
    whole = make(tmp_path / "whole", which, peft=peft())
    whole.train()
    first = make(tmp_path / "torn", which, peft=peft(), save_strategy="steps", save_steps=2)
    first.add_callback(StopAt(2))
    first.train()
    again = make(tmp_path / "torn", which, peft=peft(), save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "torn" / "checkpoint-2"))
    for name, value in whole.judges["teacher"].state_dict().get("average", {}).items():  # type: ignore[attr-defined]
        assert torch.equal(value, again.judges["teacher"].state_dict()["average"][name]), name  # type: ignore[attr-defined]
    lines = [[x["loss"] for x in t.state.log_history if "loss" in x] for t in (whole, again)]
    assert lines[0] == lines[1] and len(lines[0]) == 4
    for (name, a), (_, b) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_a_second_run_of_one_trainer_starts_from_its_start(tmp_path: Path) -> None:
    t = make(tmp_path, "ema")
    t.train()
    moved = {n: x.clone() for n, x in t.judges["teacher"].average.items()}  # type: ignore[attr-defined]
    t._method_state().restore(copy.deepcopy(t._method_start))
    start = t.judges["teacher"].average  # type: ignore[attr-defined]
    fresh = dict(tiny.llama(1).named_parameters())
    assert all(torch.equal(start[n], fresh[n]) for n in start) and any(
        not torch.equal(moved[n], start[n]) for n in moved
    )


def test_it_is_measured_on_held_out_prompts_in_its_context(tmp_path: Path) -> None:
    """On the student's own samples; it writes none. A live judge without the context would be 0."""
    t = make(tmp_path, "live")
    t.eval_dataset = t.train_dataset[:6]
    found = t.evaluate()
    assert found["eval_student/reverse_kl"] > 1e-3 and found["eval_loss"] == found["eval_student/forward_kl"]
    assert not any(name.startswith("eval_teacher/") for name in found)
