"""Answers as a careful teacher judges them: cases after public bug reports, and each rule in both directions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmdistill.verify.answers.equality import decide
from llmdistill.verify.math import AnswerJudge

HERE = Path(__file__).parent
CASES = [json.loads(line) for line in (HERE / "answers.jsonl").open()]
PAIRS = [
    (line[0], *(part.strip() for part in line[1:].split(" ;; ")))
    for file in ("answer_pairs.txt", "answer_pairs_attacks.txt")
    for line in (HERE / file).read_text().splitlines()
    if line and not line.startswith("#")
]


COMPLETIONS = [json.loads(line) for line in (HERE / "completions.jsonl").open(encoding="utf-8")]


@pytest.fixture(scope="module")
def judge() -> Iterator[AnswerJudge]:
    with AnswerJudge() as one:
        yield one


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_a_case_has_the_verdict_of_a_teacher(judge: AnswerJudge, case: dict[str, object]) -> None:
    verdict = judge.judge(str(case["prediction"]), str(case["gold"]), case["task"])  # type: ignore[arg-type]
    assert verdict.passed == case["expected"], verdict


@pytest.mark.parametrize("row", COMPLETIONS, ids=lambda row: ascii(row["completion"])[:40])
def test_the_answer_of_a_completion_is_found(judge: AnswerJudge, row: dict[str, object]) -> None:
    """Phrases, languages, ends of turns, corrections, denials: what is said last and meant is what counts."""
    verdict = judge.judge(str(row["completion"]), str(row["gold"]), row["kind"])  # type: ignore[arg-type]
    assert verdict.passed == row["right"], verdict


@pytest.mark.parametrize(("sign", "gold", "answer"), PAIRS)
def test_a_pair_is_equal_or_not(sign: str, gold: str, answer: str) -> None:
    assert decide(gold, answer).equal == (sign == "=")
    assert decide(gold, gold).equal and decide(answer, answer).equal
