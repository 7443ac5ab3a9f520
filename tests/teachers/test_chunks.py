"""A teacher of another tokenizer says the same of chunks wherever it runs, and is refused without its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmdistill.errors import UserError
from llmdistill.teachers.chunks import Question, in_chunks
from llmdistill.teachers.connecting import connect
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.stored import StoredTeacher
from llmdistill.texts.chat import ChatTemplate
from tests import tiny
from tests.methods import test_chunks as made
from tests.service.faulty import Faulty
from tests.service.small import Small

PLAIN = Question()


def told(teacher: Any, folder: Path, question: Question = PLAIN) -> list[torch.Tensor]:
    t = made.make(folder, "chunk_opd", teacher=made.other_teacher())
    text = made.text(t)
    own = tiny.tokenizer()
    template = ChatTemplate(made.teacher_tokenizer())
    judge = in_chunks(teacher, "teacher", own, [own.eos_token_id], template, min_aligned=0.9)
    return list(judge.chunks(text.rollout, text.prompts, question).tensors)


def test_every_road_says_the_same(tmp_path: Path) -> None:
    """In this process with whole distributions and without, over HTTP, and from disk the second time."""
    local = made.other_teacher()
    local.tokenizer.save_pretrained(tmp_path / "tokenizer")
    expected = told(local, tmp_path / "a")
    assert float(expected[1].min()) < -1 and int(expected[2].max()) > 5
    with Faulty(small=Small(local)) as server:
        remote = connect(server.url, tokenizer=str(tmp_path / "tokenizer"), lossless=True, max_outage_s=5.0)
        for teacher in (remote, StoredTeacher(str(tmp_path / "store"), remote, dtype="float32")):
            for own, other in zip(told(teacher, tmp_path / "b"), expected, strict=True):
                torch.testing.assert_close(own, other, atol=1e-5, rtol=0)
        remote.close()
    whole = told(local, tmp_path / "c", Question(word_ends=True))
    assert torch.equal(whole[2], expected[2]) and bool((whole[3] >= 0).any())
    torch.testing.assert_close(whole[1], expected[1], atol=1e-5, rtol=0)


def test_a_teacher_elsewhere_is_asked_for_the_digits_that_a_students_token_rules_out(tmp_path: Path) -> None:
    """Of chosen ids, of the likeliest where it cannot, and from disk: as in this process from whole distributions."""
    tok = made.teacher_tokenizer()
    tok.chat_template = tiny.TEMPLATE
    local = LocalTeacher(tiny.llama(2, vocab=len(tiny.tokenizer())), tiny.tokenizer())
    local.tokenizer.save_pretrained(tmp_path / "tokenizer")
    student = tiny.llama(1, vocab=len(tok))
    t = made.make(tmp_path / "a", "chunk_opd", student=student, teacher=local, processing_class=tok)
    text = made.text(t, made.NUMERALS)

    def told(teacher: Any) -> list[torch.Tensor]:
        judge = in_chunks(teacher, "teacher", tok, [tok.eos_token_id], ChatTemplate(local.tokenizer), min_aligned=0.9)
        return list(judge.chunks(text.rollout, text.prompts, PLAIN).tensors)

    expected = told(local)
    assert int((expected[5] < 0).sum()) > 3
    with Faulty(small=Small(local)) as server:
        remote = connect(server.url, tokenizer=str(tmp_path / "tokenizer"), lossless=True, max_outage_s=5.0)
        for teacher in (remote, StoredTeacher(str(tmp_path / "store"), remote, dtype="float32")):
            for _ in range(2):  # the second time from disk
                for own, other in zip(told(teacher), expected, strict=True):
                    torch.testing.assert_close(own, other, atol=1e-5, rtol=0)
        remote.scores_chosen = False
        listed = told(remote)  # 20 of some hundred: near, and never above what it must be
        assert bool((listed[5] >= expected[5] - 1e-5).all()) and bool((listed[5] <= 0).all())
        remote.close()


def test_a_tokenizer_that_is_not_the_teachers_is_refused(tmp_path: Path) -> None:
    local = made.other_teacher()
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    with Faulty(small=Small(local)) as server:
        remote = connect(server.url, tokenizer=str(tmp_path / "other"), max_outage_s=5.0)
        with pytest.raises(UserError, match="teacher.tokenizer .*other' is not that of .*Fix: the folder or hub name"):
            told(remote, tmp_path)
        without = connect(server.url, max_outage_s=5.0)
        with pytest.raises(UserError, match="without its tokenizer.*Fix: --teacher.tokenizer"):
            told(without, tmp_path)
        with pytest.raises(UserError, match="tokenizer '.*nothing' cannot be loaded"):
            connect(server.url, tokenizer=str(tmp_path / "nothing"), max_outage_s=5.0)
