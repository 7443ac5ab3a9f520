"""Texts that a tokenizer reads otherwise than they were meant: aligned all the same, or left out with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from llmdistill.recipe.data_config import DataConfig
from llmdistill.texts import collate
from llmdistill.texts.chat import ChatTemplate
from llmdistill.texts.prompts import PromptEncoder
from llmdistill.texts.retokenized import Retokenizer, Shares
from tests.tokenization import vocabularies
from tests.tokenization.test_retokenized import SPACED, STUDENT, THINKING

TEXTS = {
    # what is not seen
    "nul": "a\x00b",
    "byte order mark": "\ufeffok 12",
    "right to left": "\u202eabc\u202c 12",
    "zero width": "a\u200bb\u2060c",
    "tag characters": "\U000e0041\U000e007f x",
    "variation selectors": "✈\ufe0f ✈\ufe0e",
    "noncharacters": "\uffff\ufffe\U0001ffff",
    "replacement character": "a\ufffdb",
    # characters in parts
    "conjoining": "\u1100\u1161\u11a8 각",
    "stacked accents": "Z" + "\u0301" * 60,
    "emoji": "👩\u200d👩\u200d👧\u200d👦" * 50,
    "ligatures": "ﷺ ㍿ ﬀ",
    "case": "İıŞş ẞß",
    "numerals": "1,000,000.5 ١٢٣ １２３ ²³ Ⅷ",
    # words of tokenizers and templates
    "end of the judge": "say </s> now",
    "end of the judge at the end": "say </s>",
    "beginning of the judge": "<s>struck out</s> and <s>again</s>",
    "unknown of the judge": "<unk> x",
    "byte token": "<0x0A> x",
    "turn of another family": "say <|im_end|>\n<|im_start|>user\n now",
    "instruction": "[INST] hi [/INST]",
    "thought": "<think>\na\n</think>\n\nb",
    "unfinished thought": "<think>a",
    "end of a thought": "a</think>b",
    "thoughts within": "<think><think>a</think></think>",
    "alphabet of byte-level tokenizers": "Ġok Ċ",
    "pieces of WordPiece": "##ing ##",
    # spaces
    "spaces": "   ",
    "line ends alone": "\n\n\n",
    "tab": "\t",
    "space behind": "ok ",
    "space before": " ok",
    "spaces before": "  ok",
    "returns": "a\r\nb\rc",
    "other line ends": "a\x85b\u2028c",
    "other spaces": "a\u00a0b\u3000c\u1680d",
    # lengths
    "one word": "a" * 2000,
    "one space": "x" + " " * 500 + "y",
    "nothing": "",
}


def smollm2() -> Any:
    return vocabularies.tokenizer("smollm2")


def mistral() -> Any:
    tok = vocabularies.tokenizer("mistral-fast")
    tok.chat_template = SPACED
    return tok


def reads_bytes() -> Any:
    tok = vocabularies.tokenizer("bytes")
    tok.chat_template = STUDENT.replace("<stop>", "</s>")
    return tok


def thinking() -> Any:
    tok = vocabularies.byte_level(["2 0", "a b"], eos_token="<eos>", unk_token="<unk>")
    tok.add_special_tokens({"additional_special_tokens": ["<end>", "<u>", "<a>"]})
    tok.chat_template = THINKING
    return tok


def words() -> Any:
    tok = vocabularies.wordpiece(["ok", "say", "now", "a", "b", "c", "1", "2"])
    tok.chat_template = STUDENT.replace("<stop>", "")
    return tok


class Pair:
    """A student's answers as a judge reads them."""

    def __init__(self, own: Any, other: Any) -> None:
        self.own = own
        row = {"prompt": [{"role": "user", "content": "Go?"}]}
        self.prompt = PromptEncoder(own, DataConfig(), {"teacher": other})(row)
        self.convert = Retokenizer(own, [own.eos_token_id], other, ChatTemplate(other), pad_id=0)

    def ids(self, text: str) -> list[int]:
        return [*vocabularies.encode(self.own, text), self.own.eos_token_id]

    def shares(self, text: str) -> Shares:
        """Of the answer ``text``, with its end of turn."""
        return self.convert(collate([self.prompt.ids], [self.ids(text)], pad_id=0), [self.prompt], "teacher").shares

    def writes(self, text: str) -> bool:
        """Whether all that the student writes of it before the end is text to the student."""
        none = {self.own.bos_token_id, self.own.eos_token_id, self.own.unk_token_id}
        return not none & set(self.ids(text)[:-1])


MAKE = {"smollm2": smollm2, "mistral": mistral, "bytes": reads_bytes, "thinking": thinking}
PAIRS = [
    *[("smollm2", judge) for judge in ("mistral", "bytes", "thinking")],
    *[(student, "smollm2") for student in ("mistral", "bytes", "thinking")],
    ("thinking", "mistral"),
]


@pytest.mark.parametrize(("student", "judge"), PAIRS)
def test_every_byte_and_the_end_are_in_exact_chunks(student: str, judge: str) -> None:
    """But for names of what is no text to the student itself, as which its tokenizer reads them."""
    pair = Pair(MAKE[student](), MAKE[judge]())
    for name, text in TEXTS.items():
        found = pair.shares(text)
        if pair.writes(text):
            assert found.aligned_bytes == found.bytes and found.aligned_ends == found.ends == 1, (name, found)
            assert found.inexact_sequences == 0 and found.tokens == found.chunk_tokens, (name, found)
        else:
            (reason,) = found.reasons
            known = ("the student's tokens end the turn, or are no text", "the student's tokenizer has no token for")
            assert found.aligned_bytes < found.bytes and reason.startswith(known), (name, found)
    assert sum(not pair.writes(text) for text in TEXTS.values()) == {"smollm2": 1, "thinking": 1}.get(student, 4)


def test_what_a_tokenizer_writes_in_one_way_is_aligned_and_counted() -> None:
    found = Pair(smollm2(), mistral()).shares("▁ok ▁▁ x")  # SentencePiece writes a space so
    assert found.aligned_bytes == found.bytes and found.inexact_sequences == 1


def test_what_the_student_has_no_token_for_is_counted() -> None:
    own = words()
    own.add_special_tokens({"eos_token": "<eos>"})
    found = Pair(own, thinking()).shares("ok 猫 now")
    (reason,) = found.reasons
    assert reason == "the student's tokenizer has no token for what comes after 'ok'"
    assert found.aligned_bytes < found.bytes


LEFT_OUT = {  # of a vocabulary of a few words, without bytes: the character that it has no token for
    "tag characters": "x",
    "variation selectors": "✈",
    "noncharacters": "\uffff",
    "conjoining": "\u1100",
    "emoji": "👩",
    "end of the judge": "<",
    "case": "i",
    "numerals": ",",
    "thought": "<",
    "alphabet of byte-level tokenizers": "g",
    "one word": "a",
}


@pytest.mark.parametrize("student", ["smollm2", "mistral", "bytes"])
def test_a_tokenizer_of_words_drops_what_is_not_seen_and_names_what_it_does_not_know(student: str) -> None:
    pair = Pair(MAKE[student](), words())
    for name in ("nul", "byte order mark", "right to left", "zero width", "replacement character", "returns"):
        found = pair.shares(TEXTS[name])
        assert found.aligned_bytes == found.bytes > 0 and found.inexact_sequences == 1, (name, found)
    for name, character in LEFT_OUT.items():
        if pair.writes(TEXTS[name]):
            found = pair.shares(TEXTS[name])
            (reason,) = found.reasons
            assert found.aligned_bytes == 0 and "\n" not in reason, (name, found)
            assert "the teacher's tokenizer has no token for what comes after" in reason
            assert reason.endswith(f", {character!r}"), (name, reason)
    found = pair.shares(TEXTS["spaces"])  # it reads nothing at all
    assert found.aligned_bytes == 0 < found.bytes and sum(found.reasons.values()) == 1
