"""Benchmarks are asked the way the student is trained: system prompt, template arguments, templates without a role."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from llmdistill import DataConfig, OPDConfig, OPDTrainer
from llmdistill.errors import UserError
from llmdistill.evals import templates
from llmdistill.evals.callback import EvalCallback
from llmdistill.evals.command import run
from llmdistill.evals.config import EvalConfig
from llmdistill.evals.engines.http import OpenAIEngine
from llmdistill.evals.records import EvalFolder
from llmdistill.evals.templates import find_template
from llmdistill.pipeline.run import add_evaluations
from llmdistill.recipe.config import EvalsConfig
from tests import tiny
from tests.evals import made
from tests.texts import quirks

OFF = {"enable_thinking": False}


def test_a_suite_s_system_message_joins_the_question_where_there_is_no_such_role(
    caplog: pytest.LogCaptureFixture,
) -> None:
    templates._warn.cache_clear()
    with caplog.at_level(logging.WARNING, "llmdistill"):
        texts = [find_template("qwen-math").render(q, quirks.byte_level(quirks.NO_SYSTEM))[0] for q in ("2+2?", "1?")]
    steps = find_template("qwen-math").system
    assert texts[0] == f"<bos><turn>user\n{steps}\n\n2+2?<end>\n<turn>model\n"
    assert caplog.text.count("has no system role") == 1


def test_settings_of_an_evaluation_reach_the_template() -> None:
    tokenizer = quirks.byte_level(quirks.THINKING)
    text, ids = find_template("plain").render("2+2?", tokenizer, system_prompt="Be kind.", kwargs=OFF)
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n"
    )
    assert tokenizer.decode(ids) == text
    own, _ = find_template("qwen-math").render("2+2?", tokenizer, system_prompt="Be kind.")
    assert "Be kind." not in own and find_template("qwen-math").system in own


def test_the_command_reads_them(tmp_path: Path) -> None:
    model, suite = made.model(tmp_path, quirks.THINKING.replace("<|im_start|>", "<user>")), made.suite(tmp_path)
    words = [str(suite), "--model", str(model), "--engine", "hf", "--max_new_tokens", "2", "--output_dir"]
    chat = ["--system_prompt", "Be kind.", "--chat_template_kwargs", '{"enable_thinking": false}']
    assert run([*words, str(tmp_path / "out"), "--limit", "1", *chat]) == 0
    (folder,) = (tmp_path / "out").iterdir()
    settings: Any = EvalFolder(folder).read_config()
    assert settings["thinking"] is False and settings["chat"] == {"system_prompt": "Be kind.", "kwargs": {}}
    with pytest.raises(UserError, match="chat_template_kwargs"):
        run([*words, str(tmp_path / "other"), "--chat_template_kwargs", "[1]"])


def test_what_contradicts_itself_is_refused() -> None:
    with pytest.raises(UserError, match="thinking is 'on'; it must be default beside chat_template_kwargs"):
        EvalConfig(model="m", thinking="on", chat_template_kwargs=OFF)
    with pytest.raises(UserError, match="names that only the template reads"):
        EvalConfig(model="m", chat_template_kwargs={"tools": []})
    assert EvalConfig(model="m", chat_template_kwargs={**OFF, "a": 1}).template_kwargs == {"a": 1}


def test_evaluations_during_training_write_chats_as_training_does(tmp_path: Path) -> None:
    data = DataConfig(system_prompt="Be kind.", chat_template_kwargs=OFF)
    trainer = OPDTrainer(
        tiny.llama(1, vocab=288),
        OPDConfig(output_dir=str(tmp_path)),
        tiny.llama(2, vocab=288),
        train_dataset=[{"prompt": [{"role": "user", "content": "2+2?"}]}],
        processing_class=quirks.byte_level(quirks.THINKING),
        data=data,
    )
    add_evaluations(trainer, EvalsConfig(suites=[str(made.suite(tmp_path))], problems=1, longest=4), data)
    (callback,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, EvalCallback)]
    prompt, (asked, *_) = trainer.train_dataset[0].text, callback.jobs[0].asked
    front, back = prompt.split("2+2?")
    assert asked.text.startswith(front) and asked.text.endswith(back)


def test_an_endpoint_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = object.__new__(OpenAIEngine)
    engine.api, engine.thinking, engine.chat_template_kwargs = "chat", False, {"date_string": "1 May"}
    asked: Any = type("Asked", (), {"messages": ({"role": "user", "content": "?"},), "prefill": ""})
    assert engine._prompt(asked)["chat_template_kwargs"] == {**OFF, "date_string": "1 May"}
