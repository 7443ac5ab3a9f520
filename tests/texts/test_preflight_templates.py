"""What the start-up checks say of templates, their settings and their ends of turns."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from llmdistill import DataConfig, OPDConfig, OPDTrainer
from llmdistill.preflight import CHECKS, examine, name_of
from llmdistill.teachers.local import LocalTeacher
from tests import tiny
from tests.texts import quirks
from tests.texts.test_templates import ASK, SYSTEM

NAMES = [name_of(check) for check in CHECKS]
ROWS = [{"prompt": [ASK], "completion": "4"}, {"prompt": [SYSTEM, ASK], "completion": "4"}]


def found(out: Path, check: str, student: str, teacher: str | None = None, **settings: Any) -> list[str]:
    """Level and message of every finding of one check."""
    data = {k: settings.pop(k) for k in list(settings) if k in ("system_prompt", "chat_template_kwargs")}
    model = tiny.llama(1, vocab=288)
    model.generation_config.eos_token_id = settings.pop("ends", 1)
    eos = settings.pop("eos", "<eos>")
    trainer = OPDTrainer(
        model,
        OPDConfig(output_dir=str(out), **settings),
        LocalTeacher(tiny.llama(2, vocab=288), quirks.byte_level(teacher or student)),
        train_dataset=ROWS,
        processing_class=quirks.byte_level(student, eos=eos),
        data=DataConfig(**data),
    )
    findings = examine(trainer, skip=[n for n in NAMES if n != check])
    return [f"{f.level} {f.message}" for f in findings if f.check == check]


def test_templates_are_compared_by_what_they_write_under_the_settings(tmp_path: Path) -> None:
    """The texts of the templates may differ where their conversations do not."""
    spelled = quirks.CHATML.replace("m['role']", "m.role").replace("m['content']", "m.content")
    (line,) = found(tmp_path, "chat-template", quirks.CHATML, spelled)
    assert line == "ok the templates differ, and write conversations alike under these settings"
    # The default system message is the only difference; a system prompt takes it away.
    (line,) = found(tmp_path, "chat-template", quirks.CHATML, quirks.DEFAULT_SYSTEM)
    assert line.startswith("notice the student's template (")
    (line,) = found(tmp_path, "chat-template", quirks.CHATML, quirks.DEFAULT_SYSTEM, system_prompt="Be kind.")
    assert line.startswith("ok ")
    # Thinking turned off is something that the teacher's template does not read.
    off = {"enable_thinking": False}
    (line,) = found(tmp_path, "chat-template", quirks.THINKING, quirks.CHATML, chat_template_kwargs=off)
    assert line.startswith("notice the student's template (")


def test_what_was_done_around_the_template_is_a_notice(tmp_path: Path) -> None:
    lines = found(tmp_path, "chat-template", quirks.NO_SYSTEM)
    assert [line for line in lines if "no system role" in line] == [
        "notice the chat template has no system role; the system message stands at the beginning of the first user "
        "message (1 rows; first: row 1)"
    ]


def test_a_template_that_writes_the_date(tmp_path: Path) -> None:
    lines = found(tmp_path, "chat-template", quirks.TRIMMED)
    assert any(line.startswith("notice the student's template writes today's date") for line in lines)
    kwargs = {"date_string": "1 May"}
    assert time.strftime("%Y") not in kwargs["date_string"]
    assert len(found(tmp_path, "chat-template", quirks.TRIMMED, chat_template_kwargs=kwargs)) == 1


@pytest.mark.parametrize("sequences", ["student", "dataset"])
def test_an_end_of_turn_that_stops_nothing(sequences: str, tmp_path: Path) -> None:
    """A student that is sampled is said to go on; one that is trained on completions ends there from now on."""
    lines = found(tmp_path, "eos-pad", quirks.CHATML, sequences=sequences)
    said = [line for line in lines if "'<|im_end|>', where the student goes on" in line]
    assert len(said) == (1 if sequences == "student" else 0)
    assert bool([line for line in lines if "the student also ends at [4]" in line]) == (sequences == "dataset")


def test_the_tokenizer_s_eos_matters_where_it_closes_completions(tmp_path: Path) -> None:
    """The template closes them with an id that stops the student, whatever the tokenizer calls its eos."""
    lines = found(tmp_path, "eos-pad", quirks.CHATML, sequences="dataset", ends=[1, 4], eos="<|stop|>")
    assert [line.split()[0] for line in lines] == ["notice", "notice"] and "fail" not in " ".join(lines)
    lines = found(tmp_path, "eos-pad", tiny.TEMPLATE, sequences="dataset", eos="<|stop|>")
    assert any(line.startswith("fail") and "a token that stops nothing" in line for line in lines)
