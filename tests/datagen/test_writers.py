"""Writers ask what they say they ask, and what they saw stays out of the prompt that the student gets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmdistill.datagen.generation import generate
from llmdistill.datagen.prompts import Prompts
from llmdistill.datagen.tables import Rejects, read_rows, write_rows
from llmdistill.datagen.writing import chance, find_writer
from llmdistill.errors import UserError
from tests.datagen.chat_endpoint import PROMPTS, ChatEndpoint, served

ASKED = [{"role": "user", "content": PROMPTS[0]["prompt"]}]


@pytest.fixture(scope="module")
def asked() -> Iterator[Any]:
    """``asked(writer, out, **options)``: the trace of the first prompt, and what the endpoint was sent."""
    endpoint = ChatEndpoint()
    with served(endpoint) as server:

        def write(writer: str, out: Path, others: tuple[str, ...] = (), **options: Any) -> tuple[Any, list[Any]]:
            endpoint.bodies = []
            roles = {name: {"url": server.url} for name in ("teacher", *others)}
            generate(PROMPTS[:1], writer, roles, out, sampling={"max_new_tokens": 64}, **options)
            return next(read_rows(out)), endpoint.bodies

        yield write


def said(body: Any) -> str:
    return str(body["messages"][-1]["content"])


def test_a_plan_comes_first_and_stands_in_the_second_prompt(asked: Any, tmp_path: Path) -> None:
    row, (first, second) = asked("planned", tmp_path / "t.jsonl", options={"plan_tokens": 32})
    plan = json.loads(row["meta"])["plan"]
    assert (first["max_tokens"], second["max_tokens"]) == (32, 64) and "Do not solve it yet" in said(first)
    assert plan and plan in said(second) and row["prompt"] == ASKED


def test_a_debate_revises_with_the_other_answer_and_keeps_the_judges_choice(asked: Any, tmp_path: Path) -> None:
    row, bodies = asked("debate", tmp_path / "t.jsonl", others=("judge",))
    first, revising, judging = bodies[:2], bodies[2:4], bodies[4]
    assert all(body["messages"] == ASKED for body in first) and first[0]["seed"] != first[1]["seed"]
    assert all("Another solver answered" in said(body) for body in revising)
    other = json.loads(row["meta"])["other"]
    assert row["completion"] in said(judging) and other in said(judging) and row["prompt"] == ASKED
    assert [part["role"] for part in row["parts"]] == ["teacher"]


def test_a_first_thought_is_what_the_endpoint_goes_on_behind(asked: Any, tmp_path: Path) -> None:
    row, (body,) = asked("first_thought", tmp_path / "t.jsonl", options={"prefix": "Let me add."})
    assert body["messages"][-1] == {"role": "assistant", "content": "Let me add."} and body["continue_final_message"]
    assert row["completion"].startswith("Let me add.") and row["parts"][0]["role"] == "given"


def test_examples_stand_before_the_question_and_not_in_the_trace(asked: Any, tmp_path: Path) -> None:
    row, (body,) = asked("few_shot", tmp_path / "t.jsonl", options={"examples": [["1 + 1?", "2."], ["2 + 2?", "4."]]})
    assert [m["content"] for m in body["messages"]] == ["1 + 1?", "2.", "2 + 2?", "4.", ASKED[0]["content"]]
    assert row["prompt"] == ASKED and row["style"] == "few_shot"


def test_a_missing_prefix_and_a_missing_role_are_said(asked: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="first_thought has no prefix"):
        asked("first_thought", tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="asks for 'student', and the roles are teacher. Fix: --student"):
        asked("capped", tmp_path / "b.jsonl")
    with pytest.raises(UserError, match="writer 'plane' is not there"):
        find_writer("plane")


def test_chances_are_functions_of_what_they_are_for() -> None:
    """Uniform: of 1000 each tenth has 60 to 140 (a false alarm in 2000 runs)."""
    drawn = [chance("cut", "row", i) for i in range(1000)]
    assert drawn[7] == chance("cut", "row", 7)
    assert all(60 < sum(x // 0.1 == tenth for x in drawn) < 140 for tenth in range(10))


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"question": "q", "answer": "so\n#### 1,200"}, [("user", "q")], "1,200"),
        ({"problem": "p", "gold": 3}, [("user", "p")], "3"),
        ({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}, [("user", "u")], "a"),
        ({"conversations": [{"from": "human", "value": "h"}]}, [("user", "h")], None),
        ({"prompt": '[{"role": "user", "content": "json"}]'}, [("user", "json")], None),
    ],
)
def test_rows_of_others_are_read(row: Any, prompt: Any, answer: Any) -> None:
    made = Prompts("p").read(row)
    assert [(m["role"], m["content"]) for m in made["prompt"]] == prompt and made["answer"] == answer


def test_templates_and_system_prompts_go_around_questions() -> None:
    made = Prompts("p", template="boxed", system_prompt="Be brief.").read({"question": "1+1?"})
    system, user = made["prompt"]
    assert system == {"role": "system", "content": "Be brief."}
    assert user["content"].startswith("1+1?\n") and "\\boxed{}" in user["content"]
    assert Prompts("p").read({"question": "1+1?"})["prompt_id"] != made["prompt_id"]


def test_a_file_without_prompts_is_an_error_and_a_bad_row_a_reject(tmp_path: Path) -> None:
    write_rows(tmp_path / "p.jsonl", [{"text": "t"}])
    with pytest.raises(UserError, match=r"has no column of prompts \(it has text\)"):
        list(Prompts(str(tmp_path / "p.jsonl")).rows(Rejects.unheeded()))
    write_rows(tmp_path / "q.jsonl", [{"prompt": ["x"]}, {"prompt": "fine"}])
    rejects = Rejects(tmp_path / "r.jsonl", most=1.0)
    assert len(list(Prompts(str(tmp_path / "q.jsonl")).rows(rejects))) == 1 and rejects.count == 1
    write_rows(tmp_path / "n.jsonl", [{"prompt": None, "x": 1}, {"x": 2}, {"prompt": "fine", "answer": float("nan")}])
    (row,) = Prompts(str(tmp_path / "n.jsonl")).rows(rejects)  # neither the first row nor one says what columns are
    assert row["answer"] is None and rejects.count == 3
    with pytest.raises(UserError, match="reasoning-gym's task 'no_such_task'"):
        list(Prompts("reasoning_gym:no_such_task").rows())


def test_a_folder_as_the_hub_has_it(tmp_path: Path) -> None:
    """Its card declares the configurations; without the name of one they are said."""
    (tmp_path / "main").mkdir()
    write_rows(tmp_path / "main" / "train.jsonl", [{"question": "1+1?", "answer": "two\n#### 2"}])
    files = "data_files: [{split: train, path: main/train.jsonl}]"
    configs = "".join(f"- {{config_name: {name}, {files}}}\n" for name in ("main", "other"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    (row,) = Prompts(f"{tmp_path}:main").rows(Rejects.unheeded())
    assert (row["answer"], row["solution"]) == ("2", "two")
    with pytest.raises(UserError, match=r"Config name is missing.*main.*other.*NAME:CONFIGURATION"):
        list(Prompts(str(tmp_path)).rows())
