"""Do two tokenizers mean the same by an id? Compared id by id: sizes and fingerprints say too little or too much."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

# Digits, accents, another script, runs of blanks and code: where splitting rules of one family differ.
SPLIT_PROBE = "The 3 cats' naïve 12345+678 = 12 023?  def f(x):\n\treturn x  # 知识\n\n"


@dataclass(frozen=True)
class Comparison:
    """How two tokenizers differ over the ids that both have (0 up to the smaller one's last)."""

    shared: int  # length of that prefix of ids
    differing: list[tuple[int, str | None, str | None]]  # id, the student's token, the teacher's
    special: list[tuple[int, str]]  # id and token where only one side treats it as special
    student_only: int  # tokens past the shared ids
    teacher_only: int
    same_splits: bool  # a probe text becomes the same ids

    @property
    def alike(self) -> bool:
        """Every id of either is the same token to the other, and a text becomes the same ids."""
        return not (self.differing or self.student_only or self.teacher_only) and self.same_splits


def compare_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> Comparison:
    """Compares token strings and special marks id by id."""
    student_tokens, teacher_tokens = tokens_by_id(student), tokens_by_id(teacher)
    shared = min(len(student_tokens), len(teacher_tokens))
    pairs = zip(student_tokens[:shared], teacher_tokens[:shared], strict=True)
    differing = [(i, s, t) for i, (s, t) in enumerate(pairs) if s != t]
    one_sided = sorted(special_ids(student) ^ special_ids(teacher))
    return Comparison(
        shared,
        differing,
        [(i, str(student_tokens[i])) for i in one_sided if i < shared],
        sum(t is not None for t in student_tokens[shared:]),
        sum(t is not None for t in teacher_tokens[shared:]),
        encode(student, SPLIT_PROBE) == encode(teacher, SPLIT_PROBE),
    )


def tokens_by_id(tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    """Token strings in id order, None in gaps; the length is the last id plus one."""
    vocabulary = tokenizer.get_vocab()
    tokens: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for token, i in vocabulary.items():
        tokens[i] = token
    return tokens


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that decoding may leave out."""
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text without the special tokens a tokenizer puts around it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
