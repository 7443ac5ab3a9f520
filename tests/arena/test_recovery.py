"""The task "recovery": what follows from what, what is put in, how a text is judged; and its cells on small budgets."""

from __future__ import annotations

import random

import direction
import models
import pytest
import recovery_models
import recovery_task
import task
import torch
import ways
from recovery_models import as_prompt, pairs, with_mistakes
from recovery_task import RIGHT, STEPS, Mistakes, Problem, Reading, everything, following, injected, shares, working

from llmdistill.models.generation import generate
from llmdistill.texts import Sampling, predicting_rows
from llmdistill.texts.prompts import completed


@pytest.mark.parametrize("size", [8, 6])
def test_the_table_is_rows_of_permutations_and_every_prompt_has_one_trace(size: int) -> None:
    assert all(sorted(row) == list(range(size)) for row in recovery_task.table(size))
    assert len(everything(size)) == size**3
    for problem in random.Random(0).sample(everything(size), 20):
        a, b, c = problem.a, problem.b, problem.c
        for i in range(0, 3 * STEPS, 3):
            guess, step, verdict = problem.completion[i : i + 3]
            assert (
                int(guess) == recovery_task.table(size)[recovery_task.table(size)[c][b]][a] == following(size, a, b, c)
            )
            assert int(step) == working(size, b, c) and verdict == RIGHT
            a, b, c = b, c, int(guess)
        assert problem.solved_by(problem.completion)
        assert not problem.solved_by(problem.completion[:-1]) and not problem.solved_by(problem.completion + RIGHT)


def test_mistakes_are_what_is_marked_and_all_else_follows() -> None:
    problem, rng = Problem(1, 2, 3), random.Random(3)
    trace = injected(problem, rng, Mistakes(guess=0.5, working=0.2, state=0.2))
    assert 30 < sum(trace.put_in) < 3 * STEPS - 30 and len(trace.text) == 3 * STEPS == len(trace.put_in)
    state = (1, 2, 3)
    for i in range(0, 3 * STEPS, 3):
        (guess, step, verdict), marked = trace.text[i : i + 3], trace.put_in[i : i + 3]
        right = following(8, *state)
        assert marked[0] == (int(guess) != right) and marked[1] == (int(step) != working(8, *state[1:]))
        if not marked[2]:
            by_working = recovery_task.table(8)[int(step)][state[0]]
            assert verdict == (RIGHT if int(guess) == by_working else str(by_working))
        state = (*state[1:], int(guess if verdict == RIGHT else verdict))
    prompt = as_prompt(problem, trace.text, trace.put_in)
    assert prompt.counts == (*(not p for p in trace.put_in), True) and len(prompt.completion) == recovery_task.TOKENS


def test_repaired_mistakes_leave_a_trace_exact_and_others_do_not() -> None:
    problem = Problem(4, 0, 7)
    repaired = injected(problem, random.Random(1), Mistakes(guess=1.0)).text
    read = Reading.of(problem, repaired)
    assert (read.exact, read.steps, read.right, read.guessed, read.repaired) == (True, STEPS, STEPS, 0, STEPS)
    right = problem.completion
    lost = right[:2] + str((int(right[0]) + 1) % 8) + right[3:]  # the first digit that stands is a wrong one
    read = Reading.of(problem, lost)
    assert not read.exact and read.steps == STEPS and read.right < STEPS
    found = shares([Reading.of(problem, repaired), Reading.of(problem, lost)])
    assert found["exact"] == 0.5 and 0.5 < found["steps_right"] < 1


@pytest.mark.parametrize("text", ["", "1", "12", "999", "=..", "12.12", "1 2", "....", "\u0664\u0664.", "8" * 500])
def test_what_is_no_trace_is_read_up_to_where_it_is_none(text: str) -> None:
    read = Reading.of(Problem(1, 2, 3), text)
    assert not read.exact and read.steps <= len(text) // 3


def test_pairs_share_a_right_prefix_and_part_at_a_wrong_verdict() -> None:
    for pair in pairs(8, 30, 1):
        problem = Problem(*map(int, pair["prompt"][:3]))
        assert Reading.of(problem, pair["chosen"]).exact and not Reading.of(problem, pair["rejected"]).exact
        place = next(i for i, (x, y) in enumerate(zip(pair["chosen"], pair["rejected"], strict=True)) if x != y)
        assert place % 3 == 2 and place >= 30
        read = Reading.of(problem, pair["rejected"])
        assert read.steps == STEPS and read.right == STEPS - 1  # it goes on rightly from where it is


def test_offline_text_holds_mistakes_and_their_repairs() -> None:
    rows = with_mistakes(8, 20, 1).rows
    read = [Reading.of(Problem(*map(int, r["prompt"][:3])), r["completion"]) for r in rows]
    assert all(r.exact for r in read) and 0.35 < sum(r.guessed for r in read) / (STEPS * 20) < 0.65


# One of every way that cells of these tracks are built; test_methods.py has the others.
def test_a_text_is_right_in_the_way_that_it_chose() -> None:
    problem = ways.Problem(3, 5)
    assert len({problem.by(way) for way in range(8)}) == 8
    assert all(problem.solved_by(problem.by(way)) for way in range(8))
    wrong = problem.by(2)[:-1] + str((int(problem.by(2)[-1]) + 1) % 8)
    for text in ("", "8", "2", wrong, "3" + problem.by(2)[1:], problem.by(2) + "1", "\u0664" * 13):
        assert not problem.solved_by(text)
    a, b, way = 3, 5, 4
    for digit in problem.by(way)[1:]:
        assert ways.tables()[way][b][a] == int(digit)
        a, b = b, int(digit)


def test_of_the_ways_it_is_not_to_know_a_student_is_taught_the_choice() -> None:
    drawn = next(ways.lessons(400, 1, knows=3, others=0.0))
    by_way = {w: [p for p in drawn if p.completion[0] == drawn_id(w)] for w in range(8)}
    assert all(25 < len(found) < 80 for found in by_way.values())
    for way, found in by_way.items():
        assert all(sum(p.counts) == (ways.TOKENS if way == 3 else 1) for p in found)


def drawn_id(way: int) -> int:
    return recovery_models.TOKENIZER.convert_tokens_to_ids(str(way))


def test_a_rewarded_sample_becomes_likelier_and_another_less() -> None:
    """One step of REINFORCE by hand, on the log-probs of two samples."""
    model, drawn = models.Size(16, 1, 2, 32).build(3), task.problems(2, 1)
    asked = [models.as_prompt(p) for p in drawn for _ in range(2)]
    rollout = generate(model.eval(), asked, Sampling(6, seed=1), eos_ids=(models.EOS_ID,), pad_id=models.PAD_ID)
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.0])
    lengths = rollout.completion_mask.sum(1)

    def logprobs() -> torch.Tensor:
        logits = model(input_ids=rollout.input_ids, attention_mask=rollout.attention_mask).logits
        rows = predicting_rows(logits, rollout.completion_mask).log_softmax(-1)
        chosen = rows.gather(1, rollout.token_rows()[:, None]).squeeze(1)
        return torch.stack([part.sum() for part in chosen.split(lengths.tolist())])

    before = logprobs()
    loss = direction.surrogate(model, rollout, advantages.repeat_interleave(lengths))
    assert torch.isclose(loss, -(before * advantages).sum() / lengths.sum())
    loss.backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight -= 0.1 * weight.grad
    moved = (logprobs() - before)[:2]
    assert moved[0] - moved[1] > 0.01


def test_a_token_answers_for_its_part_and_those_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direction, "SAMPLES", 2)
    problem = task.Problem(417, 385)
    right = problem.completion
    columns = right.split(";")
    slip = ";".join([columns[0], columns[1], "4+3+1=09", "902"])
    assert direction.right_parts(problem, right) == [1.0] * 4
    assert direction.right_parts(problem, slip) == [1.0, 1.0, 0.0, 0.0]
    assert direction.right_parts(problem, "") == direction.right_parts(problem, ";;;;;;") == [0.0] * 4
    assert direction.right_parts(problem, right + ";802") == [1.0, 1.0, 1.0, 0.0]
    rollout = completed([models.as_prompt(problem, text) for text in (right, slip)], models.PAD_ID)
    rewards = torch.tensor([direction.right_parts(problem, text) for text in (right, slip)])
    first, second = direction.advantages(rewards, [right, slip], rollout).split(len(right) + 1)
    part = [right.count(";", 0, i) for i in range(len(right) + 1)]
    assert first.tolist() == [[2.0, 2.0, 2.0, 1.0][p] for p in part] and torch.equal(second, -first)
