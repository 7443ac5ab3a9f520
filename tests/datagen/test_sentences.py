"""Sentences, their probabilities, and the selection by them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmdistill.datagen.sentences import select, sentence_logprobs, spans, statistics


def sentences(text):
    return [text[a:b] for a, b in spans(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("   ", ["   "]),
        ("One. Two! Three? Four", ["One. ", "Two! ", "Three? ", "Four"]),
        ("It is 3.14 or 2.5. So.", ["It is 3.14 or 2.5. ", "So."]),
        ("Take e.g. this one. Next", ["Take e.g. this one. ", "Next"]),
        ("Dr. No met J. Bond. Yes.", ["Dr. No met J. Bond. ", "Yes."]),
        ("a line\nanother\n\n\nthird", ["a line\n", "another\n\n\n", "third"]),
        ("1. First step\n2. Second. Done", ["1. First step\n", "2. Second. ", "Done"]),
        ('He said "no." Then left.', ['He said "no." ', "Then left."]),
        ("(Really.) So", ["(Really.) ", "So"]),
        ("这是一句。第二句！完", ["这是一句。", "第二句！", "完"]),
        ("x = 5.\n\\[ a + b \\]\nSo", ["x = 5.\n", "\\[ a + b \\]\n", "So"]),
        ("Wait... no. Yes", ["Wait... ", "no. ", "Yes"]),
        ("\n\nstart. end", ["\n\nstart. ", "end"]),
    ],
)
def test_sentences(text, expected):
    assert sentences(text) == expected


@given(st.text(alphabet="ab .!?\n1e。\"')", max_size=80))
def test_sentences_are_a_partition(text):
    assert "".join(sentences(text)) == text


def test_long_text_without_ends_is_quick():
    assert len(spans("." * 200_000 + " a")) == 2 and len(spans("! " * 100_000)) == 100_000
    assert len(spans(" " * 400_000)) == 1 and len(spans('".' * 200_000)) == 1


def test_the_probability_of_a_sentence_is_the_geometric_mean_of_its_tokens():
    text = "Yes it is. No."
    tokens = [(0, 3), (3, 6), (6, 9), (9, 10), (10, 13), (13, 14)]  # Yes| it| is|.| No|.
    found = sentence_logprobs(text, tokens, [-1.0, -2.0, -3.0, -4.0, -0.5, -1.5])
    assert found == pytest.approx([-2.5, -1.0])
    probability = (math.exp(-1) * math.exp(-2) * math.exp(-3) * math.exp(-4)) ** 0.25
    assert math.exp(found[0]) == pytest.approx(probability)


def test_a_token_over_the_seam_counts_where_its_first_letter_is():
    found = sentence_logprobs("Ab. B", [(0, 2), (2, 5)], [-1.0, -3.0])
    assert found == [-2.0, pytest.approx(math.nan, nan_ok=True)]


def test_tokens_of_spaces_alone_count_where_they_stand():
    assert sentence_logprobs("A.\nB", [(0, 2), (2, 3), (3, 4)], [-1.0, -2.0, -5.0]) == [-1.5, -5.0]


def test_log_probs_for_other_tokens_are_refused():
    with pytest.raises(ValueError, match="1 log-probs for 2 tokens"):
        sentence_logprobs("A B", [(0, 1), (1, 3)], [-1.0])


def test_kinds_and_both_scores():
    teacher = [math.log(p) for p in (0.9, 0.5, 0.1)]
    student = [math.log(p) for p in (0.2, 0.45, 0.6)]
    found = statistics([*teacher, math.nan], [*student, -1.0])
    assert (found.teacher, found.shared, found.student) == (1, 1, 1)
    assert found.score("share") == pytest.approx(1 / 3)
    assert found.score("mean") == pytest.approx((0.7 + 0.05 - 0.5) / 3)
    found = statistics(teacher, student, scale="log", margin=1.0)
    assert (found.teacher, found.student) == (1, 1)
    assert found.difference == pytest.approx((math.log(4.5) + math.log(0.5 / 0.45) - math.log(6)) / 3)


def test_a_teacher_that_is_the_student_has_nothing_of_its_own():
    found = statistics([-1.0, -2.0], [-1.0, -2.0], margin=0.0)
    assert (found.teacher, found.student, found.shared, found.difference) == (0, 0, 2, 0.0)


def test_selection_under_a_budget():
    scores = [[0.1, 0.9, 0.5], [0.6, 0.6], []]
    assert select(scores, each=2) == [[1, 2], [0, 1], []]
    assert select(scores, total=3) == [[1], [0, 1], []]
    with pytest.raises(ValueError, match="one of each and total"):
        select(scores)
