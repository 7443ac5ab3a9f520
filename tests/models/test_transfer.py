"""Another vocabulary for a model: embeddings of what the old tokens spell, and a checkpoint like any other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer

from llmdistill.cli import main
from llmdistill.cross_tokenizer import CrossTokenizerConfig, CrossTokenizerTrainer
from llmdistill.models.transfer import pieces_of, transfer
from llmdistill.opd import OPDConfig, OPDTrainer
from llmdistill.recipe.config import RolloutConfig
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.mixture import EnsembleTeacher
from llmdistill.texts.prompts import completed
from llmdistill.tokenization.token_bytes import table_of
from tests import tiny
from tests.tokenization import vocabularies

NEW = ["o k", "Ġ ok", "1 2", "a d", "ad d"]


def model(tied: bool = True) -> Any:
    return tiny.llama(1, tied=tied, attention_bias=False)


@pytest.mark.parametrize("tied", [True, False])
def test_every_token_is_the_mean_of_what_spells_it(tied: bool) -> None:
    old, new, student = tiny.tokenizer(), vocabularies.byte_level(NEW, eos_token="</s>"), model(tied)
    before = [copy.deepcopy(m.weight) for m in (student.get_input_embeddings(), student.get_output_embeddings())]
    found = transfer(student, old, new)
    vocabulary, own = new.get_vocab(), old.get_vocab()
    after = [m.weight for m in (student.get_input_embeddings(), student.get_output_embeddings())]
    assert (after[0] is after[1]) == tied and after[0].shape[0] == len(new) == student.config.vocab_size
    for was, now in zip(before, after, strict=True):
        assert torch.equal(now[vocabulary["q"]], was[own["q"]])
        for token, pieces in (("add", "add"), ("Ġok", "Ġok"), ("12", "12")):
            mean = torch.stack([was[own[c]] for c in pieces]).mean(0)
            torch.testing.assert_close(now[vocabulary[token]], mean)
        assert torch.equal(now[vocabulary["<user>"]], was[own["<user>"]])  # the template writes it
    assert found.kept >= 256 and found.averaged == len(NEW) + 1 and found.unknown == 0


def test_a_piece_counts_by_its_bytes() -> None:
    old, new = vocabularies.byte_level(["o k"], eos_token="</s>"), vocabularies.byte_level(["o k", "ok q"])
    student = tiny.llama(1, vocab=len(old))
    was = student.get_input_embeddings().weight.clone()
    transfer(student, old, new)
    own, vocabulary = old.get_vocab(), new.get_vocab()
    expected = (2 * was[own["ok"]] + was[own["q"]]) / 3  # okq: two bytes and one
    torch.testing.assert_close(student.get_input_embeddings().weight[vocabulary["okq"]], expected)


def test_the_template_and_the_ends_stay_the_models() -> None:
    old, new, student = tiny.tokenizer(), vocabularies.byte_level(NEW, eos_token="</s>"), model()
    student.generation_config.eos_token_id = [1, 3]
    transfer(student, old, new)
    chat = [{"role": "user", "content": "add 12"}]
    text = new.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == old.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = new(text, add_special_tokens=False)["input_ids"]
    assert new.convert_ids_to_tokens(ids) == ["<user>", "add", "Ġ", "12", "<assistant>"]
    assert student.config.eos_token_id == new.eos_token_id == new.convert_tokens_to_ids("<eos>")
    assert student.generation_config.eos_token_id == [new.eos_token_id, new.convert_tokens_to_ids("<assistant>")]


@pytest.mark.parametrize("written", [{}, {"bos_token": "<s>", "pad_token": "<nothing>"}], ids=["no bos", "its own bos"])
def test_configs_name_the_new_tokenizers_own_special_tokens(tmp_path: Path, written: dict[str, str]) -> None:
    """After loading too: ids of the old vocabulary are other tokens in the new one, or past its end."""
    old, student = tiny.tokenizer(), model()
    old.bos_token = "<user>"  # as some have it: the new tokenizer has this token too, and begins with another or none
    student.config.bos_token_id = student.generation_config.bos_token_id = old.bos_token_id
    student.generation_config.suppress_tokens = [old.bos_token_id, old.get_vocab()["q"], 263]
    new = vocabularies.byte_level(NEW, eos_token="</s>", **written)
    transfer(student, old, new)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert new.bos_token == written.get("bos_token") and new.pad_token == "<pad>"
    for config in (student.config, student.generation_config, loaded.config, loaded.generation_config):
        assert config.bos_token_id == (None if new.bos_token is None else new.get_vocab()["<s>"])
        assert config.pad_token_id == new.get_vocab()["<pad>"]
        assert config.eos_token_id == new.get_vocab()["<eos>"]
    named = [new.get_vocab()[t] for t in ("<user>", "q")]
    assert loaded.generation_config.suppress_tokens == named


def test_a_tokenizer_without_an_end_leaves_none_in_the_configs() -> None:
    old, new, student = tiny.tokenizer(template=None), vocabularies.byte_level(NEW), model()
    transfer(student, old, new)
    ids = [getattr(student.config, f"{name}_token_id") for name in ("bos", "eos", "pad")]
    assert ids == [None, None, None] == [new.bos_token_id, new.eos_token_id, new.pad_token_id]


@pytest.mark.slow
def test_real_vocabularies_spell_each_other() -> None:
    new, old = vocabularies.tokenizer("smollm2"), vocabularies.tokenizer("mistral-fast")
    tables = table_of(new), table_of(old)
    pieces = pieces_of(tables[0], old, tables[1])
    wrong = [
        i
        for i, (ids, units) in enumerate(zip(pieces, tables[0].units, strict=True))
        if units and units[0] < 256 and tuple(u for j in ids for u in tables[1].units[j]) not in (units, (32, *units))
    ]
    assert not wrong and sum(len(ids) == 1 for ids in pieces) > 21_000  # METHODS-2026 9.3.1: 21,754 are shared


def test_the_command_writes_a_checkpoint_that_is_read_like_any_other(tmp_path: Path, capsys: Any) -> None:
    model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    vocabularies.byte_level(NEW, eos_token="</s>").save_pretrained(tmp_path / "tokenizer")
    words = ["transfer", "--model", str(tmp_path / "model"), "--tokenizer", str(tmp_path / "tokenizer")]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    assert "6 averaged, 0 unknown" in capsys.readouterr().out
    tok, student = (
        AutoTokenizer.from_pretrained(tmp_path / "out"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
    )
    text = tok.apply_chat_template([{"role": "user", "content": "ok"}], tokenize=False, add_generation_prompt=True)
    ids = tok(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert student.generate(ids, max_new_tokens=3, do_sample=False).shape[1] >= ids.shape[1] + 1
    assert main([*words[:-1], str(tmp_path / "nothing"), "--out", str(tmp_path / "b")]) == 2
    assert "--tokenizer" in capsys.readouterr().err


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    shared = {"output_dir": str(folder / "run"), "save_strategy": "no", "per_device_train_batch_size": 8}
    return {**shared, "logging_steps": 1, "rollouts": RolloutConfig(max_new_tokens=4), **more}


def test_a_model_that_reads_bytes_learns_back_what_it_was(tmp_path: Path) -> None:
    """Tokenizer transfer to bytes, end to end: every chunk is one of the old tokens, spelt out."""
    old = vocabularies.byte_level(["o k", "Ġ ok", "1 2", "a d", "ad d"], eos_token="<eos>", pad_token="<pad>")
    old.chat_template = tiny.TEMPLATE
    old.add_special_tokens({"additional_special_tokens": tiny.SPECIAL[2:]})
    former, student, new = tiny.llama(2, vocab=len(old)), tiny.llama(2, vocab=len(old)), ByT5Tokenizer(extra_ids=0)
    found = transfer(student, old, new)
    assert found.unknown <= 1 and student.config.vocab_size == len(new)
    args = CrossTokenizerConfig(**settings(tmp_path, max_steps=40, learning_rate=3e-3, debias=False))
    rows = tiny.rows(16)
    trainer = CrossTokenizerTrainer(
        student, args, LocalTeacher(former, old), processing_class=new, train_dataset=rows, eval_dataset=rows
    )
    before = trainer.evaluate()["eval_dataset/forward_kl"]
    trainer.train()
    assert abs(trainer.evaluate()["eval_dataset/forward_kl"]) < 0.2 * before
    for part in (trainer.model, new):
        part.save_pretrained(tmp_path / "bytes")
    tok = AutoTokenizer.from_pretrained(tmp_path / "bytes")
    text = "add é 12 ok"
    assert tok(text, add_special_tokens=False)["input_ids"] == new(text, add_special_tokens=False)["input_ids"]
    assert tok.apply_chat_template(rows[0]["prompt"], tokenize=False) == old.apply_chat_template(
        rows[0]["prompt"], tokenize=False
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "bytes")
    ids = torch.tensor([tok(text)["input_ids"]])
    assert torch.equal(loaded(ids).logits, trainer.model(ids).logits)


def test_transferred_models_of_two_families_judge_together(tmp_path: Path) -> None:
    """Models that shared no vocabulary have one after the transfer: an ensemble averages their probabilities."""
    families = [
        vocabularies.byte_level(merges, eos_token="<eos>", pad_token="<pad>") for merges in (["o k"], ["a d", "ad d"])
    ]
    members, shared = [], tiny.tokenizer()
    for k, tok in enumerate(families):
        member, own = tiny.llama(3 + k, vocab=len(tok)), tiny.tokenizer()
        tok.chat_template = tiny.TEMPLATE
        tok.add_special_tokens({"additional_special_tokens": tiny.SPECIAL[2:]})
        member.resize_token_embeddings(len(tok), mean_resizing=False)
        transfer(member, tok, own)
        members.append(LocalTeacher(member, own))
    student = tiny.llama(1, vocab=len(shared))
    ensemble = EnsembleTeacher([(members[0], 1.0), (members[1], 3.0)], names=["a", "b"])
    args = OPDConfig(**settings(tmp_path, max_steps=1))
    trainer = OPDTrainer(student, args, ensemble, processing_class=shared, train_dataset=tiny.rows(8))
    text = completed(trainer.encode.encode_all(tiny.rows(4), completions=True), 0)
    (row,) = ensemble.dense(text).chunk(slice(0, 1), None)
    at = int(text.completion_mask[0].int().argmax()) - 1
    by_hand = sum(
        weight * m.model(text.input_ids[:1]).logits[0, at].softmax(-1)
        for weight, m in zip((0.25, 0.75), members, strict=True)
    )
    torch.testing.assert_close(row[0].softmax(-1), by_hand, rtol=1e-4, atol=1e-6)
    trainer.train()
    assert trainer.state.log_history[0]["distill/reverse_kl"] > 0
