"""A model with another tokenizer: every new token starts as the mean of the old ones that spell it, by their bytes.

    llmdistill transfer --model M --tokenizer T --out DIR

The result is a plain checkpoint that has lost a good part of what it could do; distilling its former self into it
(``llmdistill.cross_tokenizer`` with ``teacher.model M``) brings that back: tokenizer transfer as self-distillation
(arXiv 2503.20083, section 4). A token that both vocabularies have keeps its embedding; in the mean of several a piece
counts by the bytes it spells (eval/proof/transfer.md has what other means come to). The chat template stays the
model's, with the special tokens it writes, which join the new vocabulary with their old embeddings.

Simplified away: initialisations that are trained or solved for (FOCUS, ZeTT).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from llmdistill.errors import UserError
from llmdistill.models.loading import load_model
from llmdistill.models.missing import why_not_loaded
from llmdistill.options import OptionParser
from llmdistill.quiet import quiet
from llmdistill.texts.chat import ChatTemplate
from llmdistill.tokenization.align import spell
from llmdistill.tokenization.compare import compare_tokenizers
from llmdistill.tokenization.token_bytes import MARK, TokenTable, table_of


@dataclass(frozen=True)
class Transferred:
    """Where the embeddings of the new vocabulary came from: how many tokens each."""

    kept: int  # the old vocabulary has the very token
    averaged: int
    unknown: int  # the old vocabulary cannot spell it: the mean of all embeddings


@torch.no_grad()
def transfer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new_tokenizer: PreTrainedTokenizerBase
) -> Transferred:
    """Gives ``model``, whose tokenizer is ``tokenizer``, the vocabulary of ``new_tokenizer``, both changed in place.

    Raises:
        UserError: a tokenizer whose tokens are of no known family.
    """
    keep_template(tokenizer, new_tokenizer)
    old, new = table_of(tokenizer), table_of(new_tokenizer)
    pieces = pieces_of(new, tokenizer, old)
    width, sizes_V = len(new.units), torch.tensor([len(units) for units in old.units])
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = [mean_rows(end.weight, pieces, sizes_V) for end in ends]
    bias = getattr(ends[1], "bias", None)
    bias_V = None if bias is None else mean_rows(bias[:, None], pieces, sizes_V)[:, 0]
    model.resize_token_embeddings(width, mean_resizing=False)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    for end, weight_VH in zip(ends, weights, strict=True):  # tied, they are one and the same
        end.weight.copy_(weight_VH)
    if bias_V is not None:
        ends[1].bias.copy_(bias_V)
    _name_special_tokens(model, tokenizer, new_tokenizer)
    kept = sum(len(ids) == 1 and old.units[ids[0]] == units for ids, units in zip(pieces, new.units, strict=True))
    unknown = sum(not ids for ids in pieces)
    return Transferred(kept, len(pieces) - kept - unknown, unknown)


def keep_template(tokenizer: PreTrainedTokenizerBase, new_tokenizer: PreTrainedTokenizerBase) -> None:
    """The model's chat template, and what it writes as one token, for the new tokenizer, whose own it would not know.

    Ends of text and turn stay the model's.
    """
    if not tokenizer.chat_template:
        return
    template = ChatTemplate(tokenizer)
    answered = template.answered([{"role": "user", "content": "?"}], {"role": "assistant", "content": "!"})
    source = template.source + answered.prompt + answered.completion  # some put their tokens together
    ends = {str(t) for t in (tokenizer.eos_token, tokenizer.pad_token) if t}
    written = [t for t in tokenizer.all_special_tokens if t in source or t in ends]
    missing = [t for t in written if t not in new_tokenizer.get_vocab()]
    if missing:
        new_tokenizer.add_special_tokens({"additional_special_tokens": missing})
    new_tokenizer.chat_template = tokenizer.chat_template
    new_tokenizer.eos_token = tokenizer.eos_token
    new_tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token


def pieces_of(new: TokenTable, tokenizer: PreTrainedTokenizerBase, old: TokenTable) -> list[list[int]]:
    """For every new id the old ids that spell the same: one, the tokens of its text, or its bytes; [] where none do."""
    found = [[old.ids_by_units[units]] if units in old.ids_by_units else [] for units in new.units]
    texts = {}
    for i, units in enumerate(new.units):
        if not found[i] and units and max(units) < MARK:
            try:
                texts[i] = bytes(units).decode()
            except UnicodeDecodeError:
                found[i] = _bytes_of(units, old)
    encoded = tokenizer(list(texts.values()), add_special_tokens=False)["input_ids"] if texts else []
    for (i, text), ids in zip(texts.items(), encoded, strict=True):
        exact = np.array_equal(spell(ids, old).units, np.frombuffer(text.encode(), np.uint8))
        found[i] = list(ids) if exact else _bytes_of(new.units[i], old)
    return found


def _bytes_of(units: Sequence[int], old: TokenTable) -> list[int]:
    ids = [old.byte_ids[b] for b in units]
    return [] if None in ids else [i for i in ids if i is not None]


def mean_rows(table_VH: Tensor, pieces: Sequence[Sequence[int]], sizes_V: Tensor) -> Tensor:
    """The mean of the rows that ``pieces`` names for each new id -> [V', H]; of all rows where it names none.

    A row counts by its size [V], the bytes its token spells: the longer piece says more of what the token means.
    """
    counts = torch.tensor([len(ids) for ids in pieces])
    rows = torch.tensor([i for ids in pieces for i in ids], dtype=torch.int64)
    into = torch.arange(len(pieces)).repeat_interleave(counts)
    sizes = sizes_V[rows].float().clamp(min=1.0)
    shares = sizes / torch.zeros(len(pieces)).index_add(0, into, sizes)[into]  # of one piece exactly 1
    weighted = table_VH[rows].float().cpu() * shares[:, None]
    means = torch.zeros(len(pieces), table_VH.shape[1]).index_add(0, into, weighted)
    means[counts == 0] = table_VH.float().mean(0).cpu()
    return means.to(table_VH)


def _name_special_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new_tokenizer: PreTrainedTokenizerBase
) -> None:
    """bos, eos and pad of the configs are the new tokenizer's, None where it has none; other ids go by their tokens.

    What else ends the model's turns, or must not be written, keeps its token and gets that one's new id; an id without
    one names nothing any more and is left out.
    """
    vocabulary, own_eos = new_tokenizer.get_vocab(), new_tokenizer.eos_token_id

    def renamed(ids: int | Sequence[int] | None) -> list[int]:
        ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
        tokens = tokenizer.convert_ids_to_tokens([i for i in ids if 0 <= i < len(tokenizer)])
        return [vocabulary[t] for t in tokens if t in vocabulary]

    configs: list[Any] = [model.config, model.config.get_text_config(), model.generation_config]
    for config in {id(c): c for c in configs if c is not None}.values():
        config.bos_token_id, config.pad_token_id = new_tokenizer.bos_token_id, new_tokenizer.pad_token_id
        old_eos = config.eos_token_id
        own = [] if own_eos is None else [own_eos]
        ends = list(dict.fromkeys(own + (renamed(old_eos) if isinstance(old_eos, list) else [])))
        config.eos_token_id = ends if isinstance(old_eos, list) and ends else own_eos
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            if getattr(config, name, None) is not None:
                setattr(config, name, renamed(getattr(config, name)) or None)


def run(argv: Sequence[str]) -> int:
    """The command ``llmdistill transfer``."""
    parser = OptionParser(prog="llmdistill transfer", description="Give a model another tokenizer.")
    parser.add_argument("--model", required=True, help="folder or hub name of the model")
    parser.add_argument("--tokenizer", required=True, help="folder or hub name of the tokenizer it is to have")
    parser.add_argument("--out", required=True, type=Path, help="folder for the new checkpoint")
    words = parser.parse_args(list(argv))
    if words.out.is_file() or (words.out.is_dir() and any(words.out.iterdir())):
        raise UserError(f"--out {words.out} is there already, and is not written over. Fix: another folder.")
    quiet()
    try:
        model, tokenizer = load_model(words.model, "float32", "--model")
    except UserError as error:
        raise UserError(str(error).replace("--model.", "--", 1)) from error  # it names a recipe's section
    try:
        new_tokenizer = AutoTokenizer.from_pretrained(words.tokenizer)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--tokenizer {words.tokenizer!r} cannot be loaded: {why_not_loaded(words.tokenizer, error)}"
        ) from error
    if compare_tokenizers(tokenizer, new_tokenizer).alike:
        raise UserError(f"--tokenizer {words.tokenizer!r} is the tokenizer that --model has. Fix: another one.")
    found = transfer(model, tokenizer, new_tokenizer)
    model.save_pretrained(words.out)
    new_tokenizer.save_pretrained(words.out)
    total = found.kept + found.averaged + found.unknown
    print(f"{words.out}: {total} tokens, {found.kept} kept, {found.averaged} averaged, {found.unknown} unknown")
    return 0
