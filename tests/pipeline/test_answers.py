"""Whether two answers are the same or near: what only stands in the question makes nothing near."""

import pytest

from llmdistill.pipeline.answers import compare_answers

CAPITAL = "What is the capital of Kenya?"


@pytest.mark.parametrize(
    ("question", "answer", "other", "same", "near"),
    [
        (CAPITAL, "The capital of Kenya is Nairobi.", "the capital of Kenya is Nairobi", True, True),
        (CAPITAL, "The capital of Kenya is Nairobi. It is big.", "The capital of Kenya is Nairobi!", True, True),
        (CAPITAL, "Nairobi is the capital of Kenya.", "The capital of Kenya is Nairobi.", False, True),
        (CAPITAL, "The capital of Kenya is Nakuru.", "The capital of Kenya is Nairobi.", False, False),
        (CAPITAL, "", "The capital of Kenya is Nairobi.", False, False),
        (CAPITAL, "", "", True, True),
        (CAPITAL, "The capital of Kenya", "Kenya", False, False),  # neither adds anything to the question
        ("What is pi?", "Pi is 3.14 or so.", "Pi is 3.15 or so.", False, False),
        (
            "What is a thermometer used for?",
            "A thermometer is a device used to measure the temperature of a liquid or gas.",
            "A thermometer is a device used to measure the temperature of a liquid, solid or gas.",
            False,
            True,
        ),
        (
            "What is a thermometer used for?",
            "A thermometer is a device used to measure the temperature of a liquid or gas.",
            "A thermometer is a type of microscope used to see the structure of small bodies.",
            False,
            False,
        ),
    ],
)
def test_same_and_near(question: str, answer: str, other: str, same: bool, near: bool) -> None:
    measured = compare_answers([question], [answer], [other])
    assert measured.sums == {"same_answer": [float(same)], "near_answer": [float(near)]} and measured.tokens == [1]


def test_long_texts_take_no_time() -> None:
    """What a model wrote may be long and strange: nothing here looks at it twice."""
    long = "." * 200_000 + " a" * 200_000
    assert compare_answers([long], [long], [long]).sums["same_answer"] == [1.0]
