"""What cannot be aligned between two tokenizers is counted, trained on in another form, or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers

from llmdistill.errors import UserError
from llmdistill.preflight import examine
from llmdistill.teachers.local import LocalTeacher
from tests import tiny
from tests.methods import rounds
from tests.methods.test_chunks import make, other_teacher, teacher_tokenizer, text
from tests.tokenization import vocabularies

PLAIN = {"debias": False}


def teacher_of(tok: Any) -> LocalTeacher:
    if tok.pad_token is None:
        tok.pad_token = tok.unk_token or tok.eos_token
    model = tiny.llama(3, vocab=len(tok))
    if tok.eos_token_id is not None:
        model.generation_config.eos_token_id = tok.eos_token_id
    return LocalTeacher(model, tok)


LOSSY: dict[str, tuple[Any, str]] = {  # a tokenizer that keeps not all of a text, and a text of which it does not
    "NFKC": (lambda: vocabularies.byte_level(normalizer=normalizers.NFKC(), eos_token="<end>"), "ok ﬁne １２"),
    "stripped": (lambda: vocabularies.byte_level(normalizer=normalizers.Strip(), eos_token="<end>"), "ok fine  "),
    "lower case": (lambda: vocabularies.byte_level(normalizer=normalizers.Lowercase(), eos_token="<end>"), "Ok FINE"),
    "wordpiece": (lambda: vocabularies.wordpiece(["ok", "fine", "a"]), "OK   fine"),
}


@pytest.mark.parametrize("kind", LOSSY)
def test_a_text_that_a_tokenizer_changes_is_aligned_on_its_normal_form_and_counted(tmp_path: Path, kind: str) -> None:
    """Three of four rows as they stand: those are exact. Distributions are compared on the exact ones alone."""
    made, changed = LOSSY[kind]
    plain = "ok fine" if kind != "wordpiece" else "ok fine a"
    rows = [{"prompt": "a ", "completion": c} for c in (plain, changed, plain, plain)]
    t = make(tmp_path, "alm", teacher=teacher_of(made()), rows=rows, max_steps=1, **PLAIN)
    t.train()
    line = t.state.log_history[0]
    # One strips the last space of the prompt before it: none of its texts is exact.
    inexact = 1.0 if kind == "stripped" else 0.25
    assert line["teacher/aligned_bytes"] == line["teacher/aligned_rows"] == 1.0
    assert line["teacher/inexact_rows"] == inexact
    judge = t.judges["teacher"]
    read = judge.retokenizer(*_completed(t), "teacher")
    assert bool(read.level.any()) == (inexact < 1)
    of_changed = read.student_chunks.split(_completed(t)[0].row_counts)[1]
    assert not read.level[of_changed[of_changed >= 0]].any()


def _completed(t: Any) -> Any:
    from llmdistill.texts.prompts import completed

    prompts = list(t.train_dataset)
    return completed(prompts, 0), prompts


def test_what_was_aligned_is_logged_in_parts(tmp_path: Path) -> None:
    """Of digits and ends of turns alone, of tokens; and what the judge's template adds."""
    words = vocabularies.wordpiece(["ok", "1", "2"])
    rows = [{"prompt": "ok ", "completion": c} for c in ("ok 12", "ok 猫 21", "1", "2 ok")]
    t = make(tmp_path, "alm", teacher=teacher_of(words), rows=rows, max_steps=1, min_aligned=0.1, **PLAIN)
    t.train()
    line = t.state.log_history[0]
    assert line["teacher/aligned_rows"] == 0.75 and line["teacher/aligned_digits"] == pytest.approx(4 / 6)
    assert line["teacher/aligned_ends"] == 0.0  # this one has no token for it: no chunk says that it ends
    assert 0 < line["teacher/tokens_in_chunks"] < 1
    t = make(tmp_path / "b", "alm", rows=tiny.rows(4), max_steps=1, **PLAIN)
    t.train()
    line = t.state.log_history[0]
    names = ("aligned_digits", "aligned_ends", "tokens_in_chunks")
    assert [line[f"teacher/{name}"] for name in names] == [1.0, 1.0, 1.0]
    assert line["teacher/template_tokens"] > 3


def test_a_vocabulary_without_a_character_names_it(tmp_path: Path) -> None:
    rows = [{"prompt": "ok ", "completion": "ok 猫"}] * 4
    t = make(tmp_path, "alm", teacher=teacher_of(vocabularies.wordpiece(["ok"])), rows=rows, **PLAIN)
    with pytest.raises(UserError) as refused:
        t.train()
    line = str(refused.value)
    assert "\n" not in line and "the teacher's tokenizer has no token for what comes after 'ok'" in line
    assert "teacher.min_aligned is 0.9" in line and "Fix:" in line


def test_a_template_without_a_content_span_is_refused(tmp_path: Path) -> None:
    tok = teacher_tokenizer()
    tok.chat_template = "{% for m in messages %}<turn>{% endfor %}{% if add_generation_prompt %}: {% endif %}"
    with pytest.raises(UserError) as refused:
        make(tmp_path, "alm", teacher=teacher_of(tok))
    line = str(refused.value)
    assert line.startswith("row 0: teacher's chat template writes nothing of what the user says") and "\n" not in line
    make(
        tmp_path / "b", "alm", teacher=teacher_of(tok), rows=[{"prompt": "a ", "completion": "b"}]
    )  # no chat, no matter


def test_what_a_judges_template_does_to_rows_is_a_notice(tmp_path: Path) -> None:
    tok = teacher_tokenizer()
    tok.chat_template = (
        "{% for m in messages %}{{ m['content'] | replace('add', 'sum') }}{% endfor %}"
        "{% if add_generation_prompt %}: {% endif %}"
    )
    found = [str(f) for f in examine(make(tmp_path, "alm", teacher=teacher_of(tok))) if f.check == "chat-template"]
    assert any(
        "teacher: the chat template changes or leaves out what a message of role 'user' says" in f for f in found
    )


def test_the_same_tokenizer_is_said_and_a_larger_one_is_not_it(tmp_path: Path, caplog: Any) -> None:
    """A vocabulary that goes on where the student's ends cuts a text otherwise: its ids are not the student's."""
    make(tmp_path, "alm", teacher=LocalTeacher(tiny.llama(2), tiny.tokenizer()), **PLAIN)
    assert "has the student's tokenizer: every token is a chunk" in caplog.text
    caplog.clear()
    student = vocabularies.byte_level(eos_token="<end>", pad_token="<p>")
    student.chat_template = tiny.TEMPLATE
    larger = other_teacher()  # the same ids, and merges behind them
    t = make(tmp_path / "b", "alm", teacher=larger, student=tiny.llama(1), processing_class=student, **PLAIN)
    assert "has the student's tokenizer" not in caplog.text
    loss, _ = rounds.gradients(t, text(t))
    assert loss > 0 and torch.isfinite(torch.tensor(loss))
