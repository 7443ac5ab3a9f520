"""``objective.packing``: a run is the one without it, and a student or recipe that cannot be packed is refused."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import TrainerCallback

from llmdistill import Ask, DistillationConfig, DistillationTrainer, Method, Term, UserError
from llmdistill.composition.plan import in_order
from llmdistill.models.packing import layout_of
from llmdistill.objectives.divergences import reverse_kl
from llmdistill.objectives.labels import cross_entropy
from llmdistill.texts.sources import Only
from tests import tiny
from tests.diffusion import runs
from tests.students.architectures import small
from tests.trainer import pair_cases

TWO = Method(
    (Term("kl", reverse_kl, (Ask(),)), Term("labels", cross_entropy, (), ("tokens",), weight=0.5, mean="sequence")),
    {"main": Only("dataset")},
)


def trained(folder: Path, student: Any, packing: bool, **settings: Any) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """(what was logged of each step, weights) after three steps."""
    settings = {"per_device_train_batch_size": 8, "batch_tokens": 150, **settings}
    shared: dict[str, Any] = {"optim": "sgd", "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no"}
    peft, callbacks = settings.pop("peft_config", None), settings.pop("callbacks", None)
    args = DistillationConfig(output_dir=str(folder), max_steps=3, packing=packing, **{**shared, **settings})
    tokenizer, rows = tiny.tokenizer(), tiny.rows(24)
    t = DistillationTrainer(
        student,
        args,
        tiny.llama(2),
        method=TWO,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=peft,
        callbacks=callbacks,
        preflight=False,
    )
    t.train()
    assert all(judge.packs == packing for judge in t.judges.values())
    lines = [line for line in t.state.log_history if "loss" in line]
    names = [n for n in lines[0] if n in ("loss", "grad_norm") or n.startswith("distill/")]
    return [[line[n] for n in names] for line in lines], {n: p.detach().clone() for n, p in t.model.named_parameters()}


def same(a: Any, b: Any) -> None:
    (lines, weights), (other_lines, other_weights) = a, b
    assert len(lines) == 3 and lines == [pytest.approx(line, rel=1e-4, abs=1e-6) for line in other_lines]
    assert weights.keys() == other_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "lora", "experts", "eager", "eager experts"])
def test_a_run_with_packing_is_the_run_without(tmp_path: Path, kind: str) -> None:
    def run(packing: bool) -> Any:
        student = small("qwen3_moe", router_aux_loss_coef=0.1) if "experts" in kind else tiny.llama(1)
        if "eager" in kind:  # rows with padding at their ends, which no balance may count
            student.set_attn_implementation("eager")
        more: dict[str, Any] = {}
        if "experts" in kind:  # a router's balance is over the tokens of a pass: the same passes
            more = {"batch_tokens": 0}
        if kind == "lora":
            torch.manual_seed(0)
            more["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        return trained(tmp_path / str(packing), student, packing, **more)

    same(run(True), run(False))


class Checkpointing(TrainerCallback):
    """Notes what layers are checkpointed with, while they are."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        layers: list[nn.Module] = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
        functions = [m._gradient_checkpointing_func for m in layers]
        self.seen.append([f.keywords for f in functions if isinstance(f, functools.partial)])


@pytest.mark.parametrize("given", [{"use_reentrant": True}, {"use_reentrant": False, "preserve_rng_state": False}])
def test_checkpointing_keeps_what_the_user_said_and_changes_nothing(tmp_path: Path, given: dict[str, Any]) -> None:
    callback = Checkpointing()
    more = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": given, "callbacks": [callback]}
    checkpointed = trained(tmp_path / "a", tiny.llama(1), True, **more)
    assert len(callback.seen) == 3 and all(
        step and all(k.items() >= given.items() for k in step) for step in callback.seen
    )
    same(checkpointed, trained(tmp_path / "b", tiny.llama(1), False))


@pytest.mark.parametrize("shape", [{}, {"block_size": 4}, {"anneal_steps": 3}], ids=["full", "blocks", "annealed"])
def test_a_denoiser_reads_packed_texts_as_padded_ones(tmp_path: Path, shape: dict[str, Any]) -> None:
    logs = []
    for packing in (True, False):
        t = runs.trainer(tmp_path / str(packing), packing=packing, copies=2, **shape)
        t.train()
        assert layout_of(t.model, both_ways=True) == "row"  # where no biases say who reads whom
        logs.append([(line["loss"], line["grad_norm"]) for line in t.state.log_history if "loss" in line])
    assert len(logs[0]) == 4 and logs[0] == [pytest.approx(line, rel=1e-4) for line in logs[1]]


def test_a_student_whose_states_run_on_is_refused_before_the_first_step(tmp_path: Path) -> None:
    student = small("mamba2")
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    with pytest.raises(UserError, match="Mamba2ForCausalLM does not keep packed sequences apart: .* --objective.pack"):
        trained(tmp_path, student, True)
    assert all(torch.equal(before[name], p) for name, p in student.named_parameters())


def test_a_teacher_whose_states_run_on_reads_padded(tmp_path: Path) -> None:
    args = DistillationConfig(output_dir=str(tmp_path), max_steps=1, packing=True, save_strategy="no")
    rows, tokenizer = tiny.rows(8), tiny.tokenizer()
    t = DistillationTrainer(
        tiny.llama(1),
        args,
        small("mamba2"),
        method=TWO,
        train_dataset=rows,
        processing_class=tokenizer,
        preflight=False,
    )
    t.train()
    assert not t.judges["teacher"].packs


def test_a_pair_stays_in_one_pass_and_counts_as_what_both_its_sides_have(tmp_path: Path) -> None:
    whole = pair_cases.trainer(tmp_path / "a")
    t = pair_cases.trainer(tmp_path / "b", packing=True, batch_tokens=40)

    def gradients(t: Any, parts: list[Any]) -> dict[str, torch.Tensor]:
        t.model.zero_grad()
        for batch in parts:
            t.compute_loss(t.model, {"micro_batch": batch}).backward()
        return {name: p.grad.clone() for name, p in t.model.named_parameters()}

    texts = in_order(t.draw(pair_cases.PAIRS), t.method.terms, packed=True)
    batches = t.batches(texts, 1)
    sizes = [int(batch.rollout.attention_mask.sum()) for batch in batches]
    assert len(sizes) > 1 and max(sizes) <= 40
    assert all(len({len(text) for text in batch.texts.values()}) == 1 for batch in batches)
    expected = gradients(whole, whole.batches(whole.draw(pair_cases.PAIRS), 1))
    for name, gradient in gradients(t, batches).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    t.passes = replace(t.passes, tokens=20)  # 12 and 9 tokens of two sides
    with pytest.raises(UserError, match="objective.batch_tokens is 20, and there is text of 21 tokens that one pass"):
        t.batches(texts, 1)
