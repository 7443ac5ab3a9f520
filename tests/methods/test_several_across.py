"""Several teachers of one tokenizer that is not the student's: an ensemble's chunks, and every domain's own teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmdistill.errors import UserError
from llmdistill.teachers.chunks import ClassQuestion, Question
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.mixture import EnsembleTeacher, RoutedTeacher
from tests import tiny
from tests.methods.test_chunks import make, other_teacher, text

WORD_ENDS = Question(word_ends=True)


class Listed:
    """One that is elsewhere: it tells log-probabilities of tokens, and no distributions."""

    max_top_k = 5
    writes = False

    def __init__(self, inner: LocalTeacher) -> None:
        self.inner, self.tokenizer = inner, inner.tokenizer

    def info(self) -> Any:
        return self.inner.info()

    def score(self, *args: Any) -> Any:
        return self.inner.score(*args)

    def close(self) -> None: ...


def told(teacher: Any, folder: Path, question: Any, domains: list[str] | None = None) -> list[torch.Tensor]:
    """What a judge says of the same text."""
    t = make(folder, "chunk_opd", teacher=teacher)
    given = text(t)
    said = t.judges["teacher"].answer(replace(given.rollout, domain=domains), given.prompts, question)
    return list(said.chunk(slice(0, len(said)), None))


def test_an_ensemble_of_another_tokenizer_averages_probabilities(tmp_path: Path) -> None:
    """Token by token, as it does for a student of its own: the chunk's is the product. Here and elsewhere alike."""
    members = [other_teacher(2), other_teacher(3)]
    ensemble = EnsembleTeacher([(members[0], 1.0), (members[1], 3.0)])
    tokens, share, chunks, *_ = told(ensemble, tmp_path / "a", Question())
    apart = [told(m, tmp_path / str(k), Question()) for k, m in enumerate(members)]
    assert not torch.allclose(apart[0][1], apart[1][1])
    for x in apart:
        assert torch.equal(x[0], tokens) and torch.equal(x[2], chunks)
    alone = torch.bincount(chunks[chunks >= 0]) == 1
    t = make(tmp_path / "b", "chunk_opd", teacher=members[0])
    judged = t.judges["teacher"]._read(text(t).rollout, text(t).prompts).judge_chunks
    single = (chunks >= 0) & (alone & (torch.bincount(judged[judged >= 0]) == 1))[chunks.clamp(min=0)]
    mean = (0.25 * apart[0][1].exp() + 0.75 * apart[1][1].exp()).log()
    torch.testing.assert_close(share[single], mean[single], rtol=1e-4, atol=1e-5)  # one token on either side
    assert int(single.sum()) > 5 and not torch.allclose(share[~single], mean[~single], atol=1e-4)
    elsewhere = EnsembleTeacher([(Listed(members[0]), 1.0), (Listed(members[1]), 3.0)])
    for here, there in zip((tokens, share, chunks), told(elsewhere, tmp_path / "c", Question()), strict=False):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("question", [Question(), WORD_ENDS, ClassQuestion()], ids=["chunks", "word ends", "classes"])
def test_every_domain_has_its_own_teacher(tmp_path: Path, question: Any) -> None:
    members = {"a": other_teacher(2), "b": other_teacher(3)}
    routed = RoutedTeacher({name: (teacher, [name]) for name, teacher in members.items()})
    domains = ["a", "b", "b", "a"]
    found = told(routed, tmp_path / "r", question, domains)
    apart = {name: told(teacher, tmp_path / name, question) for name, teacher in members.items()}
    t = make(tmp_path / "t", "chunk_opd", teacher=members["a"])
    counts = text(t).rollout.row_counts
    for k, part in enumerate(found):
        for b, rows in enumerate(part.split(counts)):
            torch.testing.assert_close(rows, apart[domains[b]][k].split(counts)[b], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["alm", "p_kl", "simct"])
def test_an_ensemble_trains(tmp_path: Path, method: str) -> None:
    ensemble = EnsembleTeacher([(other_teacher(2), 1.0), (other_teacher(3), 1.0)])
    t = make(tmp_path, method, teacher=ensemble, max_steps=1)
    t.train()
    assert t.state.log_history[0]["teacher/aligned_bytes"] == 1.0 and t.state.log_history[0]["grad_norm"] > 0


def test_what_several_cannot_say_is_refused_at_once(tmp_path: Path) -> None:
    ensemble = EnsembleTeacher([(other_teacher(2), 1.0), (other_teacher(3), 1.0)])
    with pytest.raises(UserError, match="reads hidden states of teacher .* only a model in this process has them"):
        make(tmp_path, "alm", teacher=ensemble, hidden_weight=1.0)
    with pytest.raises(UserError, match="different tokenizers"):  # one vocabulary for all: llmdistill transfer
        EnsembleTeacher([(other_teacher(2), 1.0), (LocalTeacher(tiny.llama(3), tiny.tokenizer()), 1.0)])
    mixed = EnsembleTeacher([(other_teacher(2), 1.0), (Listed(other_teacher(3)), 1.0)])
    with pytest.raises(UserError, match="asks how likely words end .* Fix: --debias false"):
        make(tmp_path, "alm", teacher=mixed)
