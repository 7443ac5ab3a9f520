"""Alignment of two tokenizations: chunks that spell the same bytes, the smallest there are, for every family."""

from __future__ import annotations

import json
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from llmdistill.errors import UserError
from llmdistill.tokenization.align import Spelling, align, align_chunks, spell
from llmdistill.tokenization.token_bytes import END, table_of
from tests.tokenization import vocabularies
from tests.tokenization.vocabularies import REAL, case, encode

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/tokenizer_stats.json").read_text())
PAIRS = [case(*pair.split("|")) for pair in GOLDEN["pairs"]]

# Every kind of text that one family or another treats in a way of its own.
TEXTS = {
    "planes": "a é ߷ ก 知 𝔘 🦊 \U000e0001 \U0010ffff \x00 \x7f",
    "joiners": "👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇯🇵 1️⃣",
    "combining": "e\u0301 n\u0303 क्षि ᄒ\u1161\u11ab Z\u0351\u036b",
    "line ends": "a\r\nb\n\n\nc\r\n\r\n d\u2028e",
    "spaces": "x    y\t\t z \u00a0\u3000 end   ",
    "leading": "\n  indented",
    "code": "def f(x):\n\treturn x**2  # 知识\n\n\n    pass",
    "numerals": "2024 + 31415 = 1234567, 007; 3.14e-10",
    "compatibility": "ﬁne ½ Ａ ℵ ①",
    "empty": "",
}


def raw(tok: Any, ids: Any) -> bytes:
    return spell(ids, table_of(tok)).units.astype(np.uint8).tobytes()


def check(student: Spelling, teacher: Spelling) -> None:
    """Chunks partition both sides, spell the same, and none could be split."""
    result = align(student, teacher)
    chunks = result.slices()
    for k, side in enumerate((student, teacher)):
        assert [i for chunk in chunks for i in range(chunk[k].start, chunk[k].stop)] == list(range(len(side.ends)))
    at = 0
    for own, other in chunks:
        ends = [set(side.ends[part].tolist()) for side, part in ((student, own), (teacher, other))]
        stop = int(student.ends[own.stop - 1])
        assert stop == int(teacher.ends[other.stop - 1])
        assert np.array_equal(student.units[at // 2 : stop // 2], teacher.units[at // 2 : stop // 2])
        assert ends[0] & ends[1] - {at} == {stop}  # no smaller one ends within
        at = stop


# ---------------------------------------------------------------- properties, over any split of any bytes


@st.composite
def splits(draw: Any) -> tuple[Spelling, Spelling]:
    units = np.asarray(draw(st.lists(st.integers(0, 255) | st.just(END), max_size=40)), dtype=np.int32)
    sides = []
    for _ in range(2):
        cuts = sorted(draw(st.lists(st.integers(0, len(units)), max_size=30)))  # twice the same: a token of nothing
        ends = [*cuts, len(units)] if len(units) else []
        sides.append(Spelling(units, 2 * np.asarray(ends, dtype=np.int64)))
    return sides[0], sides[1]


@given(splits())
@settings(max_examples=300, deadline=None)
def test_chunks_partition_both_sides_agree_and_are_the_smallest(pair: tuple[Spelling, Spelling]) -> None:
    check(*pair)


@pytest.mark.slow
@given(st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_real_vocabularies_on_any_text(text: str) -> None:
    for pair in (("smollm2", "mistral-sp"), ("deepseek", "bytes"), ("tekken", "mistral-fast")):
        toks = [vocabularies.tokenizer(name) for name in pair]
        ids = [encode(tok, text) for tok in toks]
        sides = [spell(i, table_of(tok)) for i, tok in zip(ids, toks, strict=True)]
        if lost := [raw(tok, i) for tok, i in zip(toks, ids, strict=True) if raw(tok, i) != text.encode()]:
            # SentencePiece takes its own sign for a space, its fast form a space in front away, and SmolLM2's
            # vocabulary lacks 21 bytes: control characters, and what characters past the third plane begin with.
            lacking = any(table_of(tok).byte_ids[b] is None for tok in toks for b in text.encode())
            assert "▁" in text or text[0] == " " or lacking
            assert align(*sides).exact == (len(lost) == 2 and lost[0] == lost[1])
        else:
            check(*sides)


# ---------------------------------------------------------------- the families


@pytest.mark.parametrize("name", map(case, REAL))
def test_tokens_spell_the_text(name: str) -> None:
    tok = vocabularies.tokenizer(name)
    for text in TEXTS.values():
        assert raw(tok, encode(tok, text)) == text.encode()


@pytest.mark.parametrize("pair", [case(*pair) for pair in combinations(REAL, 2)])
def test_every_pair_on_every_kind_of_text(pair: tuple[str, str]) -> None:
    tables = [table_of(vocabularies.tokenizer(name)) for name in pair]
    for text in TEXTS.values():
        sides = [spell(encode(vocabularies.tokenizer(n), text), t) for n, t in zip(pair, tables, strict=True)]
        assert align(*sides).exact
        check(*sides)


@pytest.mark.parametrize("pair", PAIRS)
def test_statistics_of_real_pairs(pair: tuple[str, str]) -> None:
    """Tokens, chunks and one-to-one chunks on 40 lines of many scripts, as an independent count has them."""
    for kind, expected in GOLDEN["pairs"]["|".join(pair)].items():
        tokens, chunks, single = [0, 0], 0, 0
        for line in GOLDEN["lines"][kind]:
            toks = [vocabularies.tokenizer(name) for name in pair]
            ids = [encode(tok, line) for tok in toks]
            found = align_chunks(ids[0], ids[1], *toks)
            tokens = [n + len(i) for n, i in zip(tokens, ids, strict=True)]
            chunks += len(found)
            single += sum(a.stop - a.start == b.stop - b.start == 1 for a, b in found)
        assert [*tokens, chunks] == [expected[k] for k in ("tokens_a", "tokens_b", "chunks")]
        assert single == pytest.approx(expected["one_to_one_share_of_chunks"] * chunks, abs=0.01)


@pytest.mark.parametrize("pair", PAIRS)
def test_shared_tokens_are_those_of_the_same_bytes(pair: tuple[str, str]) -> None:
    a, b = (table_of(vocabularies.tokenizer(name)) for name in pair)
    own, other = a.shared(b)
    assert all(a.units[i] == b.units[j] for i, j in zip(own[::97], other[::97], strict=True))
    # The count leaves special tokens out: at most as many more as there are of them
    assert 0 <= len(own) - GOLDEN["shared_bytes"]["|".join(pair)] <= 60


@pytest.mark.parametrize("student", map(case, ["smollm2", "qwen", "tekken", "mistral-sp"]))
@pytest.mark.parametrize("text", ["20", "201", "2024", "31415", "1234567"])
def test_digits_against_groups_of_digits(student: str, text: str) -> None:
    """DeepSeek has groups of three from the left, the others a token for each digit: a chunk is a group."""
    toks = vocabularies.tokenizer(student), vocabularies.tokenizer("deepseek")
    ids = [encode(tok, f"= {text}") for tok in toks]
    sides = [spell(i, table_of(tok)) for i, tok in zip(ids, toks, strict=True)]
    groups = [text[i : i + 3] for i in range(0, len(text), 3)]
    pieces = []
    for own, other in align(*sides).slices():
        assert raw(toks[0], ids[0][own]).strip() == raw(toks[1], ids[1][other]).strip() or own.start == 0
        pieces.append(raw(toks[1], ids[1][other]).decode().strip())
    assert pieces[-len(groups) :] == groups


def test_bytes_that_are_no_text() -> None:
    """A student that stops in the middle of a character: its ids are aligned as they stand, never decoded."""
    a, b = vocabularies.tokenizer("smollm2"), vocabularies.tokenizer("bytes")
    ids = encode(a, "🦊")[:-1]
    assert raw(a, ids) == "🦊".encode()[:-1]
    teacher = [byte + 3 for byte in raw(a, ids)]
    assert align_chunks(ids, teacher, a, b)[-1][1].stop == len(teacher)


def test_wordpiece_is_aligned_on_what_it_keeps() -> None:
    a, b = vocabularies.byte_level(["c a", "ca t"]), vocabularies.wordpiece(["the", "cat", "cafe"])
    ids = encode(a, "The  cat,\ncafé"), encode(b, "The  cat cafe")
    sides = spell(ids[0], table_of(a)), spell(ids[1], table_of(b))
    assert align(*sides).aligned is False  # the comma
    ids = encode(a, "The  cat\ncafé"), encode(b, "The  cat\ncafé")
    sides = spell(ids[0], table_of(a)), spell(ids[1], table_of(b))
    found = align(*sides)
    assert not found.exact and found.aligned
    words = [raw(b, ids[1][other]).decode().strip() for _, other in found.slices()]
    assert words == ["the", "cat", "cafe"]
    assert [raw(a, ids[0][own]).decode().strip() for own, _ in found.slices()] == ["The", "cat", "café"]


def test_composed_and_lower_cased_text_is_aligned_on_a_form_of_both() -> None:
    plain = vocabularies.byte_level()
    folding = vocabularies.byte_level(normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]))
    text = "Ａé e\u0301 ½X"
    sides = [spell(encode(t, text), table_of(t)) for t in (plain, folding)]
    found = align(*sides)
    assert not found.exact and "the student's tokens spell 'Ａé" in found.reason
    assert [int(side.ends[-1]) // 2 for side in sides] != [len(found.slices())] * 2
    for own, other in found.slices():  # a character is a chunk, however many bytes either side has for it
        assert own.stop > own.start and other.stop > other.start
    assert len(found.slices()) == len("Aée1⁄2X") - 2  # ½ is three characters to one side, and one chunk


def test_texts_that_differ_are_not_aligned_and_the_message_says_where() -> None:
    a, b = vocabularies.tokenizer("smollm2"), vocabularies.tokenizer("bytes")
    found = align(spell(encode(a, "it is 12"), table_of(a)), spell(encode(b, "it is 13"), table_of(b)))
    assert not found.aligned and found.slices() == []
    assert "the student's tokens spell '2', the teacher's '3'" in found.reason


def test_a_character_without_a_token_is_named() -> None:
    a, b = vocabularies.tokenizer("smollm2"), vocabularies.wordpiece(["the", "cat"])
    found = align(spell(encode(a, "the 猫"), table_of(a)), spell(encode(b, "the 猫"), table_of(b)))
    assert not found.aligned and "the teacher's tokenizer has no token for what comes after" in found.reason


def test_ends_of_turn_go_together_whatever_they_are_written_like() -> None:
    a, b = vocabularies.byte_level(eos_token="<end>"), vocabularies.tokenizer("mistral-sp")
    ids = [*encode(a, "ok"), a.eos_token_id], [*encode(b, "ok"), b.eos_token_id]
    found = align_chunks(*ids, a, b)
    assert found[-1] == (slice(len(ids[0]) - 1, len(ids[0])), slice(len(ids[1]) - 1, len(ids[1])))
    assert align_chunks(ids[0], ids[1][:-1], a, b) == []  # one has ended, and the other has not


def test_a_tokenizer_of_no_known_family_is_refused() -> None:
    class Other:
        name_or_path, unk_token_id, bos_token_id, eos_token_id, all_special_ids = "other", None, None, None, ()

        def __len__(self) -> int:
            return 1

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    with pytest.raises(UserError, match="neither byte-level BPE, SentencePiece, WordPiece nor bytes"):
        table_of(Other())  # type: ignore[arg-type]


# ---------------------------------------------------------------- cost


def test_time_is_linear_in_the_tokens() -> None:
    """32k tokens take well under a second, and four times as many about four times as long (measured: 3 and 12 ms)."""
    a, b = vocabularies.tokenizer("smollm2"), vocabularies.tokenizer("bytes")
    line = TEXTS["code"] + TEXTS["numerals"]
    tables = table_of(a), table_of(b)
    align(*(spell(encode(t, line), table) for t, table in zip((a, b), tables, strict=True)))  # tables are made once
    taken = []
    for factor in (1, 4):
        repeated = encode(a, line) * (32_000 * factor // len(encode(a, line))), encode(b, line)
        other = repeated[1] * (len(repeated[0]) // len(encode(a, line)))
        best = min(_seconds(repeated[0], other, tables) for _ in range(3))
        taken.append(best)
    assert taken[0] < 0.5 and taken[1] < 12 * taken[0]


def _seconds(own: list[int], other: list[int], tables: Any) -> float:
    start = time.process_time()
    assert align(spell(own, tables[0]), spell(other, tables[1])).exact
    return time.process_time() - start
