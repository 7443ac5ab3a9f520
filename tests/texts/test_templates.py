"""What is trained on is what the template writes: prompt and completion, token by token, of every family's habits."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest

from llmdistill.errors import UserError
from llmdistill.recipe.data_config import DataConfig
from llmdistill.texts.pairs import pair_encoder
from llmdistill.texts.prompts import PromptEncoder, completed
from tests import tiny
from tests.texts import quirks
from tests.tokenization import vocabularies

ASK = {"role": "user", "content": "2+2?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def said(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def encoded(tokenizer: Any, row: dict[str, Any], **data: Any) -> list[tuple[str, str]]:
    """Text of every prompt and completion of a row."""
    encoder = PromptEncoder(tokenizer, DataConfig(**data))
    prompts = encoder.encode_all([row], completions=True)
    return [(tokenizer.decode(p.ids), tokenizer.decode(list(p.completion))) for p in prompts]


def only(tokenizer: Any, row: dict[str, Any], **data: Any) -> tuple[str, str]:
    (one,) = encoded(tokenizer, row, **data)
    return one


# ---------------------------------------------------------------- the template closes the turn

CHATML_PROMPT = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "answer", "prompt", "completion"),
    [
        (quirks.CHATML, "4", CHATML_PROMPT, "4<|im_end|>"),
        (quirks.CHATML, " 4\n", CHATML_PROMPT, " 4\n<|im_end|>"),
        (quirks.CHATML, "4<|im_end|>", CHATML_PROMPT, "4<|im_end|>"),  # closed already
        (quirks.CHATML, "4<|im_end|>\n", CHATML_PROMPT, "4<|im_end|>"),
        (quirks.CHATML, "4<eos>", CHATML_PROMPT, "4<|im_end|>"),
        (
            quirks.DEFAULT_SYSTEM,
            "4",
            "<|im_start|>system\nYou are Quill.<|im_end|>\n" + CHATML_PROMPT,
            "4<|im_end|>",
        ),
        (quirks.THINKING, "4", CHATML_PROMPT, "<think>\n\n</think>\n\n4<|im_end|>"),
        (quirks.THINKING, "<think>sum</think>4", CHATML_PROMPT, "<think>\nsum\n</think>\n\n4<|im_end|>"),
        (
            quirks.TRIMMED.replace("strftime_now('%d %b %Y')", "'1 May'"),
            " 4 ",
            "<bos><|head|>system<|/head|>\n\nToday: 1 May\n\n<|eot|><|head|>user<|/head|>\n\n2+2?<|eot|>"
            "<|head|>assistant<|/head|>\n\n",
            "4<|eot|>",
        ),
        (quirks.NO_SYSTEM, "4", "<bos><turn>user\n2+2?<end>\n<turn>model\n", "4<end>"),
        (quirks.ALTERNATING, "4", "<bos>[INST] 2+2? [/INST]", " 4<eos>"),
        (quirks.TWO_ENDS, "4", "<|user|>\n2+2?<|end|>\n<|assistant|>\n", "4<|end|>"),
        (quirks.IN_WORDS, "4", "### user:\n2+2?\n\n### assistant:\n", "4<eos>"),
        (quirks.PARTS_ONLY, "4", CHATML_PROMPT, "4<|im_end|>"),
        (quirks.WITH_TOOLS, "4", CHATML_PROMPT, "4<|im_end|>"),
        (tiny.TEMPLATE, "4", "<user>2+2?<assistant>", "4<eos>"),
        (tiny.TEMPLATE, "4<eos>", "<user>2+2?<assistant>", "4<eos>"),
    ],
)
def test_an_answer_is_what_the_template_writes_behind_the_prompt(
    template: str, answer: str, prompt: str, completion: str
) -> None:
    """However the row has it: a completion, a message behind the prompt, or the conversation's last message."""
    tokenizer = quirks.byte_level(template)
    for row in (
        {"prompt": [ASK], "completion": answer},
        {"prompt": [ASK], "completion": [said(answer)]},
        {"prompt": [ASK], "completion": [ASK, said(answer)]},
        {"prompt": [ASK, said(answer)]},
        {"prompt": "2+2?", "completion": [said(answer)]},
    ):
        assert only(tokenizer, row) == (prompt, completion), row
    pair = pair_encoder(tokenizer, DataConfig())({"prompt": [ASK], "chosen": answer, "rejected": [said("5")]})
    assert (tokenizer.decode(pair.prompt.ids), tokenizer.decode(list(pair.chosen))) == (prompt, completion)
    assert tokenizer.decode(list(pair.rejected)) == only(tokenizer, {"prompt": [ASK], "completion": "5"})[1]


def test_the_joined_ids_are_those_of_the_rendered_conversation() -> None:
    for template in (quirks.CHATML, quirks.THINKING, quirks.NO_SYSTEM, quirks.ALTERNATING, quirks.TWO_ENDS):
        tokenizer = quirks.byte_level(template)
        (p,) = PromptEncoder(tokenizer, DataConfig()).encode_all([{"prompt": [ASK, said("4")]}], completions=True)
        text = tokenizer.apply_chat_template([ASK, said("4")], tokenize=False)
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = [*p.ids, *p.completion]
        assert whole[: len(ids)] == ids and tokenizer.decode(whole[len(ids) :]).strip() in ("", "<eos>")


def test_thoughts_of_an_answer_that_generation_has_opened_already(caplog: pytest.LogCaptureFixture) -> None:
    """The template would drop them: the answer's own words stand behind the prompt, and that is said."""
    tokenizer = quirks.byte_level(quirks.OPENED_THOUGHTS)
    prompt = "<|user|>2+2?<|assistant|><think>\n"
    with caplog.at_level(logging.WARNING, "llmdistill"):
        got = only(tokenizer, {"prompt": [ASK], "completion": "<think>\na sum\n</think>\n\n4"})
    assert got == (prompt, "a sum\n</think>\n\n4<|stop|>")
    assert "writes an answered turn otherwise than it opens one" in caplog.text and "(1 rows: 0)" in caplog.text
    assert only(tokenizer, {"prompt": [ASK], "completion": "a sum</think>4"}) == (prompt, "a sum</think>4<|stop|>")
    thought = only(tokenizer, {"prompt": [ASK], "completion": [said("4", reasoning_content="a sum")]})
    assert thought == (prompt, "a sum\n</think>\n\n4<|stop|>")


def test_a_template_that_writes_no_answers_is_read_for_its_prompts(caplog: pytest.LogCaptureFixture) -> None:
    asks = "{% if messages[-1]['role'] == 'assistant' %}{{ raise_exception('ends with an answer') }}{% endif %}"
    with caplog.at_level(logging.WARNING, "llmdistill"):
        got = only(quirks.byte_level(asks + quirks.CHATML), {"prompt": [ASK, said("4")]})
    assert got == (CHATML_PROMPT, "4<eos>") and "completions are the answers' own words" in caplog.text
    tools = {"prompt": [ASK, said("", tool_calls=[{"function": {"name": "add", "arguments": {}}}])]}
    with pytest.raises(UserError, match="not known how the answer's tool calls stand behind the prompt. Fix"):
        only(quirks.byte_level(asks + quirks.WITH_TOOLS), tools)


def test_a_mark_that_is_no_token_of_the_tokenizer_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A template that was taken over from another family: the mark is words, and the eos stands behind it."""
    tokenizer = quirks.byte_level(quirks.CHATML.replace("<|im_end|>", "<|done|>"))
    encoder = PromptEncoder(tokenizer, DataConfig())
    with caplog.at_level(logging.WARNING, "llmdistill"):
        (p,) = encoder.encode_all([{"prompt": [ASK, said("4")]}], completions=True)
    assert tokenizer.decode(list(p.completion)) == "4<|done|><eos>" and not encoder.ends
    assert "ends a turn with '<|done|>', which is no token; the eos follows it" in caplog.text


def test_thoughts_apart_are_written_or_refused() -> None:
    row = {"prompt": [ASK], "completion": [said("4", reasoning_content="a sum")]}
    assert only(quirks.byte_level(quirks.THINKING), row)[1] == "<think>\na sum\n</think>\n\n4<|im_end|>"
    with pytest.raises(UserError, match="row 0: the chat template does not write the answer's reasoning_content. Fix"):
        only(quirks.byte_level(quirks.CHATML), row)


def test_thoughts_of_earlier_turns_go_where_the_template_lets_them_go() -> None:
    talk = [ASK, said("<think>a</think>4"), ASK, said("<think>b</think>4")]
    prompt, completion = only(quirks.byte_level(quirks.THINKING), {"prompt": talk})
    assert "<think>" not in prompt and completion == "<think>\nb\n</think>\n\n4<|im_end|>"


def test_the_pad_token_as_eos_still_counts() -> None:
    tokenizer = quirks.byte_level(quirks.CHATML)
    tokenizer.pad_token = tokenizer.eos_token = "<|im_end|>"
    (p,) = PromptEncoder(tokenizer, DataConfig()).encode_all([{"prompt": [ASK, said("4")]}], completions=True)
    rollout = completed([p], tokenizer.pad_token_id)
    assert rollout.token_rows().tolist() == list(p.completion)
    assert p.completion[-1] == tokenizer.pad_token_id


# ---------------------------------------------------------------- seams


def test_a_blank_that_only_the_first_word_has_is_not_trained() -> None:
    """SentencePiece: alone "4" is the token for blank and 4; behind "2+2=" it is 4."""
    tokenizer = quirks.sentence_piece(None)
    encoder = PromptEncoder(tokenizer, DataConfig())
    (p,) = encoder.encode_all([{"prompt": "2+2=", "completion": "4"}], completions=True)
    joined = tokenizer("2+2=4", add_special_tokens=False)["input_ids"]
    assert [*p.ids, *p.completion] == [*joined, tokenizer.eos_token_id] and not encoder.notes
    assert tokenizer.convert_ids_to_tokens(list(p.completion)) == ["4", "<eos>"]


def test_a_token_over_the_seam_is_split_there_and_said(caplog: pytest.LogCaptureFixture) -> None:
    """Sampling starts from the prompt's own tokens: those the joined text has cannot follow."""
    sentence, bytes_ = quirks.sentence_piece(None), quirks.byte_level(None, merges=[("=", "4")])
    for tokenizer, prompt in ((sentence, "2+2= "), (bytes_, "2+2=")):
        with caplog.at_level(logging.WARNING, "llmdistill"):
            caplog.clear()
            (p,) = PromptEncoder(tokenizer, DataConfig()).encode_all(
                [{"prompt": prompt, "completion": "4"}], completions=True
            )
        assert tokenizer.convert_ids_to_tokens(list(p.completion)) == ["4", "<eos>"]
        assert p.ids == tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert "reaches from the prompt into the completion" in caplog.text


def test_a_chat_of_sentence_pieces() -> None:
    tokenizer = quirks.sentence_piece(quirks.ALTERNATING)
    (p,) = PromptEncoder(tokenizer, DataConfig()).encode_all([{"prompt": [ASK, said("4")]}], completions=True)
    assert tokenizer.convert_ids_to_tokens(list(p.completion)) == ["▁4", "<eos>"]


def test_seams_of_a_real_sentence_piece_vocabulary() -> None:
    """Mistral's, as the fast tokenizer of transformers has it: text behind text, and its template's blanks."""
    tokenizer = copy.deepcopy(vocabularies.tokenizer("mistral-fast"))
    tokenizer.chat_template = quirks.ALTERNATING
    rows = [
        {"prompt": "2+2=", "completion": "4"},
        {"prompt": "A:", "completion": " four"},
        {"prompt": [ASK, said("4")]},
    ]
    prompts = PromptEncoder(tokenizer, DataConfig()).encode_all(rows, completions=True)
    pieces = [tokenizer.convert_ids_to_tokens(list(p.completion)) for p in prompts]
    assert pieces == [["4", "</s>"], ["▁four", "</s>"], ["▁", "4", "</s>"]]
    for p, text in zip(prompts, ("2+2=4", "A: four", "<s>[INST] 2+2? [/INST] 4"), strict=True):
        assert [*p.ids, *p.completion[:-1]] == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_mistral_commons_own_tokenizers_take_strings_and_no_chats() -> None:
    tokenizer = vocabularies.tokenizer("tekken")
    (p,) = PromptEncoder(tokenizer, DataConfig()).encode_all([{"prompt": "2+2=", "completion": "4"}], completions=True)
    assert tokenizer.decode(p.ids) == "<s>2+2=" and tokenizer.decode(list(p.completion)) == "4</s>"
    with pytest.raises(UserError, match="row 0: the student's tokenizer is mistral-common's, .* Fix: --student.token"):
        PromptEncoder(tokenizer, DataConfig()).encode_all([{"prompt": [ASK, said("4")]}], completions=True)


# ---------------------------------------------------------------- strings


@pytest.mark.parametrize("around", ["<bos> $A <eos>", "$A <eos>", "<bos> $A", None])
def test_what_a_tokenizer_puts_around_a_text_is_not_between_prompt_and_completion(around: str | None) -> None:
    tokenizer = quirks.byte_level(None, around=around)
    bos = "<bos>" if around and "<bos>" in around else ""
    row = {"prompt": "2+2=", "completion": "4"}
    assert only(tokenizer, row) == (f"{bos}2+2=", "4<eos>")
    assert only(tokenizer, {**row, "prompt": "<bos>2+2="}) == ("<bos>2+2=", "4<eos>")
    assert only(tokenizer, {**row, "completion": "4<eos>"})[1] == "4<eos>"
    assert only(tokenizer, {**row, "completion": "4<eos>\n"})[1] == "4<eos>"


def test_a_document_that_the_tokenizer_closes_is_closed_once() -> None:
    for around, text in (("<bos> $A <eos>", "abc"), (None, "abc<eos>"), (None, "abc")):
        tokenizer = quirks.byte_level(None, around=around)
        (p,) = PromptEncoder(tokenizer, DataConfig(text_column="t")).encode_all([{"t": text}])
        assert tokenizer.decode([*p.ids, *p.completion]) == ("<bos>" if around else "") + "abc<eos>"


def test_a_chat_in_a_string_with_a_template_is_not_closed_twice_nor_templated_again() -> None:
    tokenizer = quirks.byte_level(quirks.CHATML)
    row = {"prompt": CHATML_PROMPT, "completion": "4<|im_end|>\n"}
    assert only(tokenizer, row) == (CHATML_PROMPT, "4<|im_end|>")
    with pytest.raises(UserError, match=r"row 0: prompt is a string that holds '<\|im_start\|>'.*applied twice"):
        only(tokenizer, {**row, "completion": [said("4")]})


# ---------------------------------------------------------------- system messages and settings


def test_a_template_without_a_system_role(caplog: pytest.LogCaptureFixture) -> None:
    """It raises, or leaves the message out: either way the words go into the first user message."""
    merged = {
        quirks.NO_SYSTEM: "<bos><turn>user\nBe brief.\n\n2+2?<end>\n<turn>model\n",
        quirks.SILENT_SYSTEM: "<turn>user\nBe brief.\n\n2+2?<end>\n<turn>assistant\n",
        quirks.ALTERNATING: "<bos>[INST] Be brief.\n\n2+2? [/INST]",
    }
    for template, prompt in merged.items():
        caplog.clear()
        with caplog.at_level(logging.WARNING, "llmdistill"):
            got = only(quirks.byte_level(template), {"prompt": [SYSTEM, ASK, said("4")]})
        assert got[0] == prompt and got[1].strip().startswith("4")
        assert "has no system role; the system message stands at the beginning of the first user message" in caplog.text


def test_several_system_messages_are_merged_together() -> None:
    got = only(
        quirks.byte_level(quirks.NO_SYSTEM), {"prompt": [SYSTEM, {**SYSTEM, "content": "Be kind."}, ASK, said("4")]}
    )
    assert got[0] == "<bos><turn>user\nBe brief.\n\nBe kind.\n\n2+2?<end>\n<turn>model\n"


def test_the_system_prompt_is_for_conversations_without_one() -> None:
    tokenizer = quirks.byte_level(quirks.DEFAULT_SYSTEM)
    own = "<|im_start|>system\nBe kind.<|im_end|>\n"
    data = {"system_prompt": "Be kind."}
    assert only(tokenizer, {"prompt": [ASK, said("4")]}, **data)[0] == own + CHATML_PROMPT
    assert "Be brief." in only(tokenizer, {"prompt": [SYSTEM, ASK, said("4")]}, **data)[0]
    gemma = only(quirks.byte_level(quirks.NO_SYSTEM), {"prompt": [ASK, said("4")]}, **data)
    assert gemma[0] == "<bos><turn>user\nBe kind.\n\n2+2?<end>\n<turn>model\n"


def test_what_the_template_reads_beside_the_messages() -> None:
    tokenizer = quirks.byte_level(quirks.THINKING)
    silent = {"chat_template_kwargs": {"enable_thinking": False}}
    got = only(tokenizer, {"prompt": [ASK, said("4")]}, **silent)
    assert got == (CHATML_PROMPT + "<think>\n\n</think>\n\n", "4<|im_end|>")
    dated = only(
        quirks.byte_level(quirks.TRIMMED), {"prompt": [ASK, said("4")]}, chat_template_kwargs={"date_string": "1 May"}
    )
    assert "Today: 1 May\n" in dated[0]
    with pytest.raises(UserError, match="data.chat_template_kwargs has 'enable_thinkin', which .* does not read. Fix"):
        PromptEncoder(tokenizer, DataConfig(chat_template_kwargs={"enable_thinkin": False}))
    with pytest.raises(UserError, match="data.chat_template_kwargs is 'tools'; it must be a name that only"):
        DataConfig(chat_template_kwargs={"tools": []})


@pytest.mark.parametrize(
    ("data", "row"),
    [
        ({"system_prompt": "Be kind."}, {}),
        ({"chat_template_kwargs": {"enable_thinking": False}}, {}),
        ({}, {"tools": [{"name": "add"}]}),
    ],
)
def test_settings_of_templates_beside_string_prompts_are_refused(data: Any, row: Any) -> None:
    with pytest.raises(UserError, match="row 0: prompt is a string, which no chat template writes, and .*Fix: "):
        only(quirks.byte_level(quirks.THINKING), {"prompt": "2+2=", "completion": "4", **row}, **data)


def test_contexts_are_rendered_with_the_same_settings() -> None:
    tokenizer = quirks.byte_level(quirks.THINKING)
    data = DataConfig(
        contexts={"told": "hint"}, system_prompt="Be kind.", chat_template_kwargs={"enable_thinking": False}
    )
    encoder = PromptEncoder(tokenizer, data)
    added = encoder({"prompt": [ASK, said("4")], "hint": "It is 4."}).contexts["told"]
    whole = encoder({"prompt": [ASK], "hint": [{"role": "user", "content": "2+2?\n\nIt is 4."}]}).contexts["told"]
    assert added == whole
    assert tokenizer.decode(list(added)) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n2+2?\n\nIt is 4.<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n"
    )


def test_a_judge_of_another_family_is_given_what_its_template_reads() -> None:
    data = DataConfig(system_prompt="Be kind.", chat_template_kwargs={"enable_thinking": False})
    own, judge = quirks.byte_level(quirks.THINKING), quirks.byte_level(quirks.NO_SYSTEM)
    encoder = PromptEncoder(own, data, {"teacher": judge})
    prompt = encoder({"prompt": [ASK, said("4")]})
    assert prompt.readings["teacher"].text == "<bos><turn>user\nBe kind.\n\n2+2?<end>\n<turn>model\n"
    assert prompt.text.endswith("<think>\n\n</think>\n\n")


# ---------------------------------------------------------------- generation tags


def test_generation_tags_say_which_tokens_count(caplog: pytest.LogCaptureFixture) -> None:
    """The header of an answer is read and not trained on; the end of turn is, though the tags leave it out."""
    tokenizer = quirks.byte_level(quirks.TAGGED)
    encoder = PromptEncoder(tokenizer, DataConfig())
    with caplog.at_level(logging.WARNING, "llmdistill"):
        prompts = encoder.encode_all([{"prompt": [ASK, said("4")]}, {"prompt": [ASK, said("42")]}], completions=True)
    assert "leave out the end of turn" in caplog.text
    rollout = completed(prompts, 0)
    assert tokenizer.decode(rollout.token_rows().tolist()) == "4<|im_end|>42<|im_end|>"
    assert tokenizer.decode(list(prompts[0].completion)) == "[calm] 4<|im_end|>"
    pair = pair_encoder(tokenizer, DataConfig())({"prompt": [ASK], "chosen": "4", "rejected": "5"})
    assert pair.chosen_counts == (False,) * 7 + (True, True) == pair.rejected_counts
