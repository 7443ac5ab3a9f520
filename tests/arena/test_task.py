"""The task itself: its columns are right, its answers are judged exactly, and held-out problems stay out."""

from __future__ import annotations

import random

import pytest
import task


@pytest.mark.parametrize(
    ("problem", "completion"),
    [  # by hand
        (task.Problem(417, 385), "7+5+0=12;1+8+1=10;4+3+1=08;802"),
        (task.Problem(999, 999), "9+9+0=18;9+9+1=19;9+9+1=19;1998"),
        (task.Problem(512, 385, "-"), "2-5-0=17;1-8-1=12;5-3-1=01;127"),
        (task.Problem(400, 400, "-"), "0-0-0=00;0-0-0=00;4-4-0=00;0"),
    ],
)
def test_columns_as_by_hand(problem: task.Problem, completion: str) -> None:
    assert problem.completion == completion


def test_every_column_follows_from_the_one_before_and_the_answer_is_python_s() -> None:
    rng = random.Random(0)
    for _ in range(500):
        problem = task.draw(rng, task.OPERATIONS)
        *columns, answer = problem.completion.split(";")
        assert int(answer) == eval(f"{problem.a}{problem.operation}{problem.b}") == problem.answer
        carry = 0
        for column in columns:
            said, result = column.split("=")
            x, y, c = (int(d) for d in said.split(problem.operation))
            assert c == carry
            carry = int(result[0])
            signed = x + y + c if problem.operation == "+" else x - y - c
            assert signed == (10 * carry if problem.operation == "+" else -10 * carry) + int(result[1])
        assert problem.solved_by(problem.completion)
        assert not problem.solved_by(problem.completion[:-1] + str((problem.answer + 1) % 10))
        assert len(problem.completion) + 1 <= task.longest()


def test_what_is_held_out_is_trained_on_by_nobody() -> None:
    for operations in (("+",), ("-",), ("+", "-")):
        held = set(task.heldout(task.RESERVED, operations))
        drawn = task.problems(5000, 3, ("+", "-"))
        assert len(held) == task.RESERVED
        assert len(set(drawn)) == 5000
        assert held.isdisjoint(drawn) and held.isdisjoint(task.problems(3000, 4, operations))
    assert task.heldout(10) == task.heldout(500)[:10]


def test_a_character_is_a_token_and_texts_come_back() -> None:
    tokenizer, text = task.tokenizer(), task.Problem(417, 385).completion
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == task.VOCABULARY
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
