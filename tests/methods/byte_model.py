"""One model of bytes, and what it makes of the tokens of any tokenizer: the acceptance test of methods across families.

Over all texts of a few symbols and of one length: P(next token | tokens so far) is the share of the texts whose
tokenization goes on so, among those whose tokenization begins so. Two tokenizers' tables then say the same of every
text (METHODS-2026 9.3.7).
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from tokenizers import Regex, pre_tokenizers
from torch import Tensor

from llmdistill.objectives.rows import LogitRows
from llmdistill.teachers.local import LocalTeacher
from llmdistill.texts import Rollout
from tests import tiny
from tests.tokenization import vocabularies

SYMBOLS, LENGTH = "12 ", 5
IMPOSSIBLE = -1e4  # the logit of a token that cannot come


def digits(most: int) -> Any:
    """A byte-level tokenizer that cuts numerals into groups of so many digits, from the left."""
    pairs = [f"{a} {b}" for a in "12" for b in "12"] if most == 2 else []
    tok = vocabularies.byte_level(pairs, eos_token="<end>", pad_token="<p>")
    split = pre_tokenizers.Split(Regex(rf"\p{{N}}{{1,{most}}}"), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])  # type: ignore[assignment]
    return tok


def texts(even: bool = True) -> dict[str, float]:
    """Texts and their probabilities under a Markov chain; ``even``: only those whose numerals have two digits or four.

    A token of a single digit tells the grouping model that no digit follows, which is in no byte so far.
    """
    generator = torch.Generator().manual_seed(0)
    chain = torch.rand(len(SYMBOLS), len(SYMBOLS), generator=generator, dtype=torch.float64) + 0.2
    found = {}
    for symbols in product(range(len(SYMBOLS)), repeat=LENGTH):
        text = "".join(SYMBOLS[i] for i in symbols)
        if even and any(len(run) % 2 for run in text.split()):
            continue
        found[text] = float(torch.stack([chain[a, b] for a, b in zip((0, *symbols), symbols, strict=False)]).prod())
    total = sum(found.values())
    return {text: p / total for text, p in found.items()}


class Table:
    """The model in the tokens of one tokenizer."""

    def __init__(self, tok: Any, probabilities: dict[str, float]) -> None:
        self.tok, self.columns = tok, len(tok)
        self.tokenized = [([*vocabularies.encode(tok, text), tok.eos_token_id], p) for text, p in probabilities.items()]

    def logits(self, tokens: list[int]) -> Tensor:
        """log P of every next token after each of the proper beginnings of ``tokens``, [n, V]."""
        rows = torch.zeros(len(tokens), self.columns, dtype=torch.float64)
        for ids, p in self.tokenized:
            for i in range(min(len(ids), len(tokens))):
                if ids[:i] != tokens[:i]:
                    break
                rows[i, ids[i]] += p
        return (rows / rows.sum(-1, keepdim=True)).log().clamp_min(IMPOSSIBLE)


class TableTeacher(LocalTeacher):
    """A teacher in this process that says what a table says of the content, whatever stands before it."""

    def __init__(self, table: Table) -> None:
        super().__init__(tiny.llama(2, vocab=table.columns), table.tok)
        self.table = table

    def dense(self, rollout: Rollout) -> Any:
        contents = [row[mask].tolist() for row, mask in zip(rollout.input_ids, rollout.completion_mask, strict=True)]
        return LogitRows(torch.cat([self.table.logits(ids) for ids in contents]))
