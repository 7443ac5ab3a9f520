"""Cross-entropy on the rows' own completions, alone and beside a divergence; a reference; a router's balance loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from llmdistill import Ask, DistillationTrainer, Method, OPDConfig, OPDTrainer, Term
from llmdistill.errors import UserError
from llmdistill.objectives.divergences import reverse_kl
from llmdistill.objectives.labels import cross_entropy
from llmdistill.recipe.config import RolloutConfig
from llmdistill.texts.sources import Only
from tests import tiny
from tests.methods import rounds

CE = Method((Term("cross_entropy", cross_entropy, (), ("tokens",)),), {"main": Only("dataset")})


def opd(folder: Path, student: Any, rows: Any = None, **settings: Any) -> OPDTrainer:
    shared: dict[str, Any] = {"per_device_train_batch_size": 4, "max_steps": 2, "save_strategy": "no"}
    shared |= {"logging_steps": 1, "rollouts": RolloutConfig(max_new_tokens=5)}
    return OPDTrainer(
        student,
        OPDConfig(output_dir=str(folder), **{**shared, **settings}),
        tiny.llama(2),
        train_dataset=rows or tiny.rows(8),
        processing_class=tiny.tokenizer(),
    )


def as_rows(prompts: Any) -> list[Any]:
    return [(p.ids, p.completion, None, [0.0] * len(p.completion)) for p in prompts]


def sums(student: Any, rows: list[Any]) -> tuple[Tensor, Tensor]:
    """Reverse KL and cross-entropy of every token, [N] each."""
    s, q = torch.cat(rounds.logps(student, rows)), torch.cat(rounds.logps(tiny.llama(2), rows)).detach()
    return rounds.kl(s, q), -rounds.pick(s, torch.cat(rounds.tokens(rows)))


def forwards(model: Any) -> list[int]:
    """Sequences of every forward pass in training from here on."""
    found: list[int] = []

    def note(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        if "position_ids" in inputs:  # the trainer's, not a hand's
            found.append(len(inputs["input_ids"]))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return found


@pytest.mark.parametrize("parts", [1, 2])
def test_beside_a_divergence_on_the_dataset_it_shares_the_forward(tmp_path: Path, parts: int) -> None:
    student = tiny.llama(1)
    t = opd(tmp_path, student, sequences="dataset", ce_weight=0.3)
    text = t.draw(t.train_dataset[:4])["main"]  # type: ignore[index]
    passes = forwards(student)
    loss, found = rounds.gradients(t, text, parts)
    assert passes == [4 // parts] * parts
    student.zero_grad()
    kl, ce = sums(student, as_rows(t.train_dataset[:4]))  # type: ignore[index]
    expected = kl.mean() + 0.3 * ce.mean()
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    rounds.assert_same(found, {n: p.grad for n, p in student.named_parameters()}, 5e-5)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("mean", ["token", "sequence"])
def test_beside_the_student_s_own_text_it_is_a_second_one(tmp_path: Path, parts: int, mean: Any) -> None:
    """Each of the two is a mean over its own text; rows without a completion count 0; still one forward a
    micro-batch."""
    student = tiny.llama(1)
    rows = [row if i != 2 else {"prompt": row["prompt"]} for i, row in enumerate(tiny.rows(8))]
    t = opd(tmp_path, student, rows, ce_weight=0.3, mean=mean)
    texts = t.draw(t.train_dataset[:4])  # type: ignore[index]
    assert {name: text.author for name, text in texts.items()} == {"main": "student", "labels": "dataset"}
    assert [n == 0 for n in texts["labels"].rollout.row_counts] == [False, False, True, False]
    passes = forwards(student)
    loss, found = rounds.gradients(t, texts, parts)
    assert passes == [8 // parts] * parts
    written = texts["main"].rollout.token_rows().split(texts["main"].rollout.row_counts)
    own = [(p.ids, w.tolist(), None, [0.0] * len(w)) for p, w in zip(texts["main"].prompts, written, strict=True)]
    labelled = [row for row in as_rows(t.train_dataset[:4]) if row[1]]  # type: ignore[index]
    student.zero_grad()
    values = []
    for values_N, of in ((sums(student, own)[0], own), (sums(student, labelled)[1], labelled)):
        each = values_N.split([len(row[1]) for row in of])
        values.append(values_N.mean() if mean == "token" else torch.stack([x.mean() for x in each]).mean())
    expected = values[0] + 0.3 * values[1]
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    rounds.assert_same(found, {n: p.grad for n, p in student.named_parameters()}, 5e-5)


def test_terms_are_logged_apart(tmp_path: Path) -> None:
    t = opd(tmp_path, tiny.llama(1), ce_weight=0.3)
    t.train()
    line = next(x for x in t.state.log_history if "loss" in x)
    parts = line["distill/divergence/loss"] + 0.3 * line["distill/cross_entropy/loss"]
    assert line["loss"] == pytest.approx(parts, rel=1e-5)
    assert line["distill/divergence/grad_norm"] > 0 and line["distill/cross_entropy/grad_norm"] > 0
    assert line["distill/divergence/reverse_kl"] == pytest.approx(line["distill/divergence/loss"], rel=1e-5)


def test_alone_it_is_trl_s_fine_tuning(tmp_path: Path) -> None:
    """Loss and gradient norm of three steps on the same tokens, in micro-batches of unequal token counts."""
    from trl import SFTConfig, SFTTrainer

    shared: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 3,
    }
    tokenizer, rows = tiny.tokenizer(), tiny.rows(16)
    ours = DistillationTrainer(
        tiny.llama(1),
        OPDConfig(output_dir=str(tmp_path / "ours"), **shared),
        method=CE,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    ours.train()
    encoded = [
        {"input_ids": [*p.ids, *p.completion], "completion_mask": [0] * len(p.ids) + [1] * len(p.completion)}
        for p in ours.train_dataset  # type: ignore[union-attr]
    ]
    theirs = SFTTrainer(
        tiny.llama(1),
        SFTConfig(
            output_dir=str(tmp_path / "theirs"),
            completion_only_loss=True,
            max_length=None,
            bf16=False,
            use_cpu=True,
            **shared,
        ),
        train_dataset=Dataset.from_list(encoded),
        processing_class=tokenizer,
    )
    theirs.train()
    lines = [[(x["loss"], x["grad_norm"]) for x in t.state.log_history if "loss" in x] for t in (ours, theirs)]
    assert len(lines[0]) == 3
    assert lines[0] == [pytest.approx(pair, rel=1e-5) for pair in lines[1]]


@pytest.mark.parametrize("xi", [0.0, 0.4, 1.0, 1.5])
def test_xi_is_one_target(tmp_path: Path, xi: float) -> None:
    """(1 - xi)(-log S(y)) + xi CE(T, S), also past 1, where it moves away from the labels."""
    student = tiny.llama(1)
    t = opd(tmp_path, student, sequences="dataset", xi=xi)
    assert [term.name for term in t.method.terms] == ["mixed_target"]
    rows = as_rows(t.train_dataset[:4])  # type: ignore[index]
    s, q = torch.cat(rounds.logps(student, rows)), torch.cat(rounds.logps(tiny.llama(2), rows)).detach()
    nll = -rounds.pick(s, torch.cat(rounds.tokens(rows)))
    expected = ((1 - xi) * nll - xi * (q.exp() * s).sum(-1)).mean()
    rounds.assert_agree(t, t.draw(t.train_dataset[:4])["main"], student, expected)  # type: ignore[index]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"xi": 0.5, "ce_weight": 1.0, "sequences": "dataset"}, "objective.xi is 0.5"),
        ({"xi": 0.5}, "objective.xi"),
        ({"xi": -0.1, "sequences": "dataset"}, "objective.xi is -0.1; it must be >= 0"),
        ({"ce_weight": -1.0}, "objective.ce_weight is -1.0; it must be >= 0"),
    ],
)
def test_settings(tmp_path: Path, settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match="Fix: ") as error:
        OPDConfig(output_dir=str(tmp_path), **settings)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_reference_is_an_ordinary_second_term(tmp_path: Path) -> None:
    """beta KL(S || R) beside the divergence from the teacher, each judge heard on the same rows."""
    student, reference = tiny.llama(1), tiny.llama(3)
    terms = (
        Term("divergence", reverse_kl, (Ask("teacher"),)),
        Term("near", reverse_kl, (Ask("reference"),), weight=0.2),
    )
    t = DistillationTrainer(
        student,
        OPDConfig(output_dir=str(tmp_path), save_strategy="no"),
        tiny.llama(2),
        method=Method(terms),
        judges={"reference": reference},
        train_dataset=tiny.rows(4),
        processing_class=tiny.tokenizer(),
    )
    s, q = torch.cat(rounds.logps(student)), torch.cat(rounds.logps(tiny.llama(2))).detach()
    r = torch.cat(rounds.logps(reference)).detach()
    expected = rounds.kl(s, q).mean() + 0.2 * rounds.kl(s, r).mean()
    rounds.assert_agree(t, rounds.text(), student, expected)


# ---------------------------------------------------------------- mixture of experts


def moe(kind: str, coefficient: float) -> Any:
    shared: dict[str, Any] = dict(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        num_experts_per_tok=2,
        router_aux_loss_coef=coefficient,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        initializer_range=0.3,
    )
    torch.manual_seed(5)
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(num_local_experts=4, **shared)).float()
    qwen = Qwen3MoeConfig(num_experts=4, moe_intermediate_size=24, decoder_sparse_step=1, **shared)
    return Qwen3MoeForCausalLM(qwen).float()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_router_s_balance_loss_is_added_and_logged(tmp_path: Path, kind: str) -> None:
    """coefficient * the model's own auxiliary loss, with its gradient; gone where the coefficient is 0."""
    student = moe(kind, 0.7)
    t = opd(tmp_path, student, sequences="dataset")
    text = t.draw(t.train_dataset[:4])["main"]  # type: ignore[index]
    loss, found = rounds.gradients(t, text)
    student.zero_grad()
    rollout = text.rollout
    inputs = {"input_ids": rollout.input_ids, "attention_mask": rollout.attention_mask}
    balance = student(**inputs, output_router_logits=True).aux_loss
    kl, _ = sums(student, as_rows(t.train_dataset[:4]))  # type: ignore[index]
    expected = kl.mean() + 0.7 * balance
    expected.backward()
    assert float(balance.detach()) > 0.5  # at least 1 for an even load of each of the top two, before weights
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
    rounds.assert_same(found, {n: p.grad for n, p in student.named_parameters() if p.grad is not None}, 2e-4)

    plain, _ = rounds.gradients(opd(tmp_path, moe(kind, 0.0), sequences="dataset"), text)
    assert plain == pytest.approx(float(kl.mean().detach()), rel=1e-4)


@pytest.mark.parametrize("coefficient", [0.7, 0.0])
def test_the_balance_loss_is_in_the_log_of_training_and_not_in_evaluation(tmp_path: Path, coefficient: float) -> None:
    t = opd(tmp_path, moe("mixtral", coefficient), sequences="dataset", gradient_accumulation_steps=2)
    t.eval_dataset = t.train_dataset[:4]  # type: ignore[index]
    t.train()
    lines = [x for x in t.state.log_history if "loss" in x]
    for line in lines:
        assert ("distill/router_balance" in line) == bool(coefficient)
        extra = line.get("distill/router_balance", 0.0)
        assert line["loss"] == pytest.approx(line["distill/reverse_kl"] + extra, rel=0.05)  # parts weigh by their rows
    with_balance = t.evaluate()
    t.model.config.router_aux_loss_coef = 0.0 if coefficient else 0.7
    assert t.evaluate() == pytest.approx(with_balance)
