"""The chat templates of the families in use, as TRL carries them to know models by: what of a conversation is trained.

Each stands on a byte-level tokenizer in which its own marks are tokens. What is expected is written by hand: what the
family's model writes behind its generation prompt, up to the token that ends its turn.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmdistill.errors import UserError
from llmdistill.recipe.data_config import DataConfig
from llmdistill.texts.prompts import PromptEncoder
from tests.texts.test_templates import ASK, SYSTEM, said

FOLDER = Path(trl.__file__).parent / "chat_templates"
MARK = re.compile(r"<\|?[/a-zA-Z_]+\|?>|<\uff5c[^<>\uff5c]+\uff5c>|\[/?[A-Z_]+\]|\[gMASK\]")
IN_WORDS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "[INST]", "[/INST]")  # tokens, and not special ones
# The eos of each family's tokenizer; a turn may end with another token.
EOS = {
    **dict.fromkeys(("qwen2_5", "qwen3", "qwen3_5_think", "qwen3_8", "lfm2_2_5", "nemotron_3_nano"), "<|im_end|>"),
    **dict.fromkeys(("gemma", "gemma3", "gemma4_v5"), "<eos>"),
    **dict.fromkeys(("deepseek_r1_distill", "deepseekv3"), "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    **dict.fromkeys(("phi3", "phi3_5", "glm4moe"), "<|endoftext|>"),
    **dict.fromkeys(("llama3", "llama3_2"), "<|eot_id|>"),
    **{"gptoss": "<|return|>", "cohere2": "<|END_OF_TURN_TOKEN|>", "smolvlm": "<end_of_utterance>"},
}
THOUGHTFUL = "<think>\na sum\n</think>\n\n4"
CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "add", "arguments": {"a": 2}},
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "number", "description": "one"}}, "required": ["a"]}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": SCHEMA}}]
RESULT = {"role": "tool", "name": "add", "tool_call_id": "abcdefghi", "content": "four"}


@cache
def family(name: str) -> Any:
    """A tokenizer with this family's template."""
    if not (file := FOLDER / f"{name}.jinja").is_file():
        pytest.skip(f"this TRL has no {file.name}")
    template = file.read_text()
    names = dict.fromkeys(["<pad>", EOS[name], "<s>", *MARK.findall(template)])
    vocab = {token: i for i, token in enumerate([*names, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(mark, normalized=False) for mark in names if mark not in IN_WORDS])
    tok.add_tokens([AddedToken(mark, normalized=False) for mark in names if mark in IN_WORDS])
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", eos_token=EOS[name], bos_token="<s>")
    fast.chat_template = template
    return fast


def trained(name: str, row: dict[str, Any], **data: Any) -> list[tuple[str, str]]:
    """Prompt and completion of every text that is made of a row."""
    tokenizer = family(name)
    encoder = PromptEncoder(tokenizer, DataConfig(max_prompt_tokens=8192, **data))
    made = encoder.encode_all([row], completions=True)
    return [(tokenizer.decode(p.ids), tokenizer.decode(list(p.completion))) for p in made]


def completion(name: str, row: dict[str, Any], **data: Any) -> str:
    ((_, text),) = trained(name, row, **data)
    return text


# family -> what is trained of an answer "4", of one with thoughts, and of a call of a tool (None: refused)
GPT = "<|channel|>analysis<|message|>a sum<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"
STOP = "<\uff5cend\u2581of\u2581sentence\uff5c>"
XML = "<tool_call>\n<function=add>\n<parameter=a>\n2\n</parameter>\n</function>\n</tool_call>"
JSON = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
GLM_CALL = "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
TRAINED: dict[str, tuple[str, str, str | None]] = {
    "qwen2_5": ("4<|im_end|>", THOUGHTFUL + "<|im_end|>", JSON + "<|im_end|>"),
    "qwen3": (
        "<think>\n\n</think>\n\n4<|im_end|>",
        THOUGHTFUL + "<|im_end|>",
        f"<think>\n\n</think>\n\n{JSON}<|im_end|>",
    ),
    # The prompt opens the thoughts.
    "qwen3_5_think": (
        "\n</think>\n\n4<|im_end|>",
        "a sum\n</think>\n\n4<|im_end|>",
        f"\n</think>\n\n{XML}<|im_end|>",
    ),
    "qwen3_8": ("\n</think>\n\n4<|im_end|>", "a sum\n</think>\n\n4<|im_end|>", f"\n</think>\n\n{XML}<|im_end|>"),
    "nemotron_3_nano": ("</think>4<|im_end|>", "a sum\n</think>\n\n4<|im_end|>", f"</think>\n{XML}\n<|im_end|>"),
    "deepseek_r1_distill": ("\n</think>\n\n4" + STOP, "a sum\n</think>\n\n4" + STOP, None),
    "glm4moe": (
        "\n<think></think>\n4<|endoftext|>",
        "\n<think>a sum</think>\n4<|endoftext|>",
        f"\n<think></think>\n{GLM_CALL}<|endoftext|>",
    ),
    # Thoughts are a channel of their own; a call ends with its own token.
    "gptoss": (
        "<|channel|>final<|message|>4<|return|>",
        GPT,
        ' to=functions.add<|channel|>commentary json<|message|>{"a": 2}<|call|>',
    ),
    "gemma4_v5": (
        "4<turn|>",
        "<|channel>thought\na sum\n<channel|>4<turn|>",
        "<|tool_call>call:add{a:2}<tool_call|><|tool_response>",
    ),
    "gemma": ("4<end_of_turn>", THOUGHTFUL + "<end_of_turn>", None),
    "gemma3": ("4<end_of_turn>", THOUGHTFUL + "<end_of_turn>", None),
    "llama3": ("4<|eot_id|>", THOUGHTFUL + "<|eot_id|>", None),
    "llama3_2": ("4<|eot_id|>", THOUGHTFUL + "<|eot_id|>", '{"name": "add", "parameters": {"a": 2}}<|eot_id|>'),
    "phi3": ("4<|end|>", THOUGHTFUL + "<|end|>", None),
    "phi3_5": ("4<|end|>", THOUGHTFUL + "<|end|>", None),
    "lfm2_2_5": (
        "4<|im_end|>",
        THOUGHTFUL + "<|im_end|>",
        "<|tool_call_start|>[add(a=2)]<|tool_call_end|><|im_end|>",
    ),
    "cohere2": (
        "4<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        THOUGHTFUL + "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        None,
    ),
    "smolvlm": (" 4<end_of_utterance>", f" {THOUGHTFUL}<end_of_utterance>", None),
}


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_trained_of_an_answer(name: str) -> None:
    plain, thoughtful, _ = TRAINED[name]
    talks: list[list[dict[str, Any]]] = [[ASK], [SYSTEM, ASK], [ASK, said("5"), ASK]]
    for talk in talks:
        assert completion(name, {"prompt": [*talk, said("4")]}) == plain
    for more in ({"tool_calls": []}, {"tool_calls": None, "reasoning_content": ""}):
        assert completion(name, {"prompt": [ASK, said("4", **more)]}) == plain
    assert completion(name, {"prompt": [ASK, said("4" + family(name).eos_token)]}) == plain
    assert completion(name, {"prompt": [ASK, said(THOUGHTFUL)]}) == thoughtful
    first, second = trained(name, {"prompt": [ASK, said(THOUGHTFUL), ASK, said("4")]}, assistant_turns="all")
    assert (first[1], second[1]) == (thoughtful, plain)


@pytest.mark.parametrize("name", TRAINED)
def test_the_prompt_is_the_templates_own(name: str) -> None:
    tokenizer = family(name)
    talk: list[dict[str, Any]] = [ASK]
    if name == "smolvlm":  # which reads content in parts only
        talk = [{"role": "user", "content": [{"type": "text", "text": ASK["content"]}]}]
    own = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    (prompt, _) = trained(name, {"prompt": [ASK, said("4")]})[0]
    assert prompt == own
    with_system = trained(name, {"prompt": [SYSTEM, ASK, said("4")]})[0][0]
    assert "Be brief." in with_system
    assert trained(name, {"prompt": [{**SYSTEM, "role": "developer"}, ASK, said("4")]})[0][0] == with_system


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_trained_of_a_call(name: str) -> None:
    expected = TRAINED[name][2]
    row: dict[str, Any] = {"prompt": [ASK, said("", tool_calls=[CALL])], "tools": TOOLS}
    answered = {"prompt": [*row["prompt"], RESULT, said("It is four.")], "tools": TOOLS}
    if expected is None:
        with pytest.raises(UserError, match=r"row 0: the chat template .*tool calls? .*Fix: "):
            completion(name, row)
        with pytest.raises(UserError, match="Fix: "):
            completion(name, {"prompt": [ASK, said("I add.", tool_calls=[CALL])], "tools": TOOLS})
    else:
        assert completion(name, row) == expected
    if expected is None and name != "deepseek_r1_distill":  # which writes calls of earlier turns only
        with pytest.raises(UserError, match="Fix: "):
            completion(name, answered)
    else:
        ((prompt, text),) = trained(name, answered)
        assert "add" in prompt and "four" in prompt and "It is four." in text


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "qwen3_8", "nemotron_3_nano", "glm4moe"])
def test_thinking_that_is_turned_off(name: str) -> None:
    """The prompt ends with empty thoughts: an answer that has some is not what the student is asked for."""
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    ((prompt, text),) = trained(name, {"prompt": [ASK, said("4")]}, **off)
    assert "</think>" in prompt and "think" not in text and "4<|" in text
    for thoughtful in (said(THOUGHTFUL), said("4", reasoning_content="a sum")):
        with pytest.raises(UserError, match="row 0: the answer has thoughts, and the prompt ends with empty ones"):
            completion(name, {"prompt": [ASK, thoughtful]}, **off)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_apart_under_the_name_that_the_template_reads(key: str) -> None:
    for name in ("qwen3", "gptoss", "gemma4_v5", "qwen3_5_think"):
        assert completion(name, {"prompt": [ASK, said("4", **{key: "a sum"})]}) == TRAINED[name][1]
    with pytest.raises(UserError, match="does not write the answer's reasoning_content"):
        completion("llama3", {"prompt": [ASK, said("4", **{key: "a sum"})]})


def test_thoughts_that_were_cut_off_get_no_empty_block_in_front() -> None:
    assert completion("qwen3", {"prompt": [ASK, said("<think>\na sum")]}) == "<think>\na sum<|im_end|>"
