"""Documents without prompts: windows in which every token but the first is predicted once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmdistill import DistillationTrainer, Method, OPDConfig, OPDTrainer, TAIDConfig, TAIDTrainer, Term
from llmdistill.errors import UserError
from llmdistill.objectives.labels import cross_entropy
from llmdistill.recipe.data_config import DataConfig
from llmdistill.texts.prompts import PromptEncoder, completed
from llmdistill.texts.sources import Only
from tests import tiny
from tests.methods import rounds

TEXTS = ["The quick brown fox jumps over the lazy dog.", "a", "abcdefg", "abcdefgh", "One more line, of middle size."]
ROWS = [{"text": text, "domain": "x" if i % 2 else "y"} for i, text in enumerate(TEXTS)]
DATA = DataConfig(text_column="text", max_text_tokens=8)


@pytest.mark.parametrize("size", [2, 3, 8, 2048])
def test_every_token_but_the_first_is_predicted_once_and_the_eos_closes(size: int) -> None:
    """Sizes at which a document fills its windows exactly, and leaves one token over, included."""
    tokenizer = tiny.tokenizer()
    encode = PromptEncoder(tokenizer, DataConfig(text_column="text", max_text_tokens=size))
    windows = encode.encode_all(ROWS)
    for row, text in enumerate(TEXTS):
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        own = [w for w in windows if w.row == row]
        assert [w.ids[0] for w in own[:1]] == ids[:1]
        assert [i for w in own for i in w.completion] == ids[1:]
        at = 0
        for window in own:
            assert window.ids == [ids[at]] and 1 < 1 + len(window.completion) <= size
            assert window.domain == ("x" if row % 2 else "y")
            at += len(window.completion)
    rollout = completed(windows, 0)
    assert rollout.num_rows == sum(len(t) for t in TEXTS)  # a byte each, and the eos for the first


def test_windows_are_predicted_from_their_own_tokens_only() -> None:
    """What a row's target is, and what stands before it."""
    encode = PromptEncoder(tiny.tokenizer(), DataConfig(text_column="text", max_text_tokens=4))
    found = [(w.ids, list(w.completion)) for w in encode.encode_all([{"text": "abcdef"}])]
    a = tiny.tokenizer()("abcdef")["input_ids"]
    assert found == [([a[0]], a[1:4]), ([a[3]], [a[4], a[5], 1])]


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([{"text": "ab"}, {"text": " "}], "row 1: text is empty. Fix: --data.text_column NAME"),
        ([{"text": "ab"}, {"text": None}], "row 1: text is empty"),
        ([{"other": "ab"}], "row 0: text is empty"),
    ],
)
def test_bad_rows(rows: list[dict[str, Any]], line: str) -> None:
    with pytest.raises(UserError) as error:
        PromptEncoder(tiny.tokenizer(), DATA).encode_all(rows)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_settings() -> None:
    for given, line in (
        ({"max_text_tokens": 1}, "data.max_text_tokens is 1"),
        ({"contexts": {"a": "b"}}, "a document"),
    ):
        with pytest.raises(UserError, match=line):
            DataConfig(**{"text_column": "text", **given})  # type: ignore[arg-type]


def args(config: Any, folder: Path, **more: Any) -> Any:
    shared = dict(max_steps=2, per_device_train_batch_size=3, save_strategy="no", logging_steps=1, learning_rate=1e-3)
    return config(output_dir=str(folder), **{**shared, **more})


@pytest.mark.parametrize("which", ["taid", "kl", "ce"])
def test_methods_train_on_them(tmp_path: Path, which: str) -> None:
    """TAID and KL against a teacher, cross-entropy without one: loss and gradients over the windows by hand."""
    student, more = tiny.llama(1), {"train_dataset": ROWS, "processing_class": tiny.tokenizer(), "data": DATA}
    if which == "taid":
        t: Any = TAIDTrainer(student, args(TAIDConfig, tmp_path), tiny.llama(2), **more)
    elif which == "kl":
        config = args(OPDConfig, tmp_path, sequences="dataset", divergence="forward_kl")
        t = OPDTrainer(student, config, tiny.llama(2), **more)
    else:
        method = Method((Term("ce", cross_entropy, (), ("tokens",)),), {"main": Only("dataset")})
        t = DistillationTrainer(student, args(OPDConfig, tmp_path), method=method, **more)
    windows = t.train_dataset
    rows = [(w.ids, w.completion, None, [0.0] * len(w.completion)) for w in windows]
    s, q = torch.cat(rounds.logps(student, rows)), torch.cat(rounds.logps(tiny.llama(2), rows)).detach()
    if which == "ce":
        losses = -rounds.pick(s, torch.cat(rounds.tokens(rows)))
    elif which == "kl":
        losses = rounds.kl(q, s)
    else:  # softmax of .6 of the student's logits and .4 of the teacher's
        mixed = 0.6 * torch.cat(rounds.logits(student, rows)) + 0.4 * torch.cat(rounds.logits(tiny.llama(2), rows))
        losses = rounds.kl(mixed.detach().log_softmax(-1), s)
    rounds.assert_agree(t, t.draw(windows)["main"], student, losses.mean())
    t.train()
    assert len([x for x in t.state.log_history if "loss" in x]) == 2


def test_a_document_is_not_answered(tmp_path: Path) -> None:
    more: dict[str, Any] = {"train_dataset": ROWS, "processing_class": tiny.tokenizer(), "data": DATA}
    with pytest.raises(UserError, match="trains on text of student: a document has no prompt to be answered. Fix: "):
        OPDTrainer(tiny.llama(1), args(OPDConfig, tmp_path), tiny.llama(2), **more)


def test_held_out_documents_are_measured_as_they_stand(tmp_path: Path) -> None:
    more: dict[str, Any] = {"train_dataset": ROWS[1:], "eval_dataset": ROWS[:1], "processing_class": tiny.tokenizer()}
    student = tiny.llama(1)
    t = OPDTrainer(student, args(OPDConfig, tmp_path, sequences="dataset"), tiny.llama(2), data=DATA, **more)
    found = t.evaluate()
    rows = [(w.ids, w.completion, None, [0.0] * len(w.completion)) for w in t.eval_dataset or []]
    s, q = torch.cat(rounds.logps(student, rows)), torch.cat(rounds.logps(tiny.llama(2), rows))
    assert found["eval_dataset/reverse_kl"] == pytest.approx(float(rounds.kl(s, q).mean().detach()), rel=1e-4)
    assert found["eval_loss"] == found["eval_dataset/forward_kl"] and "eval_student/reverse_kl" not in found


def test_from_a_recipe(command: list[str], tmp_path: Path) -> None:
    import json

    from llmdistill.opd import main

    file = tmp_path / "documents.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["--data.train", str(file), "--data.text_column", "text", "--data.max_text_tokens", "8"]
    assert main([*command, *words, "--sequences", "dataset"]) == 0
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "loss" in x] == [1, 2]
