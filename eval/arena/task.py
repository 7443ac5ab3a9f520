"""The arena's task: additions and subtractions of whole numbers with every column written out.

    417+385=   ->   7+5+0=12;1+8+1=10;4+3+1=08;802

Column by column from the right: the two digits, the carry that came in, then the carry that goes out and the digit that
stays; last the answer. In subtractions (the larger number first) the carry is a borrow. A character is a token (across
tokenizers: on one side), so a
model of some ten thousand weights can learn it, and the exact answer is known: no verdict is ever in doubt.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHARACTERS = "0123456789+-=;"
PAD, EOS = "<pad>", "<eos>"
OPERATIONS = ("+", "-")
DIGITS = 3
HELDOUT_SEED = 20_260_101


@dataclass(frozen=True)
class Problem:
    """``a`` and ``b`` have equally many digits; for ``-`` a is not below b."""

    a: int
    b: int
    operation: str = "+"

    @property
    def answer(self) -> int:
        return self.a + self.b if self.operation == "+" else self.a - self.b

    @property
    def prompt(self) -> str:
        return f"{self.a}{self.operation}{self.b}="

    @property
    def completion(self) -> str:
        """The columns and the answer."""
        sign = self.operation
        columns, carry = [], 0
        for x, y in zip(reversed(str(self.a)), reversed(str(self.b)), strict=True):
            if sign == "+":
                out, digit = divmod(int(x) + int(y) + carry, 10)
            else:
                out, digit = divmod(int(x) - int(y) - carry, 10)
                out = -out
            columns.append(f"{x}{sign}{y}{sign}{carry}={out}{digit};")
            carry = out
        return "".join(columns) + str(self.answer)

    def solved_by(self, text: str) -> bool:
        """Whether ``text`` ends in the answer. The columns are not judged: exact match is about the answer."""
        return text.rpartition(";")[2] == str(self.answer)

    def row(self, completion: str | None = None) -> dict[str, str]:
        """A dataset row; its domain is the operation. ``completion`` replaces the true one."""
        return {
            "prompt": self.prompt,
            "completion": self.completion if completion is None else completion,
            "domain": self.operation,
        }


def longest(digits: int = DIGITS) -> int:
    """Tokens of the longest completion, its end token included."""
    return 9 * digits + digits + 2


def draw(rng: random.Random, operations: Sequence[str] = ("+",), digits: int = DIGITS) -> Problem:
    low, high = 10 ** (digits - 1), 10**digits - 1
    a, b = rng.randint(low, high), rng.randint(low, high)
    operation = rng.choice(list(operations))
    return Problem(max(a, b), min(a, b), "-") if operation == "-" else Problem(a, b, "+")


def heldout(n: int, operations: Sequence[str] = ("+",), digits: int = DIGITS) -> list[Problem]:
    """The first ``n`` problems that nobody trains on; the same in every call."""
    return _distinct(random.Random(HELDOUT_SEED), n, operations, digits, frozenset())


# More than any cell is scored on. Two sets: a model trained on one operation must not meet the other's either.
RESERVED = 2000


def problems(n: int, seed: int, operations: Sequence[str] = ("+",), digits: int = DIGITS) -> list[Problem]:
    """``n`` different problems to train on, none of them held out."""
    kept_apart = frozenset(p for ops in {tuple(operations), ("+",), ("-",)} for p in heldout(RESERVED, ops, digits))
    return _distinct(random.Random(seed), n, operations, digits, kept_apart)


def _distinct(
    rng: random.Random, n: int, operations: Sequence[str], digits: int, excluded: frozenset[Problem]
) -> list[Problem]:
    found: dict[Problem, None] = {}
    while len(found) < n:
        problem = draw(rng, operations, digits)
        if problem not in excluded:
            found[problem] = None
    return list(found)


def tokenizer(group: int = 1) -> PreTrainedTokenizerFast:
    """One id per character after <pad> (0) and <eos> (1); then one for every numeral of 2 to ``group`` digits.

    Longer numerals are taken apart from the left, as many vocabularies do: at 2, 417 is 41 and 7.
    """
    groups = ["".join(digits) for n in range(2, group + 1) for digits in product("0123456789", repeat=n)]
    vocab = {token: i for i, token in enumerate([PAD, EOS, *CHARACTERS, *groups])}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[(g[:-1], g[-1]) for g in groups]))
    split = pre_tokenizers.Split(Regex(rf"\d{{1,{group}}}|\D"), "isolated")
    # Every character is its own byte; the byte level says what tokens spell to whoever aligns two vocabularies.
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tok.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token=PAD, eos_token=EOS)


VOCABULARY = 2 + len(CHARACTERS)
GROUP = 2  # digits of the longest token where numerals are taken in groups
