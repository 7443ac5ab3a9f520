"""One completion in two contexts: the rows stay the same tokens, whatever the prompts and templates."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from llmdistill import Ask, DistillationTrainer, Method, OPDConfig, OPDTrainer, Term
from llmdistill.composition.batch import Text
from llmdistill.errors import UserError
from llmdistill.objectives.divergences import forward_kl, reverse_kl
from llmdistill.recipe.config import RolloutConfig
from llmdistill.recipe.data_config import DataConfig
from llmdistill.teachers.student import StudentTeacher
from llmdistill.texts import collate
from llmdistill.texts.prompts import PromptEncoder
from llmdistill.texts.sources import Only
from llmdistill.texts.views import in_context, plain
from llmdistill.training.contexts import build_contexts
from tests import tiny
from tests.methods import rounds

CHAT = [{"role": "user", "content": "1+1="}]
OTHER = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1+1? The answer is 2."}]
ROWS: list[dict[str, Any]] = [
    {"prompt": "7*6=", "completion": "42", "hint": "it is 42"},  # text: no template
    {"prompt": CHAT, "completion": "two", "hint": "2"},  # a string, through the template
    {"prompt": CHAT, "completion": "2", "hint": OTHER},  # whole messages in the prompt's place
    {"prompt": "9-9=", "completion": "0 ok", "hint": None},
]


def encoded(template: str = tiny.TEMPLATE, rows: list[dict[str, Any]] = ROWS) -> tuple[Any, list[Any]]:
    tokenizer = tiny.tokenizer(template)
    encode = PromptEncoder(tokenizer, DataConfig(contexts={"told": "hint"}))
    return tokenizer, encode.encode_all(rows, completions=True)


# ---------------------------------------------------------------- what a context is


def test_a_context_goes_through_the_template_of_its_own() -> None:
    tokenizer, prompts = encoded()
    texts = [tokenizer.decode(p.contexts["told"]) if "told" in p.contexts else None for p in prompts]
    assert texts == [
        "7*6=\n\nit is 42",
        "<user>1+1=\n\n2<assistant>",
        "<system>Be brief.<user>What is 1+1? The answer is 2.<assistant>",
        None,
    ]
    assert [tokenizer.decode(p.ids) for p in prompts[:2]] == ["7*6=", "<user>1+1=<assistant>"]


@pytest.mark.parametrize("left", [0, 4])
def test_the_judge_reads_the_same_tokens_in_the_same_order(left: int) -> None:
    """Targets, masks and row counts agree; a hole in the mask stays one; a row without a context keeps its prompt."""
    _, prompts = encoded()
    rollout = collate([p.ids for p in prompts], [p.completion for p in prompts], pad_id=0)
    rollout.completion_mask[0, len(prompts[0].ids)] = False  # a token that the loss leaves out
    rollout = rounds.padded(rollout, left, 2)
    judged, has = in_context(rollout, prompts, "told", 0)
    assert has.tolist() == [True, True, True, False]
    assert judged.token_rows().tolist() == rollout.token_rows().tolist()
    assert judged.row_counts == rollout.row_counts
    assert plain(judged).targets.tolist() == plain(rollout).targets.tolist()
    for b, prompt in enumerate(prompts):
        read = judged.input_ids[b][judged.attention_mask[b]].tolist()
        head = list(prompt.contexts.get("told", prompt.ids))
        assert read == head + list(prompt.completion)


def test_the_first_token_is_in_the_loss_and_the_stop_token_is_too_where_it_is_the_padding() -> None:
    """pad == eos: no label is lost to a mask by id; the judge reads the first generated token as well."""
    _, prompts = encoded()
    closed = [p.completion for p in prompts]
    assert all(c[-1] == 1 for c in closed)
    rollout = collate([p.ids for p in prompts], closed, pad_id=1)
    judged, _ = in_context(rollout, prompts, "told", 1)
    for view in (rollout, judged):
        rows = view.token_rows().split(view.row_counts)
        assert [tuple(r.tolist()) for r in rows] == closed


# ---------------------------------------------------------------- what it comes to


def make(folder: Path, method: Method, student: Any, judge: Any, rows: Any = ROWS, **more: Any) -> DistillationTrainer:
    args = OPDConfig(output_dir=str(folder), max_steps=2, per_device_train_batch_size=4, save_strategy="no")
    return DistillationTrainer(
        student,
        args,
        judge,
        method=method,
        train_dataset=rows,
        processing_class=tiny.tokenizer(),
        data=DataConfig(contexts={"told": "hint"}),
        **more,
    )


def by_hand(student: Any, judge: Any, prompts: list[Any]) -> torch.Tensor:
    """Token mean of KL(S(. | prompt) || T(. | context)) over the rows with a context, one sequence at a time."""
    losses = []
    for p in prompts:
        if "told" not in p.contexts:
            continue
        done = list(p.completion)
        s = student(torch.tensor([p.ids + done])).logits[0][len(p.ids) - 1 : -1].double().log_softmax(-1)
        context = list(p.contexts["told"])
        q = judge(torch.tensor([context + done])).logits[0][len(context) - 1 : -1].double().log_softmax(-1).detach()
        losses.append(rounds.kl(s, q))
    return torch.cat(losses).mean()


LOSS = Method((Term("divergence", reverse_kl, (Ask("teacher", context="told"),)),), {"main": Only("dataset")})


@pytest.mark.parametrize("judge", ["another", "live", "initial", "ema"])
def test_the_loss_is_that_of_two_prompts_and_the_judge_s_has_no_gradient(tmp_path: Path, judge: Any) -> None:
    """A row without a context is in neither sum. Gradients equal those with a frozen copy of the student as judge."""
    student, other = tiny.llama(1), tiny.llama(2)
    frozen = copy.deepcopy(other if judge == "another" else student).requires_grad_(False)
    t = make(tmp_path, LOSS, student, other if judge == "another" else StudentTeacher(judge, 0.9))
    prompts = t.train_dataset
    text = t.draw(prompts)["main"]
    rounds.assert_agree(t, text, student, by_hand(student, frozen, prompts))
    (batch,) = t.batches({"main": text}, 1)
    assert batch.total == sum(len(p.completion) for p in prompts[:3]) < batch.rollout.num_rows


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_sample_without_a_context_counts_in_the_other_terms_only(tmp_path: Path, parts: int) -> None:
    """Each term has its own denominator, also where a micro-batch has no row of one of them."""
    student, other = tiny.llama(1), tiny.llama(2)
    plain_term = Term("plain", forward_kl, (Ask("teacher"),), weight=0.3)
    method = Method((*LOSS.terms, plain_term), {"main": Only("dataset")})
    t = make(tmp_path, method, student, other)
    text = t.draw(t.train_dataset)["main"]
    total, found = rounds.gradients(t, text, parts)
    student.zero_grad()
    rows = [(p.ids, p.completion, None, [0.0] * len(p.completion)) for p in t.train_dataset]
    s, q = torch.cat(rounds.logps(student, rows)), torch.cat(rounds.logps(other, rows)).detach()
    expected = by_hand(student, other, t.train_dataset) + 0.3 * rounds.kl(q, s).mean()
    expected.backward()
    assert total == pytest.approx(float(expected.detach()), rel=1e-5)
    rounds.assert_same(found, {n: p.grad for n, p in student.named_parameters()}, 5e-5)


def test_an_empty_context_and_equal_weights_have_no_loss(tmp_path: Path) -> None:
    rows = [{**row, "hint": [*CHAT]} for row in ROWS[1:3]]  # the very prompt again
    t = make(tmp_path, LOSS, tiny.llama(1), tiny.llama(1), rows)
    loss, found = rounds.gradients(t, t.draw(t.train_dataset)["main"])
    assert abs(loss) < 1e-6 and all(float(g.abs().max()) < 1e-5 for g in found.values())


# ---------------------------------------------------------------- built after the rewards


def test_a_function_is_called_once_a_prompt_with_its_row_its_completions_and_their_rewards() -> None:
    encode = PromptEncoder(tiny.tokenizer(), DataConfig(contexts={"late": "module:function"}))
    rows = [{"prompt": "1+1=", "answer": 2, "n": 1}, {"prompt": CHAT, "answer": 3, "n": 2}]
    prompts = [p for p in encode.encode_all(rows) for _ in range(2)]
    written = [[ord(c) - 33 + 4 for c in text] for text in ("ab", "c", "dd", "e")]
    text = Text(collate([p.ids for p in prompts], written, pad_id=0), prompts, rewards=[0.0, 1.0, 1.0, 0.5])
    calls = []

    def function(row: dict[str, Any], completions: list[str], rewards: list[float] | None) -> list[Any]:
        calls.append((row["n"], completions, rewards))
        return [None, "see " + completions[0]] if row["n"] == 1 else [OTHER, None]

    def decode(rollout: Any, prompts: Any, skip_special_tokens: bool) -> list[str]:
        return ["ab", "c", "dd", "e"]

    built = build_contexts(text, {"late": function}, encode, 2, decode)
    assert calls == [(1, ["ab", "c"], [0.0, 1.0]), (2, ["dd", "e"], [1.0, 0.5])]
    contexts = [encode.tokenizer.decode(p.contexts["late"]) if "late" in p.contexts else None for p in built.prompts]
    assert contexts[1:] == ["1+1=\n\nsee ab", "<system>Be brief.<user>What is 1+1? The answer is 2.<assistant>", None]
    assert contexts[0] is None and built.rewards == text.rewards

    with pytest.raises(UserError, match="data.contexts.late gave 1 contexts for the 2 completions of row 0"):
        build_contexts(text, {"late": lambda *_: ["one"]}, encode, 2, decode)
    with pytest.raises(UserError, match="data.contexts.late ends with an assistant message"):
        answered = [*CHAT, {"role": "assistant", "content": "2"}]
        build_contexts(text, {"late": lambda *_: [answered] * 2}, encode, 2, decode)


def told(row: dict[str, Any], completions: list[str], rewards: list[float] | None) -> list[str | None]:
    return [f"{row['completion']} {len(completions)}" if i % 2 == 0 else None for i, _ in enumerate(completions)]


@pytest.mark.parametrize(("author", "samples"), [("student", 2), ("dataset", 2), ("dataset", 1)])
def test_a_context_of_the_round_is_the_judge_s(tmp_path: Path, author: str, samples: int) -> None:
    """The dataset has one completion of a prompt however many the student would be asked for."""
    t = OPDTrainer(
        tiny.llama(1),
        OPDConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            sequences=author,  # type: ignore[arg-type]
            per_device_train_batch_size=4,
            save_strategy="no",
            rollouts=RolloutConfig(max_new_tokens=4, samples_per_prompt=samples),
        ),
        tiny.llama(2),
        train_dataset=tiny.rows(8),
        processing_class=tiny.tokenizer(),
        data=DataConfig(contexts={"late": "tests.composition.test_contexts:told"}),
        contexts={"teacher": "late"},
    )
    batches, _ = t.get_batch_samples(iter([t.train_dataset[:4]]), 1, torch.device("cpu"))
    prompts = batches[0]["micro_batch"].texts["main"].prompts
    assert len(prompts) == (8 if author == "student" else 4)
    own = 1 if author == "dataset" else samples
    for prompt in prompts:
        if "late" in prompt.contexts:
            row = tiny.rows(8)[prompt.row]
            assert f"\n\n{row['completion']} {own}<assistant>" in t.encode.tokenizer.decode(prompt.contexts["late"])
    assert sum("late" in p.contexts for p in prompts) == 4


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("no.such.module:f", "data.contexts.late is 'no.such.module:f'"),
        ("tests.tiny:nothing", "has no attribute 'nothing'"),
        ("tests.tiny:TEMPLATE", "which is no function"),
    ],
)
def test_a_function_that_is_not_there(tmp_path: Path, where: str, line: str) -> None:
    with pytest.raises(UserError, match="data.contexts.late") as error:
        OPDTrainer(
            tiny.llama(1),
            OPDConfig(output_dir=str(tmp_path)),
            tiny.llama(2),
            train_dataset=tiny.rows(4),
            processing_class=tiny.tokenizer(),
            data=DataConfig(contexts={"late": where}),
            contexts={"teacher": "late"},
        )
    assert line in str(error.value)
