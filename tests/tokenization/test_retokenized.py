"""What a judge of another family reads: its own template around the same content, and which rows go together."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch

from llmdistill.recipe.data_config import DataConfig
from llmdistill.texts import Prompt, collate
from llmdistill.texts.chat import ChatTemplate
from llmdistill.texts.prompts import PromptEncoder
from llmdistill.texts.retokenized import Retokenized, Retokenizer
from tests.tokenization import vocabularies
from tests.tokenization.vocabularies import encode

STUDENT = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<stop>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"  # noqa: E501
# A space before what the assistant says, as Mistral's and Llama-2's have it.
SPACED = "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"  # noqa: E501
# An empty thought before an answer without one, as Qwen3's has it.
THINKING = "{% for m in messages %}{{ '<u>' + m['content'] if m['role'] == 'user' else '<a><think>\\n\\n</think>\\n\\n' + m['content'] + '<end>' }}{% endfor %}{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"  # noqa: E501


def student() -> Any:
    tok = vocabularies.byte_level(["t h", "th e"], eos_token="<stop>", pad_token="<pad>")
    tok.chat_template = STUDENT
    return tok


def judge(kind: str) -> Any:
    if kind == "spaced":
        tok = vocabularies.tokenizer("mistral-fast")
        tok.chat_template = SPACED
        return tok
    tok = vocabularies.byte_level(["2 0", "20 1"], eos_token="<eos>")
    tok.add_special_tokens({"additional_special_tokens": ["<end>", "<u>", "<a>"]})
    tok.chat_template = THINKING
    return tok


def made(own: Any, other: Any, completions: list[list[int]], **row: Any) -> tuple[Any, list[Prompt], Retokenized]:
    encoder = PromptEncoder(own, DataConfig(), {"teacher": other})
    rows = row or {"prompt": [{"role": "user", "content": "How many?"}]}
    prompts = [encoder(rows, i) for i in range(len(completions))]
    rollout = collate([p.ids for p in prompts], completions, pad_id=0)
    ends = [i for i in (own.eos_token_id,) if i is not None]
    convert = Retokenizer(own, ends, other, ChatTemplate(other), pad_id=0)
    return rollout, prompts, convert(rollout, prompts, "teacher")


def written(tok: Any, found: Retokenized, b: int = 0) -> tuple[str, str]:
    """What the judge reads: before its content, and the content."""
    ids, mask = found.rollout.input_ids[b], found.rollout.completion_mask[b]
    real = found.rollout.attention_mask[b]
    return tok.decode(ids[real & ~mask]), tok.decode(ids[mask])


def test_the_judge_reads_its_own_template_around_the_content() -> None:
    own, other = student(), judge("thinking")
    ids = [*encode(own, "the 201 pens"), own.eos_token_id]
    rollout, _, found = made(own, other, [ids])
    assert written(other, found) == ("<u>How many?<a><think>\n\n</think>\n\n", "the 201 pens<end>")
    assert len(found.student_chunks) == rollout.num_rows == len(ids)
    chunks = found.student_chunks.tolist()
    assert chunks[:2] == [0, 1]
    assert found.judge_chunks.tolist()[:4] == [0, 0, 0, 1]  # "the" is one token to the student, three to the judge
    digits = [own.convert_ids_to_tokens(i) for i in ids].index("2")
    assert len(set(chunks[digits : digits + 3])) == 1  # and 201 three, and one
    # the end of the turn, its stop against the judge's, is a chunk of its own
    assert chunks[-1] == max(chunks) and chunks.count(chunks[-1]) == 1
    assert found.judge_chunks[-1] == chunks[-1] and found.rollout.input_ids[0, -1] == other.convert_tokens_to_ids(
        "<end>"
    )
    assert found.shares.aligned_bytes == found.shares.bytes == len("the 201 pens")
    assert found.lasts.tolist() == [False] * (found.shares.chunks - 1) + [True]


def test_a_space_that_the_template_writes_belongs_to_no_content() -> None:
    own, other = student(), judge("spaced")
    _, _, found = made(own, other, [[*encode(own, "the pens"), own.eos_token_id]])
    tokens = other.convert_ids_to_tokens(found.rollout.input_ids[0, found.rollout.completion_mask[0]].tolist())
    assert tokens == ["▁the", "▁pens", "</s>"]  # as the judge was trained, the template's space in the token
    assert found.shares.aligned_bytes == len("the pens") and found.shares.inexact_sequences == 0


def test_every_sequence_has_chunks_of_its_own_and_padding_none() -> None:
    own, other = student(), judge("thinking")
    texts = ["the 201", "a", "no 20 the the", ""]
    completions = [[*encode(own, t), own.eos_token_id] for t in texts]
    rollout, prompts, found = made(own, other, completions)
    own_rows = found.student_chunks.split(rollout.row_counts)
    judged = found.judge_chunks.split(found.rollout.row_counts)
    assert int(found.lasts.sum()) == len(texts)
    first = 0
    for a, b in zip(own_rows, judged, strict=True):
        assert sorted(set(a.tolist())) == sorted(set(b.tolist())) == list(range(first, int(a.max()) + 1))
        first = int(a.max()) + 1
    # left padding moves nothing
    ids = torch.nn.functional.pad(rollout.input_ids, (3, 0), value=7)
    masks = [torch.nn.functional.pad(m, (3, 0)) for m in (rollout.attention_mask, rollout.completion_mask)]
    moved = type(rollout)(ids, *masks)
    convert = Retokenizer(own, [own.eos_token_id], other, ChatTemplate(other), pad_id=0)
    again = convert(moved, prompts, "teacher")
    assert torch.equal(again.student_chunks, found.student_chunks)
    assert torch.equal(again.rollout.input_ids, found.rollout.input_ids)


def test_a_completion_that_was_cut_off_in_a_character_keeps_its_ids() -> None:
    own, other = student(), judge("thinking")
    ids = encode(own, "so 🦊")[:-2]  # the end is missing, and the last two bytes of the character
    _, _, found = made(own, other, [ids])
    tail = found.rollout.input_ids[0, found.rollout.completion_mask[0]].tolist()
    assert [other.convert_ids_to_tokens(i) for i in tail[-2:]] == [own.convert_ids_to_tokens(i) for i in ids[-2:]]
    assert found.student_chunks.min() >= 0 and found.shares.aligned_bytes == len("so ") + 2


def test_tokens_that_the_loss_leaves_out_are_in_no_chunk() -> None:
    own, other = student(), judge("thinking")
    ids = encode(own, "the 201 the")
    rollout, prompts, whole = made(own, other, [ids])
    mask = rollout.completion_mask.clone()
    at = int(mask[0].nonzero()[0]) + [own.convert_ids_to_tokens(i) for i in ids].index("0")
    mask[0, at] = False  # the 0 of 201, which is one token of the judge
    convert = Retokenizer(own, [own.eos_token_id], other, ChatTemplate(other), pad_id=0)
    found = convert(type(rollout)(rollout.input_ids, rollout.attention_mask, mask), prompts, "teacher")
    assert found.shares.chunks == whole.shares.chunks - 1
    assert int((found.student_chunks < 0).sum()) == 2 and int((found.judge_chunks < 0).sum()) == 1


def test_thoughts_are_between_the_judges_own_tags() -> None:
    own, other = student(), judge("thinking")
    own.chat_template = STUDENT + "{# [THINK] [/THINK] #}"
    text = "[THINK]\nadd[/THINK]\n20"
    _, _, found = made(own, other, [[*encode(own, text), own.eos_token_id]])
    head, content = written(other, found)
    assert head == "<u>How many?<a>" and content == "<think>\nadd</think>\n20<end>"  # no empty thought before it
    assert found.shares.inexact_sequences == 0 and found.shares.aligned_sequences == 1
    chunks = found.student_chunks.tolist()
    assert len(set(chunks[: len("[THINK]")])) == 1  # a tag is one chunk
    assert chunks[len("[THINK]")] == chunks[0] + 1


@pytest.mark.parametrize("thoughts", ["[THINK]\nadd[/THINK]\n", ""])
def test_calls_are_between_the_judges_own_tags(thoughts: str) -> None:
    own, other = student(), judge("thinking")
    own.chat_template = STUDENT + "{# [THINK] [/THINK] <tool_call> </tool_call> #}"
    other.chat_template += "{# <|tool_call|> <|/tool_call|> #}"
    call = '{"name": "add", "arguments": {"a": 20}}'
    text = f"{thoughts}201 <tool_call>{call}</tool_call>"
    _, _, found = made(own, other, [[*encode(own, text), own.eos_token_id]])
    _, content = written(other, found)
    told = thoughts.replace("[THINK]", "<think>").replace("[/THINK]", "</think>")
    lead = "" if thoughts else content.partition("201")[0]
    assert content == f"{lead}{told}201 <|tool_call|>{call}<|/tool_call|><end>"
    assert found.shares.inexact_sequences == 0 and found.shares.aligned_sequences == 1
    assert found.shares.aligned_digits == 5 and found.shares.aligned_ends == 1


def test_calls_of_a_side_that_has_no_pair_of_tags_are_words() -> None:
    own, other = student(), judge("thinking")
    own.chat_template = STUDENT + "{# <tool_call> </tool_call> #}"
    text = "<tool_call>201</tool_call>"
    _, _, found = made(own, other, [[*encode(own, text), own.eos_token_id]])
    assert written(other, found)[1].endswith(f"{text}<end>") and found.shares.aligned_sequences == 1


def test_a_text_that_cannot_be_aligned_is_left_out_and_counted() -> None:
    own, other = student(), vocabularies.wordpiece(["the", "cat"])
    encoder_rows = {"prompt": "the "}
    ids = [encode(own, "the 猫"), encode(own, "The  cat")]
    _, _, found = made(own, other, ids, **encoder_rows)
    assert found.student_chunks[: len(ids[0])].tolist() == [-1] * len(ids[0])
    assert found.shares.aligned_sequences == found.shares.inexact_sequences == 1
    assert found.shares.aligned_bytes == len("The  cat") and found.shares.bytes == len("the 猫The  cat".encode())
    assert any("no token for what comes after" in reason for reason in found.shares.reasons)


def test_a_document_is_content_from_its_first_token_on() -> None:
    own, other = student(), judge("thinking")
    ids = [*encode(own, "the 201 the"), own.eos_token_id]
    prompt = Prompt(ids[:1], "", completion=tuple(ids[1:]))
    rollout = collate([prompt.ids], [list(prompt.completion)], pad_id=0)
    convert = Retokenizer(own, [own.eos_token_id], other, ChatTemplate(other), pad_id=0)
    found = convert(rollout, [prompt], "teacher")
    assert len(found.student_chunks) == rollout.num_rows == len(ids) - 1
    # Nothing stands before the first chunk: "the" is one token of the student, "t" the judge's first
    assert (found.student_chunks >= 0).all() and found.judge_chunks.tolist()[:2] == [-1, -1]
    assert found.shares.aligned_bytes == len(" 201 the")


@pytest.mark.parametrize("pair", [("smollm2", "deepseek"), ("deepseek", "mistral-fast"), ("mistral-fast", "smollm2")])
def test_real_vocabularies(pair: tuple[str, str]) -> None:
    own, other = (vocabularies.tokenizer(name) for name in pair)
    text = "First, 1234 + 56 = 1290.\n\n  def f(x):\n\treturn '知识 🦊'"
    ids = encode(own, text)
    _, _, found = made(own, other, [ids], prompt="Say it: ")
    assert found.shares.aligned_bytes == found.shares.bytes == len(text.encode())
    assert int(found.student_chunks.max()) + 1 == found.shares.chunks
    for side in (found.student_chunks, found.judge_chunks):
        assert bool((side.diff() >= 0).all()) and np.unique(side).tolist() == list(range(found.shares.chunks))


def test_a_round_takes_time_linear_in_the_tokens() -> None:
    """All that is done for a text, placing of chunks included: 32k tokens in well under a second of a core (.13 s)."""
    own, other = vocabularies.tokenizer("smollm2"), vocabularies.tokenizer("mistral-fast")
    convert = Retokenizer(own, [own.eos_token_id], other, ChatTemplate(other), pad_id=0)
    line, taken = encode(own, "48 / 2 = 24, so 48 + 24 = 72 in all.  # 知识 🦊\n\treturn x\n"), list[float]()
    for tokens in (8_000, 8_000, 32_000):  # the first also makes the tables
        ids = line * (tokens // len(line))
        prompt = Prompt(ids[:1], "", completion=tuple(ids[1:]))
        started = time.process_time()
        found = convert(collate([prompt.ids], [list(prompt.completion)], pad_id=0), [prompt], "teacher")
        taken.append(time.process_time() - started)
        assert found.shares.chunk_tokens == found.shares.tokens == len(ids) - 1
    assert taken[2] < 0.5 and taken[2] < 12 * taken[1]
