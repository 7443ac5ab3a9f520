"""Tiny real models: a byte-level tokenizer with a chat template and Llamas of a few thousand weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<eos>", "<user>", "<assistant>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One id per byte after four special tokens: 260 ids, every text round-trips."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *bytes_])}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token="<pad>", eos_token="<eos>", additional_special_tokens=SPECIAL[2:]
    )
    fast.chat_template = template
    return fast


def llama(seed: int, *, vocab: int = 264, hidden: int = 32, layers: int = 2, tied: bool = True, **kw: Any) -> Any:
    """A seeded random float32 Llama; weights large enough that its distributions are far from uniform."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # the smallest that vLLM's CPU attention runs
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        initializer_range=0.3,
        **kw,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).float().eval()


def saved(folder: Path) -> str:
    """A checkpoint with its tokenizer, small, of a width that vLLM's attention takes."""
    llama(1, hidden=64, tied=True).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def rows(n: int, *, completion: bool = True) -> list[dict[str, Any]]:
    """Chat rows whose prompts and completions all differ in length."""
    made = []
    for i in range(n):
        row: dict[str, Any] = {"prompt": [{"role": "user", "content": f"{'add ' * (1 + i % 3)}{i}+{i * 7}"}]}
        if completion:
            row["completion"] = str(i * 8) + " ok" * (i % 4)
        made.append(row)
    return made
