"""A tiny language model given bytes for its tokens: ALM and fine-tuning at equal bytes, in a plain loop.

    python eval/proof/transfer_bytes.py OUT            # the model, once; then every run of the table in transfer.md
    python eval/proof/transfer_bytes.py OUT --vocabulary 400

The model: 409 thousand weights, trained on the documentation that comes with Python (``pydoc_data.topics``) with a BPE
of 800 tokens. Its text: 1,280 documents of up to 48 tokens that it wrote itself, 96 of them held out. The student: the
model with ByT5's bytes, or the first so many tokens of the BPE, by :func:`llmdistill.models.transfer.transfer`. What is
printed is the forward KL from the model to its student, in bits per byte of held-out text.

Every chunk is one token of the model's, spelt out, so there is nothing to align: the loop has no part of the trainers
in it but the loss.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmdistill.models.transfer import transfer
from llmdistill.objectives.alm import binary_divergence, chunk_sums, merged
from llmdistill.tokenization.token_bytes import table_of

PAD, EOS = 0, 1  # of both vocabularies; a document begins and ends with the eos
VOCABULARY, STEPS, BATCH, HELDOUT = 800, 500, 32, 96
STUDENT_STEPS, STUDENT_BATCH = 60, 16
TAU = 100.0
RATES = (1e-3, 3e-3, 1e-2)


def paragraphs() -> list[str]:
    """Paragraphs of 80 to 240 characters, shuffled."""
    found = [p.strip() for name in sorted(topics) for p in topics[name].split("\n\n")]
    found = [p for p in found if 80 < len(p) < 240]
    random.Random(0).shuffle(found)
    return found


def bpe(text: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", eos_token="<eos>")


def logps(model: LlamaForCausalLM, documents: Sequence[Sequence[int]], words_V: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of every document: log-probs of its tokens, and that a word ends before each, [T - 1] both."""
    width = max(map(len, documents))
    ids = torch.tensor([[*d, *[PAD] * (width - len(d))] for d in documents])
    mask = torch.tensor([[1] * len(d) + [0] * (width - len(d)) for d in documents])
    logp = model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1]).logits.log_softmax(-1)
    picked = logp.gather(-1, ids[:, 1:, None]).squeeze(-1)
    words = logp.masked_fill(~words_V, -torch.inf).logsumexp(-1)
    return [(picked[k, : len(d) - 1], words[k, : len(d) - 1]) for k, d in enumerate(documents)]


def made(folder: Path) -> tuple[LlamaForCausalLM, Any, list[list[int]]]:
    """The model, its tokenizer and what it wrote; trained and written once."""
    text = paragraphs()
    if not (folder / "written.pt").exists():
        tok = bpe(text, VOCABULARY)
        torch.manual_seed(0)
        config = LlamaConfig(
            **{"vocab_size": len(tok), "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3},
            **{"num_attention_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": True},
            **{"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None},
        )
        model, rng = LlamaForCausalLM(config).float(), random.Random(1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
        everything = torch.ones(len(tok), dtype=torch.bool)
        for step in range(STEPS):
            decay = 0.02 + 0.98 * (1 + math.cos(math.pi * step / STEPS)) / 2
            optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20) * decay
            batch = [[EOS, *tok(d, add_special_tokens=False)["input_ids"], EOS] for d in rng.sample(text[64:], BATCH)]
            loss = -torch.cat([p for p, _ in logps(model, batch, everything)]).mean()
            descend(model, optimizer, loss)
        torch.manual_seed(5)
        sampling = {"max_new_tokens": 48, "do_sample": True, "top_k": 0, "pad_token_id": PAD, "eos_token_id": EOS}
        begun = torch.full((160, 1), EOS)
        rows = [row for _ in range(8) for row in model.eval().generate(begun, **sampling)[:, 1:].tolist()]
        written = [[EOS, *row[: row.index(EOS) + 1 if EOS in row else len(row)]] for row in rows]
        model.save_pretrained(folder)
        tok.save_pretrained(folder)
        torch.save(written, folder / "written.pt")
    model = LlamaForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(folder), torch.load(folder / "written.pt")


def descend(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@dataclass
class Scene:
    """The model and its student's vocabulary. ``chunks[i]``: the model's token that each of document i's is in."""

    model: LlamaForCausalLM
    tokenizer: Any
    new: Any
    written: list[list[int]]

    def __post_init__(self) -> None:
        self.start, new = copy.deepcopy(self.model).requires_grad_(True), copy.deepcopy(self.new)
        transfer(self.start, self.tokenizer, new)
        self.old_table, self.table = table_of(self.tokenizer), table_of(new)
        self.words = self.old_table.begins_word(self.model.config.vocab_size)
        self.student_words = self.table.begins_word(self.start.config.vocab_size)
        self.spelt: dict[int, list[int]] = {}
        self.documents, self.chunks = zip(*map(self.spell, self.written), strict=True)
        content = (i for d in self.written[:HELDOUT] for i in d if i != EOS)
        self.bytes = sum(len(self.old_table.units[i]) for i in content)

    def spell(self, document: Sequence[int]) -> tuple[list[int], Tensor]:
        ids, chunks = [EOS], list[int]()
        for number, token in enumerate(document[1:]):
            if token not in self.spelt:
                units = self.old_table.units[token]
                whole = self.table.ids_by_units.get(units)
                if token == EOS:
                    self.spelt[token] = [EOS]
                elif whole is not None:
                    self.spelt[token] = [whole]
                elif isinstance(self.new, ByT5Tokenizer):
                    self.spelt[token] = [i for u in units if (i := self.table.byte_ids[u]) is not None]
                else:
                    word = self.tokenizer.convert_ids_to_tokens(token)
                    self.spelt[token] = [piece.id for piece in self.new.backend_tokenizer.model.tokenize(word)]
            ids += self.spelt[token]
            chunks += [number] * len(self.spelt[token])
        return ids, torch.tensor(chunks)

    @torch.no_grad()
    def kl(self, student: LlamaForCausalLM) -> float:
        """Bits per byte of held-out text that the student needs more than the model does."""
        own = torch.cat([p for p, _ in logps(student, self.documents[:HELDOUT], self.student_words)]).sum()
        other = torch.cat([p for p, _ in logps(self.model, self.written[:HELDOUT], self.words)]).sum()
        return float(other - own) / math.log(2) / self.bytes

    def matching(self, index: Sequence[int], own: list[tuple[Tensor, Tensor]], threshold: float | None) -> Tensor:
        """ALM's loss in nats, mean over chunks; with a threshold debiased and merged."""
        with torch.no_grad():
            other = logps(self.model, [self.written[i] for i in index], self.words)
        student, teacher = [], []
        for i, (picked, words), (judged, judged_words) in zip(index, own, other, strict=True):
            chunks, count = self.chunks[i], len(judged)
            sums = chunk_sums(picked, chunks, count)
            if threshold is not None:
                starts = torch.cat([chunks.new_ones(1).bool(), chunks[1:] != chunks[:-1]])
                ends, judged_ends = (F.pad(w, (0, 1)) for w in (words[starts][1:], judged_words[1:]))
                into = merged(judged_ends.exp(), torch.arange(count) == count - 1, threshold)
                closes = torch.cat([into[1:] != into[:-1], torch.ones(1, dtype=torch.bool)])
                count = int(into[-1]) + 1
                sums = chunk_sums(sums, into, count) + ends[closes]
                judged = chunk_sums(judged, into, count) + judged_ends[closes]
            student.append(sums)
            teacher.append(judged)
        return TAU * binary_divergence(torch.cat(student), torch.cat(teacher), temperature=TAU).mean()

    def taught(self, method: str, rate: float, seed: int = 0) -> float:
        """The KL after training by ``sft``, ``alm`` or ``alm debiased``."""
        student, rng = copy.deepcopy(self.start), random.Random(seed)
        optimizer = torch.optim.AdamW(student.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
        for step in range(STUDENT_STEPS):
            optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 5) * (1 - step / STUDENT_STEPS)
            index = rng.sample(range(HELDOUT, len(self.written)), STUDENT_BATCH)
            own = logps(student, [self.documents[i] for i in index], self.student_words)
            if method == "sft":
                loss = -torch.cat([p for p, _ in own]).mean()
            else:
                loss = self.matching(index, own, 0.1 if method == "alm debiased" else None)
            descend(student, optimizer, loss)
        return self.kl(student.eval())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the model")
    parser.add_argument("--vocabulary", type=int, default=0, help="tokens of the student's BPE; 0: bytes")
    parser.add_argument("--methods", nargs="+", default=["sft", "alm", "alm debiased"])
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer, written = made(options.out)
    new = bpe(paragraphs(), options.vocabulary) if options.vocabulary else ByT5Tokenizer(extra_ids=0)
    scene = Scene(model, tokenizer, new, written)
    print(f"transferred, untrained: {scene.kl(scene.start):.3f}", flush=True)
    for method in options.methods:
        for rate in options.rates:
            print(f"{method}, {rate:g}: {scene.taught(method, rate):.3f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
