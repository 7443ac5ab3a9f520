"""Rows as people bring them: every shape of a conversation is the same conversation, or refused in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Sequence, Value

from llmdistill import OPDConfig, OPDTrainer, RolloutConfig, redi
from llmdistill.errors import UserError
from llmdistill.opd import main as opd
from llmdistill.recipe.data_config import DataConfig
from llmdistill.texts.loading import load_rows
from llmdistill.texts.pairs import pair_encoder
from llmdistill.texts.prompts import PromptEncoder
from tests import tiny
from tests.texts import quirks
from tests.texts.test_templates import ASK, CHATML_PROMPT, encoded, only, said

TALK = [ASK, said("4"), {"role": "user", "content": "3+3?"}, said("6")]
SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "2+2?"},
    {"from": "gpt", "value": "4"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "number"}}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}


# ---------------------------------------------------------------- shapes


def test_sharegpt_rows() -> None:
    usual = [{"role": "system", "content": "Be brief."}, ASK, said("4")]
    tokenizer = quirks.byte_level(quirks.CHATML)
    assert only(tokenizer, {"prompt": SHAREGPT}) == only(tokenizer, {"prompt": usual})
    other = [{"from": "user", "value": "2+2?"}, {"from": "model", "value": "4"}]
    assert only(tokenizer, {"c": other}, prompt_column="c") == (CHATML_PROMPT, "4<|im_end|>")


def test_roles_and_single_messages_as_people_write_them() -> None:
    tokenizer = quirks.byte_level(quirks.CHATML)
    expected = (CHATML_PROMPT, "4<|im_end|>")
    capitals = [{"role": "User", "content": "2+2?"}, {"role": "Assistant", "content": "4"}]
    assert only(tokenizer, {"prompt": capitals}) == expected
    assert only(tokenizer, {"prompt": [{"from": "Human", "value": "2+2?"}, {"from": "AI", "value": "4"}]}) == expected
    assert only(tokenizer, {"prompt": ASK, "completion": said("4")}) == expected


def test_marks_in_the_words_of_messages_are_said(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = quirks.byte_level(quirks.CHATML)
    with caplog.at_level("WARNING", "llmdistill"):
        only(tokenizer, {"prompt": [{"role": "user", "content": "what is <|im_end|>?"}, said("4")]})
        assert "messages hold '<|im_end|>' in their words" in caplog.text
        got = only(tokenizer, {"prompt": [ASK, said("4<|im_end|>\n<|im_start|>user\nmore")]})
    assert (
        got[1].startswith("4<|im_end|>") and "answers hold the end of turn, '<|im_end|>', in their words" in caplog.text
    )


def test_a_sequence_of_structs_as_datasets_keeps_it() -> None:
    features = Features({"prompt": Sequence({"role": Value("string"), "content": Value("string")})})
    rows = Dataset.from_list([{"prompt": {"role": ["user", "assistant"], "content": ["2+2?", "4"]}}], features=features)
    assert only(quirks.byte_level(quirks.CHATML), rows[0]) == (CHATML_PROMPT, "4<|im_end|>")


def test_conversations_as_json_text() -> None:
    tokenizer = quirks.byte_level(quirks.CHATML)
    expected = (CHATML_PROMPT, "4<|im_end|>")
    for talk in ([ASK, said("4")], SHAREGPT[1:]):
        assert only(tokenizer, {"prompt": json.dumps(talk)}) == expected
    assert only(tokenizer, {"prompt": json.dumps([ASK]), "completion": json.dumps([said("4")])}) == expected
    for text in ('[{"a": 1}]', "[{not JSON", '[{"role": "user"}]'):  # a prompt like any other
        assert only(tokenizer, {"prompt": text, "completion": "4"}) == (text, "4<eos>")


def test_keys_that_are_none_because_of_parquet_are_not_there(tmp_path: Path) -> None:
    """Of messages, of tool calls and their arguments, and of tools; the message itself has content, if empty."""
    rows = [
        {
            "prompt": [
                {"role": "user", "content": "2+2?"},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "4", "name": "add"},
                said("4"),
            ],
            "tools": TOOLS,
        },
        {"prompt": [ASK, {**said("4"), "tool_calls": [{"function": {"name": "x", "arguments": {"c": 1}}}]}]},
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    read = load_rows(str(tmp_path / "rows.parquet"), DataConfig(), "data.train")
    assert read[0]["prompt"][0]["name"] is None  # what Parquet makes of it
    tokenizer = quirks.byte_level(quirks.WITH_TOOLS)
    first, second = (only(tokenizer, row) for row in read)
    schema = json.dumps(TOOLS)
    assert first == (
        f"<|im_start|>tools\n{schema}<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
        ' <call>add{"a": 2, "b": 2}</call><|im_end|>\n<|im_start|>tool\n(add) 4<|im_end|>\n<|im_start|>assistant\n',
        "4<|im_end|>",
    )
    assert second == (CHATML_PROMPT, '4 <call>x{"c": 1}</call><|im_end|>')


def test_tool_calls_and_tools_as_json_text() -> None:
    tokenizer = quirks.byte_level(quirks.WITH_TOOLS)
    text_call = {"function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
    got = [
        only(tokenizer, {"prompt": [ASK], "completion": [said("", tool_calls=[call])], "tools": tools})
        for call, tools in ((CALL, TOOLS), (text_call, json.dumps(TOOLS)))
    ]
    assert got[0] == got[1] and got[0][1] == ' <call>add{"a": 2, "b": 2}</call><|im_end|>'
    as_text = quirks.WITH_TOOLS.replace("call['function']['arguments'] | tojson", "'!' + call['function']['arguments']")
    other = only(quirks.byte_level(as_text), {"prompt": [ASK], "completion": [said("", tool_calls=[CALL])]})
    assert other[1] == ' <call>add!{"a": 2, "b": 2}</call><|im_end|>'  # a template that wants text gets text
    named = only(tokenizer, {"prompt": [ASK, said("4")], "functions": TOOLS}, tools_column="functions")
    assert named[0].startswith("<|im_start|>tools\n")
    for calls in (json.dumps([CALL]), CALL, [{"function": {**CALL["function"], "arguments": '{"a": 2, "b": 2}'}}]):
        assert only(tokenizer, {"prompt": [ASK], "completion": [said("", tool_calls=calls)], "tools": TOOLS}) == got[0]
    for nothing in (None, "", {}):
        bare = {"function": {"name": "add", "arguments": nothing}}
        assert only(tokenizer, {"prompt": [ASK, said("", tool_calls=[bare])]})[1] == " <call>add{}</call><|im_end|>"
    first_form = said("", function_call=CALL["function"])  # OpenAI's
    assert only(tokenizer, {"prompt": [ASK], "completion": [first_form], "tools": TOOLS}) == got[0]
    for nothing in (None, [], "", {}, "{}"):
        assert only(tokenizer, {"prompt": [ASK, said("4")], "tools": nothing})[0] == CHATML_PROMPT


def test_content_in_parts() -> None:
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    talk = [{"role": "user", "content": parts}, said([{"type": "text", "text": "4"}])]  # type: ignore[arg-type]
    for template in (quirks.CHATML, quirks.PARTS_ONLY):
        assert only(quirks.byte_level(template), {"prompt": talk}) == (CHATML_PROMPT, "4<|im_end|>")


# ---------------------------------------------------------------- turns


def test_the_last_answer_counts_or_all_of_them() -> None:
    """Each behind what was said before it, in the way it would be generated."""
    tokenizer = quirks.byte_level(quirks.CHATML)
    second = CHATML_PROMPT + "4<|im_end|>\n<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n"
    assert encoded(tokenizer, {"prompt": TALK}) == [(second, "6<|im_end|>")]
    every = [(CHATML_PROMPT, "4<|im_end|>"), (second, "6<|im_end|>")]
    for row in (
        {"prompt": TALK},
        {"prompt": TALK[:3], "completion": "6"},
        {"prompt": TALK[:1], "completion": TALK[1:]},
        {"prompt": TALK[:3], "completion": TALK},
    ):
        assert encoded(tokenizer, row, assistant_turns="all") == every
    assert encoded(tokenizer, {"prompt": TALK[:3]}, assistant_turns="all") == every[:1]  # nobody answered the last
    thoughts = [ASK, said("<think>a</think>4"), ASK, said("<think>b</think>4")]
    got = encoded(quirks.byte_level(quirks.THINKING), {"prompt": thoughts}, assistant_turns="all")
    assert [c for _, c in got] == [f"<think>\n{t}\n</think>\n\n4<|im_end|>" for t in "ab"]


def test_positives_for_fine_tuning_are_conversations_too() -> None:
    tokenizer = quirks.byte_level(quirks.CHATML)
    for turns, answers in (("last", ["6<|im_end|>"]), ("all", ["4<|im_end|>", "6<|im_end|>"])):
        encoder = pair_encoder(tokenizer, DataConfig(assistant_turns=turns))  # type: ignore[arg-type]
        pairs = encoder.encode_all([{"prompt": TALK}], "data.train", positive=True)
        assert [tokenizer.decode(list(p.chosen)) for p in pairs] == answers


def test_pairs_as_whole_conversations() -> None:
    tokenizer = quirks.byte_level(quirks.CHATML)
    encoder = pair_encoder(tokenizer, DataConfig())
    row = {"prompt": "2+2?", "chosen": [ASK, said("4")], "rejected": [ASK, said("5")]}  # as preference sets have it
    pair = encoder(row)
    assert tokenizer.decode(pair.prompt.ids) == CHATML_PROMPT
    assert [tokenizer.decode(list(side)) for side in (pair.chosen, pair.rejected)] == ["4<|im_end|>", "5<|im_end|>"]
    mixed = encoder({**row, "rejected": "5"})
    assert (mixed.prompt.ids, mixed.rejected) == (pair.prompt.ids, pair.rejected)
    talks = {"prompt": TALK[:3], "chosen": "6", "rejected": "7"}
    assert encoder(talks).chosen == encoder({**talks, "prompt": json.dumps(TALK[:3])}).chosen
    with pytest.raises(UserError, match="row 0: data.assistant_turns is all, and of a pair's .* Fix: "):
        pair_encoder(tokenizer, DataConfig(assistant_turns="all"))(talks)
    parted = {**row, "rejected": [ASK, said("5"), ASK, said("6")]}
    with pytest.raises(UserError, match="row 0: chosen and rejected are conversations that part before their last"):
        encoder(parted)


def test_an_answered_prompt_asks_for_no_other_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The student is sampled where the answer stood, and all that is sampled or measured begins there."""
    tokenizer = quirks.byte_level(quirks.CHATML)
    args = OPDConfig(
        output_dir=str(tmp_path), max_steps=1, rollouts=RolloutConfig(max_new_tokens=4), save_strategy="no"
    )
    rows = [{"prompt": [ASK, said(str(i))]} for i in range(8)]
    model, other = tiny.llama(1, vocab=288), tiny.llama(2, vocab=288)
    trainer = OPDTrainer(
        model, args, other, train_dataset=rows, eval_dataset=rows[:2], processing_class=tokenizer, preflight=False
    )
    assert {tokenizer.decode(p.ids) for p in trainer.train_dataset} == {CHATML_PROMPT}
    assert "conversations end with an answer; the student is asked for its own in that place (8 rows" in caplog.text
    trainer.train()


def test_conversations_from_a_recipe(tmp_path: Path) -> None:
    """The answer is in the conversation; arguments of the template and a system prompt are on the command line."""
    tiny.llama(1, vocab=288).save_pretrained(tmp_path / "student")
    tiny.llama(2, vocab=288).save_pretrained(tmp_path / "teacher")
    for name in ("student", "teacher"):
        quirks.byte_level(quirks.THINKING).save_pretrained(tmp_path / name)
    rows = [
        {"conversations": [{"from": "human", "value": f"{i}+1"}, {"from": "gpt", "value": str(i + 1)}]}
        for i in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        **{"student.model": tmp_path / "student", "teacher.model": tmp_path / "teacher", "teacher.dtype": "float32"},
        **{"data.train": tmp_path / "rows.jsonl", "output_dir": tmp_path / "run", "max_steps": 1},
        **{"sequences": "dataset", "per_device_train_batch_size": 2, "save_strategy": "no"},
        **{"data.system_prompt": "Be kind.", "data.chat_template_kwargs": '{"enable_thinking": false}'},
    }
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    opd(words)
    assert (tmp_path / "run" / "student").is_dir()


def test_fine_tuning_on_conversations_from_the_command_line(tmp_path: Path) -> None:
    """No column of completions is needed, and every answer is a text of its own."""
    tiny.llama(1, vocab=288).save_pretrained(tmp_path / "student")
    quirks.byte_level(quirks.CHATML).save_pretrained(tmp_path / "student")
    (tmp_path / "rows.jsonl").write_text((json.dumps({"messages": TALK}) + "\n") * 4)
    given = {
        **{
            "student.model": tmp_path / "student",
            "data.train": tmp_path / "rows.jsonl",
            "output_dir": tmp_path / "run",
        },
        **{"data.prompt_column": "messages", "data.assistant_turns": "all", "method": "sft", "stage1_epochs": 1},
        **{"stage1_batch_size": 4},
    }
    redi.main([word for key, value in given.items() for word in (f"--{key}", str(value))])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2  # eight answers by fours


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"prompt": [{"text": "2+2?"}]}, "row 0: prompt[0] has the keys 'text'; it must have role and content"),
        ({"prompt": ["2+2?"]}, "row 0: prompt[0] is '2+2?'; it must be a message with role and content"),
        ({"prompt": {"role": "user"}}, "row 0: prompt is \"{'role': 'user'}\"; it must be a list of messages"),
        ({"prompt": [{"role": "user", "content": 7}]}, "row 0: prompt[0].content is '7'; it must be text, or parts"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            "row 0: prompt[0].content has a part of type 'image'; only text is read here",
        ),
        ({"prompt": 4, "completion": "4"}, "row 0: prompt is '4', a int; it must be text or messages"),
        ({"prompt": [ASK], "completion": 4}, "row 0: completion is '4', a int; it must be text or messages"),
        ({"prompt": [ASK], "completion": "4 \ud83d"}, "row 0: completion holds '\\ud83d', half of a character"),
        ({"prompt": "\udc00?", "completion": "4"}, "row 0: prompt holds '\\udc00', half of a character"),
        ({"prompt": [ASK, said("4 \ud83d")]}, "row 0: prompt[1].content holds '\\ud83d', half of a character"),
        ({"prompt": [ASK, said("", tool_calls="add")]}, "row 0: prompt[1].tool_calls is 'add'; it must be a list"),
        ({"prompt": [said("4")]}, "row 0: nothing stands before the answer in prompt"),
        ({"prompt": [ASK, said("4"), said("5")]}, "row 0: another assistant message stands before the answer"),
        (
            {"prompt": [ASK, said("4")], "completion": "5"},
            "row 0: prompt ends with an assistant message and completion has another answer. Fix: leave one",
        ),
        ({"prompt": [ASK], "completion": [ASK, ASK]}, "row 0: completion ends with a message of role 'user'"),
        ({"prompt": [ASK], "completion": [said("")]}, "row 0: completion is empty"),
        ({"prompt": [ASK], "completion": []}, "row 0: completion is empty"),
        ({"prompt": [ASK, said(None)]}, "row 0: completion is empty"),  # type: ignore[arg-type]
        ({"prompt": [ASK, said("4")], "tools": "add"}, "tools is 'add'; it must be a list of tools' JSON schemas"),
        (
            {"prompt": [ASK], "completion": [said("", tool_calls=[CALL])]},
            "row 0: the chat template does not write the answer's tool call 'add'. Fix: ",
        ),
    ],
)
def test_rows_that_are_no_conversation(row: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match="Fix: ") as error:
        only(quirks.byte_level(quirks.CHATML), row)
    assert line in str(error.value)


def test_messages_that_the_template_refuses_are_named_with_its_reason() -> None:
    row = {"prompt": [ASK, ASK, said("4")]}
    with pytest.raises(
        UserError,
        match="row 0: the chat template refuses messages of the roles user, user: roles must alternate.*Fix: mend",
    ):
        only(quirks.byte_level(quirks.ALTERNATING), row)


def test_weights_of_tokens_are_for_one_answer() -> None:
    tokenizer = quirks.byte_level(quirks.CHATML)
    row = {"prompt": TALK, "w": [0.5]}
    data = {"weight_column": "w"}
    encoder = PromptEncoder(tokenizer, DataConfig(**data))
    (p,) = encoder.encode_all([row], completions=True)
    assert p.weight == (0.5, 1.0)  # of the answer, and of its end of turn
    with pytest.raises(UserError, match="row 0: w has 1 weights, .* and the row 2 turns. Fix"):
        encoded(tokenizer, row, assistant_turns="all", **data)
    with pytest.raises(UserError, match="data.contexts is .* empty for data.assistant_turns all"):
        DataConfig(assistant_turns="all", contexts={"told": "hint"})
