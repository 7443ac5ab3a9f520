"""Tokenizers and chat templates with the habits of the families in use, small and made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen2.5's habit: a system message of its own where none is given.
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Quill.<|im_end|>\n{% endif %}" + CHATML
)
# Qwen3's: thoughts of earlier turns go, the last turn has a block of them, empty if need be.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] != 'assistant' %}{{ m['content'] }}"
    "{% else %}{% set words = m['content'].split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}{% set thoughts = m['reasoning_content'] | default('') %}"
    "{% if '</think>' in m['content'] %}"
    "{% set thoughts = m['content'].split('</think>')[0].split('<think>')[-1].strip('\n') %}{% endif %}"
    "<think>\n{{ thoughts }}\n</think>\n\n{% endif %}{{ words }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# DeepSeek-R1's: generation begins inside the thoughts, and answered turns are written without any.
OPENED_THOUGHTS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}"
    "{% else %}<|assistant|>{{ m['content'].split('</think>')[-1] }}<|stop|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
# Llama-3's: contents are trimmed, a date is written.
TRIMMED = (
    "{% set day = date_string | default(strftime_now('%d %b %Y')) %}"
    "{{ bos_token }}<|head|>system<|/head|>\n\nToday: {{ day }}\n\n"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}{% endif %}<|eot|>"
    "{% for m in messages if m['role'] != 'system' %}"
    "<|head|>{{ m['role'] }}<|/head|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
# Gemma's: no system role, and the assistant is called model.
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
# One that leaves system messages out without a word.
SILENT_SYSTEM = (
    "{% for m in messages if m['role'] != 'system' %}<turn>{{ m['role'] }}\n{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
# Mistral's: strict alternation, no generation prompt, the eos behind an answer.
ALTERNATING = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Phi-3's: a token ends the turn, and the eos the whole conversation.
TWO_ENDS = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
# Generation tags that leave out a header of the answer and the end of its turn.
TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}[calm] {% generation %}{{ m['content'] }}{% endgeneration %}<|im_end|>\n"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Content as a list of parts only, as some templates of vision models take it.
PARTS_ONLY = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Tools before everything, and calls of them; a key that Parquet makes None would be written as None.
WITH_TOOLS = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['name'] is defined %}({{ m['name'] }}) {% endif %}{{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %} <call>{{ call['function']['name'] }}"
    "{{ call['function']['arguments'] | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# An end of turn in words, which stops nothing.
IN_WORDS = (
    "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)

MARKS = ["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|stop|>", "<|head|>", "<|/head|>", "<|eot|>"]
MARKS += ["<turn>", "<end>", "<|end|>"]


def byte_level(
    template: str | None,
    *,
    eos: str = "<eos>",
    bos: str | None = "<bos>",
    merges: Sequence[tuple[str, str]] = (),
    around: str | None = None,
) -> Any:
    """A byte-level tokenizer. ``around`` is what it puts around a text, as ``<bos> $A <eos>``."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*("<pad>", "<eos>", "<bos>"), *MARKS, *bytes_, *(a + b for a, b in merges)]
    vocab = {token: i for i, token in enumerate(names)}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    if around:
        ids = [("<bos>", vocab["<bos>"]), ("<eos>", vocab["<eos>"])]
        tok.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    return _fast(tok, template, eos, bos)


def sentence_piece(template: str | None) -> Any:
    """Like Llama-2's: a blank before the first word of a text, and no other token for it."""
    letters = sorted({c for c in "0123456789abcdefghijklmnopqrstuvwxyzABCINST[]/.,:?+=-\n"})
    words = ["▁4", "▁is", "is"]
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<bos>", *MARKS, "▁", *letters, *words])}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "4"), ("i", "s"), ("▁", "is")]))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tok.decoder = decoders.Metaspace(prepend_scheme="first")
    return _fast(tok, template, "<eos>", "<bos>")


def _fast(tok: Tokenizer, template: str | None, eos: str, bos: str | None) -> Any:
    tok.add_special_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token="<pad>", eos_token=eos, bos_token=bos, additional_special_tokens=MARKS
    )
    fast.chat_template = template
    return fast
