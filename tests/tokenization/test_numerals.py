"""What a token at the end of a numeral says of the next digit: by every tokenizer's own way of cutting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Regex, pre_tokenizers

from llmdistill.tokenization.numerals import NO_DIGIT, NumeralEnds
from llmdistill.tokenization.token_bytes import table_of
from tests.methods import byte_model
from tests.tokenization import vocabularies

SPLITTING = ("smollm2", "qwen", "tekken", "mistral-sp", "mistral-fast", "bytes")


def spelled(tok: Any) -> dict[int, bytes]:
    return {i: bytes(u) for i, u in enumerate(table_of(tok).units) if u and max(u) < 256}


@pytest.mark.parametrize("name", [vocabularies.case(name) for name in SPLITTING])
def test_where_every_digit_is_a_token_no_end_says_anything(name: str) -> None:
    ends = NumeralEnds.of(vocabularies.tokenizer(name))
    assert not ends.closed_V.any()
    assert {int(d) for d in ends.first_V.unique()} == set(range(NO_DIGIT + 1))


def test_of_groups_of_three_only_a_full_one_can_go_on() -> None:
    tok = vocabularies.tokenizer("deepseek")
    ends, numerals = NumeralEnds.of(tok), {i: s for i, s in spelled(tok).items() if s.isdigit()}
    assert sorted({len(s) for s in numerals.values()}) == [1, 2, 3]
    for i, s in numerals.items():
        assert bool(ends.closed_V[i].all()) == (len(s) < 3) and bool(ends.closed_V[i].any()) == (len(s) < 3)
        assert int(ends.first_V[i]) == int(s[:1])
    others = torch.ones(len(ends.closed_V), dtype=torch.bool)
    others[list(numerals)] = False
    assert not ends.closed_V[others].any()


@pytest.mark.parametrize("text", ["1", "12", "2 1", "21 12"])
def test_a_digit_that_a_token_rules_out_changes_how_its_text_is_cut(text: str) -> None:
    """And one that it does not rule out leaves the token where it was."""
    tok = byte_model.digits(2)
    ids = vocabularies.encode(tok, text)
    for digit in "12":
        kept = vocabularies.encode(tok, text + digit)[: len(ids)] == ids
        assert bool(NumeralEnds.of(tok).closed(torch.tensor(ids[-1]))[int(digit)]) == (not kept)


def test_groups_from_the_right_rule_nothing_out() -> None:
    """``1`` before ``234`` is a token that a digit follows: what no one digit keeps, three do."""
    tok = vocabularies.byte_level([f"{a} {b}" for a in "12" for b in "12"])
    pairs = pre_tokenizers.Split(Regex(r"\d{1,2}(?=(\d{2})*(\D|$))"), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pairs, level])
    cut = [tok.convert_ids_to_tokens(i) for i in vocabularies.encode(tok, "12112")]
    assert cut == ["1", "21", "12"]
    assert not NumeralEnds.of(tok).closed_V.any()


def test_what_is_no_id_says_nothing() -> None:
    ends = NumeralEnds.of(byte_model.digits(2))
    ids = torch.tensor([-1, len(ends.first_V), 10**6])
    assert not ends.closed(ids).any() and ends.first_digits(ids).tolist() == [NO_DIGIT] * 3
