"""Another vocabulary for a model: embeddings of what the old tokens spell, and a checkpoint like any other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmdistill.cli import main
from llmdistill.models.transfer import pieces_of, transfer
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
