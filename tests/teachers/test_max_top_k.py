"""How many tokens a position a teacher lists: its own limit, or what is put together from several."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmdistill import UserError
from llmdistill.teachers.base import max_top_k
from llmdistill.teachers.evidence import gather
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.mixture import EnsembleTeacher, RoutedTeacher
from llmdistill.teachers.remote import RemoteTeacher
from llmdistill.teachers.stored import StoredTeacher
from llmdistill.texts import collate
from tests import tiny
from tests.service.faulty import Faulty
from tests.service.small import Small

VOCAB = 264


@pytest.fixture(scope="module")
def local() -> LocalTeacher:
    return LocalTeacher(tiny.llama(1), tiny.tokenizer())


def limited(local: LocalTeacher, limit: int | None, scores_chosen: bool = True) -> Any:
    """One elsewhere."""
    made = SimpleNamespace(info=local.info, score=local.score, bytes_received=1, scores_chosen=scores_chosen)
    if limit is not None:
        made.max_top_k = limit
    return made


def test_one_without_a_limit_lists_its_vocabulary(local: LocalTeacher) -> None:
    assert max_top_k(local) == max_top_k(limited(local, None)) == max_top_k(limited(local, 1 << 30)) == VOCAB


def test_a_service_says_its_limit(local: LocalTeacher) -> None:
    with Faulty(small=Small(local, limits={"top_k": 12})) as server:
        teacher = RemoteTeacher(server.url)
        asked = max_top_k(teacher)
        assert asked == 12
        made = collate([[5, 6]], [[7, 8]], pad_id=0)
        assert teacher.score(made, asked)[0].topk_ids.shape[1] == asked
        with pytest.raises(UserError, match=f"lists at most {asked} tokens"):
            teacher.score(made, asked + 1)
        teacher.close()


@pytest.mark.parametrize(
    ("limits", "chosen", "expected"),
    [
        ((None, None, None), True, VOCAB),  # each lists everything: nothing is asked about twice
        ((None, 128), True, 128),
        ((None, 128, 100), True, 50),  # each is asked about the lists of two others
        ((20, 20), False, 0),  # plain servers cannot be asked about the others' tokens
        ((None, None), False, VOCAB),
        ((20,), False, 20),
    ],
)
def test_an_average_lists_what_every_member_can_be_asked(
    local: LocalTeacher, limits: tuple[int | None, ...], chosen: bool, expected: int
) -> None:
    members = [(limited(local, limit, chosen), 1.0) for limit in limits]
    assert max_top_k(EnsembleTeacher(members)) == expected


def test_an_average_in_this_process_lists_everything(local: LocalTeacher) -> None:
    assert max_top_k(EnsembleTeacher([(local, 1.0)] * 3)) == VOCAB


def test_routes_list_what_the_tightest_does(local: LocalTeacher) -> None:
    routes = {str(k): (limited(local, k, False), [str(k)]) for k in (64, 20)}
    assert max_top_k(RoutedTeacher(routes)) == 20  # type: ignore[arg-type]


def test_a_store_lists_what_stands_behind_it_or_what_it_holds(local: LocalTeacher, tmp_path: Path) -> None:
    made = collate([[5, 6]], [[7, 8]], pad_id=0)
    behind = limited(local, 20)
    behind.close = lambda: None
    stored = StoredTeacher(tmp_path, behind)
    assert max_top_k(stored) == 20
    stored.score(made, 7)
    stored.close()
    alone = StoredTeacher(tmp_path)
    assert max_top_k(alone) == 7
    assert alone.score(made, 7)[0].topk_ids.shape == (2, 7)
    with pytest.raises(UserError, match="estimator is full; teacher .* lists at most 7 of its 264"):
        gather(alone, made, "full", 0)
    alone.close()
