"""Verdicts, pairs, splits and exports, over traces of which it is known what is right."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llmdistill.datagen.exports import export
from llmdistill.datagen.pairs import build_pairs, positives_file
from llmdistill.datagen.schema import prompt_id
from llmdistill.datagen.splits import heldout_file, split
from llmdistill.datagen.tables import read_rows, write_rows
from llmdistill.datagen.verification import verify
from llmdistill.errors import UserError


def trace(question: str, text: str, index: int, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    key = prompt_id(messages)
    named = {"id": f"{key}/plain/{index}", "prompt_id": key, "prompt": messages, "completion": text, "finish": "stop"}
    return {**named, "tokens": len(text.split()), "answer": "4", **more}


RIGHT, WRONG = "It is \\boxed{4}.", "So it is \\boxed{5}."
TRACES = [
    trace("2 + 2?", RIGHT, 0),
    trace("2 + 2?", WRONG, 1),
    trace("2 + 2?", "Two and two give four, so the answer is \\boxed{4}.", 2),
    trace("2 + 2?", "It is 4 because", 3, finish="length"),
    trace("1 + 3?", RIGHT, 0),
    trace("1 + 3?", "I do not know.", 1),
    trace("1 + 3?", "Let me count for a long while until I say \\boxed{6}.", 2),
    trace("8 / 2?", RIGHT, 0),
]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("judged")
    write_rows(folder / "traces.jsonl", TRACES)
    verify(folder / "traces.jsonl", folder / "judged.jsonl", judge="math")
    return folder / "judged.jsonl"


def only_short(completion: str, row: Any) -> dict[str, Any]:
    return {"passed": len(completion) < 20, "verdict": "short" if len(completion) < 20 else "long"}


def test_every_trace_gets_a_verdict_and_none_is_lost(judged: Path, tmp_path: Path) -> None:
    rows = list(read_rows(judged))
    kinds = ["right", "wrong", "right", "no_answer", "right", "no_answer", "wrong", "right"]
    assert [row["verdict"] for row in rows] == kinds
    assert [row["truncated"] for row in rows] == [i == 3 for i in range(8)]
    assert rows[1]["extracted"] == "5" and rows[0]["found_by"] == "boxed"


def test_a_function_by_name_judges(tmp_path: Path) -> None:
    write_rows(tmp_path / "t.jsonl", TRACES)
    made = verify(tmp_path / "t.jsonl", tmp_path / "o.jsonl", judge="tests.datagen.test_pairs:only_short")
    assert made.details["verdicts"] == {"long": 2, "short": 6}
    with pytest.raises(UserError, match="judge 'tests.nothing:here' is not there"):
        verify(tmp_path / "t.jsonl", tmp_path / "p.jsonl", judge="tests.nothing:here")


def test_a_scorer_that_evaluates_answers_must_be_allowed(tmp_path: Path) -> None:
    write_rows(tmp_path / "t.jsonl", TRACES)
    with pytest.raises(UserError, match="evaluate what a model wrote.*--allow_unsafe_exec"):
        verify(tmp_path / "t.jsonl", tmp_path / "o.jsonl", judge="reasoning_gym")


def test_programs_are_judged_by_their_tests(tmp_path: Path) -> None:
    tests = json.dumps({"style": "asserts", "test": "assert double(2) == 4"})
    texts = ["```python\ndef double(x):\n    return 2 * x\n```", "```python\ndef double(x):\n    return x\n```"]
    rows = [trace("Write double.", text, i, tests=tests, answer=None) for i, text in enumerate(texts)]
    write_rows(tmp_path / "t.jsonl", rows)
    verify(tmp_path / "t.jsonl", tmp_path / "o.jsonl")  # auto: rows with tests are programs
    assert [row["passed"] for row in read_rows(tmp_path / "o.jsonl")] == [True, False]


def test_pairs_are_of_one_prompt_a_right_and_a_wrong_side(judged: Path, tmp_path: Path) -> None:
    made = build_pairs(judged, tmp_path / "pairs.jsonl")
    pairs = list(read_rows(tmp_path / "pairs.jsonl"))
    assert [p["prompt"][0]["content"] for p in pairs] == ["2 + 2?", "1 + 3?"]
    assert pairs[0]["chosen"] == [{"role": "assistant", "content": RIGHT}]
    assert pairs[0]["rejected"] == [{"role": "assistant", "content": WRONG}]
    positives = list(read_rows(positives_file(tmp_path / "pairs.jsonl")))
    assert [p["chosen_id"].rpartition("/")[2] for p in positives] == ["0", "2", "0", "0"]
    assert made.lost == {"truncated": 1} and made.details["pairs"] == 2 and made.details["prompts"] == 3
    assert {Path(file).name for file in made.outputs} == {"pairs.jsonl", "pairs.positives.jsonl"}


def test_as_many_pairs_as_there_are_and_those_of_like_length(judged: Path, tmp_path: Path) -> None:
    """Words: of "2 + 2?" the right ones have 3 and 10, the wrong one 4; of "1 + 3?" 3, 4 and 12."""
    made = build_pairs(judged, tmp_path / "o.jsonl", rule="dpo", per_prompt=0, choose="closest_length")
    lengths = [(p["chosen_tokens"], p["rejected_tokens"]) for p in read_rows(tmp_path / "o.jsonl")]
    assert lengths == [(3, 4), (3, 4)] and not positives_file(tmp_path / "o.jsonl").exists()
    assert made.details["negatives"] == 3


def test_long_sides_are_left_out_by_reason(judged: Path, tmp_path: Path) -> None:
    made = build_pairs(judged, tmp_path / "o.jsonl", max_tokens=5, truncated_rejected=True)
    assert made.lost == {"completion too long": 2}
    assert Counter(p["rejected_verdict"] for p in read_rows(tmp_path / "o.jsonl")) == {"wrong": 1, "no_answer": 1}


def test_traces_without_verdicts_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "t.jsonl", TRACES)
    with pytest.raises(UserError, match="8 of 8 rows were rejected.*no verdict"):
        build_pairs(tmp_path / "t.jsonl", tmp_path / "o.jsonl")


def test_a_split_keeps_a_prompt_on_one_side_in_whatever_file(judged: Path, tmp_path: Path) -> None:
    many = [trace(f"{n} + 1?", text, i) for n in range(200) for i, text in enumerate((RIGHT, WRONG))]
    write_rows(tmp_path / "many.jsonl", many)
    split(tmp_path / "many.jsonl", tmp_path / "a.jsonl", heldout=0.25, seed=1)
    train, heldout = (
        {row["prompt_id"] for row in read_rows(file)}
        for file in (tmp_path / "a.jsonl", heldout_file(tmp_path / "a.jsonl"))
    )
    assert not train & heldout and len(train | heldout) == 200 and 25 < len(heldout) < 75
    write_rows(tmp_path / "some.jsonl", many[::3])
    split(tmp_path / "some.jsonl", tmp_path / "b.jsonl", heldout=0.25, seed=1)
    assert {row["prompt_id"] for row in read_rows(heldout_file(tmp_path / "b.jsonl"))} <= heldout


def test_exports_have_the_others_columns(judged: Path, tmp_path: Path) -> None:
    build_pairs(judged, tmp_path / "pairs.jsonl")
    forms: dict[Any, Any] = {}
    for source, name in ((judged, "trace"), (tmp_path / "pairs.jsonl", "pair")):
        for form in ("trl", "messages", "sharegpt"):
            export(source, tmp_path / f"{name}-{form}.jsonl", format=form)  # type: ignore[arg-type]
            forms[name, form] = next(read_rows(tmp_path / f"{name}-{form}.jsonl"))
    asked, said = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": RIGHT}
    assert forms["trace", "trl"] == {"prompt": [asked], "completion": [said]}
    assert forms["trace", "messages"] == {"messages": [asked, said]}
    human = {"from": "human", "value": "2 + 2?"}
    assert forms["trace", "sharegpt"] == {"conversations": [human, {"from": "gpt", "value": RIGHT}]}
    assert forms["pair", "trl"].keys() == {"prompt", "chosen", "rejected"} and forms["pair", "trl"]["chosen"] == [said]
    rejected = {"from": "gpt", "value": WRONG}
    assert forms["pair", "sharegpt"] == {
        "conversations": [human],
        "chosen": {"from": "gpt", "value": RIGHT},
        "rejected": rejected,
    }


@pytest.mark.slow
def test_trl_and_the_redi_recipe_read_the_pairs_as_they_are(judged: Path, tmp_path: Path, tiny_run: Path) -> None:
    """One DPO step and one SFT step of TRL, and one step of each of REDI's stages."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from llmdistill.redi import main

    build_pairs(judged, tmp_path / "pairs.jsonl")
    export(positives_file(tmp_path / "pairs.jsonl"), tmp_path / "sft.jsonl", format="trl")
    student, data = str(tiny_run / "student"), str(tmp_path / "pairs.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(tiny_run / "teacher")
    for kind, config, file in ((DPOTrainer, DPOConfig, "pairs.jsonl"), (SFTTrainer, SFTConfig, "sft.jsonl")):
        rows = load_dataset("json", data_files=str(tmp_path / file), split="train")
        args = config(
            output_dir=str(tmp_path / "trl"), max_steps=1, bf16=False, report_to="none", per_device_train_batch_size=2
        )
        done = kind(student, args=args, train_dataset=rows, processing_class=tokenizer).train()
        assert done.global_step == 1
    words = [
        "--student.model",
        student,
        "--data.train",
        data,
        "--output_dir",
        str(tmp_path / "redi"),
        "--max_steps",
        "1",
    ]
    words += ["--positives", str(positives_file(data)), "--stage1_steps", "1", "--per_device_train_batch_size", "2"]
    assert main([*words, "--stage1_batch_size", "2", "--learning_rate", "1e-3"]) in (0, None)
    assert (tmp_path / "redi" / "student").is_dir()
