"""What does not fit together is one line before the first step, from Python and from recipes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmdistill import Ask, DistillationTrainer, Method, OPDConfig, Term
from llmdistill.composition.term import Hidden
from llmdistill.errors import UserError
from llmdistill.objectives.divergences import reverse_kl
from llmdistill.objectives.labels import cross_entropy
from llmdistill.opd import main
from llmdistill.recipe.command_line import run_front_door
from llmdistill.recipe.data_config import DataConfig
from llmdistill.teachers.student import StudentTeacher
from llmdistill.texts.sources import Mixed, Only
from tests import tiny

KL = Term("divergence", reverse_kl, (Ask("teacher"),))
IN_CONTEXT = Term("divergence", reverse_kl, (Ask("teacher", context="told"),))
CE = Term("cross_entropy", cross_entropy, (), ("tokens",))
DATASET = {"main": Only("dataset")}
TOLD = DataConfig(contexts={"told": "hint"})
WEIGHED = DataConfig(weight_column="w")
ANSWERED = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]


def rows(**columns: Any) -> list[dict[str, Any]]:
    return [{**row, **columns} for row in tiny.rows(8)]


def mean_square(states: Any, *evidence: Any, helpers: Any) -> torch.Tensor:
    return (states[0] - evidence[0]).square().mean(-1)


def on_layers(student: int = -1, judge: int = -1, **more: Any) -> Method:
    term = Term("layers", None, (Ask("teacher"),), hidden=Hidden(mean_square, (student,), (judge,)))
    return Method((term,), DATASET, **more)


class Elsewhere:
    """A judge that is asked over a wire."""

    def info(self) -> Any:
        from llmdistill.teachers.base import TeacherInfo

        return TeacherInfo("far", "f", "t", 264, (1,), 256, None)

    def close(self) -> None: ...


class Replayed(Elsewhere):
    live = False


def nothing(student_size: int, judge_size: int) -> nn.Module:
    return nn.ReLU()


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "column_missing": (
        {"method": Method(IN_CONTEXT, DATASET), "data": TOLD},  # type: ignore[arg-type]
        "row 0 has no column 'hint', which data.contexts.told names; it has 'prompt', 'completion'. Fix: ",
    ),
    "assistant_last": (
        {"method": Method((IN_CONTEXT,), DATASET), "data": TOLD, "rows": rows(hint=ANSWERED)},
        "row 0: data.contexts.told ends with an assistant message; it must end where the completion begins. Fix: ",
    ),
    "empty_messages": (
        {"method": Method((IN_CONTEXT,), DATASET), "data": TOLD, "rows": rows(hint=[])},
        "row 0: data.contexts.told ends with nothing",
    ),
    "a_number_for_a_context": (
        {"method": Method((IN_CONTEXT,), DATASET), "data": TOLD, "rows": rows(hint=7)},
        "row 0: data.contexts.told is 7; it must be a string or chat messages. Fix: ",
    ),
    "null_everywhere": (
        {"method": Method((IN_CONTEXT,), DATASET), "data": TOLD, "rows": rows(hint=None)},
        "teacher.context is 'told', and no row has such a context. Fix: ",
    ),
    "weights_all_0": (
        {"method": Method((KL,), DATASET), "data": WEIGHED, "rows": rows(w=0)},
        "all rows have weight 0, and term 'divergence' would divide by nothing. Fix: ",
    ),
    "domains_all_0": (
        {"method": Method((KL,), DATASET), "rows": rows(domain="a"), "args": {"domain_weights": {"a": 0.0}}},
        "all rows have weight 0, and term 'divergence' would divide by nothing. Fix: ",
    ),
    "no_completions": (
        {
            "method": Method(
                (KL, Term("ce", cross_entropy, (), ("tokens",), "labels")),
                {
                    "main": Only("student"),
                    "labels": Only("dataset", optional=True),
                },
            ),
            "rows": tiny.rows(8, completion=False),
        },
        "term 'ce' is on the dataset's completions, and no row has one: it would divide by nothing. Fix: ",
    ),
    "a_row_without_a_completion": (
        {"method": Method((KL,), DATASET), "rows": [*tiny.rows(3), *tiny.rows(1, completion=False)]},
        "row 3: completion is empty. Fix: ",
    ),
    "context_and_weight_never_meet": (
        {
            "method": Method((IN_CONTEXT,), DATASET),
            "data": DataConfig(contexts={"told": "hint"}, weight_column="w"),
            "rows": [{**row, "hint": "x" if i % 2 else None, "w": (i + 1) % 2} for i, row in enumerate(tiny.rows(8))],
        },
        "no row has all that term 'divergence' needs (a weight above 0, a completion, context 'told'): it would divide",
    ),
    "helper_without_parameters": (
        {"method": on_layers(helpers={"relu": nothing})},
        "helper 'relu' has no parameters to train. Fix: ",
    ),
    "live_against_itself": (
        {"method": Method((KL,), DATASET), "teacher": StudentTeacher("live")},
        "term 'divergence' compares the live student with itself on the same text: it is always 0. Fix: ",
    ),
    "a_judge_that_writes_nothing": (
        {"method": Method((KL,), {"main": Mixed(0.9, "teacher")}), "teacher": StudentTeacher("ema")},
        "teacher.student is ema, and the method trains on text of the teacher: the student's own comes from",
    ),
    "context_of_a_store": (
        {"method": Method((IN_CONTEXT,), DATASET), "data": TOLD, "rows": rows(hint="x"), "teacher": Replayed()},
        "teacher.context is 'told', and the teacher only replays what was stored under the prompt. Fix: ",
    ),
    "layers_of_a_service": (
        {"method": on_layers(), "teacher": Elsewhere()},
        "term 'layers' reads hidden states of teacher 'far', a Elsewhere; only a model in this process has them. Fix: ",
    ),
    "layers_of_a_store": ({"method": on_layers(), "teacher": Replayed()}, "only a model in this process has them"),
    "student_layer_out_of_range": (
        {"method": on_layers(student=2)},
        "term 'layers', student's layers, names layer 2, and LlamaForCausalLM has 2. Fix: numbers from 0 to 1, or from",
    ),
    "judge_layer_out_of_range": (
        {"method": on_layers(judge=-4), "teacher": tiny.llama(2, layers=3)},
        "term 'layers', teacher's layers, names layer -4, and LlamaForCausalLM has 3. Fix: ",
    ),
    "no_such_judge": (
        {"method": Method((KL, Term("near", reverse_kl, (Ask("reference"),))), DATASET)},
        "the objective reads a reference model (term 'near'), and there is none. Fix: reference=MODEL.",
    ),
    **{
        f"weight_{name}": (
            {"method": Method((KL,), DATASET), "data": WEIGHED, "rows": [*rows(w=1.0)[:2], *rows(w=value)[2:]]},
            f"row 2: w {line}",
        )
        for name, value, line in (
            ("nan", float("nan"), "is nan; a weight is a finite number >= 0, or a list of"),
            ("negative", -1.0, "is -1.0; a weight is a finite number >= 0"),
            ("infinite", [1.0, float("inf")], "is [1.0, inf]; a weight is a finite number >= 0"),
            ("text", "much", "is 'much'; a weight is a finite number >= 0"),
            ("absent", None, "is None; a weight is a finite number >= 0"),
            ("short", [1.0], "has 1 weights, and the completion 8 tokens (with the eos 9). Fix: "),
            ("empty", [], "has 0 weights, and the completion 8 tokens"),
        )
    },
}


@pytest.mark.parametrize("case", CASES)
def test_from_python(case: str, tmp_path: Path) -> None:
    """Before the first step: nothing is written but what the constructor writes, and no weight moves."""
    given, line = CASES[case]
    with pytest.raises(UserError) as error:
        method = given["method"]
        student = tiny.llama(1)
        before = {n: p.detach().clone() for n, p in student.named_parameters()}
        try:
            DistillationTrainer(
                student,
                OPDConfig(output_dir=str(tmp_path), max_steps=1, save_strategy="no", **given.get("args", {})),
                given.get("teacher", tiny.llama(2)),
                method=method,
                train_dataset=given.get("rows", tiny.rows(8)),
                processing_class=tiny.tokenizer(),
                data=given.get("data"),
            ).train()
        finally:
            assert all(torch.equal(p, before[n]) for n, p in student.named_parameters() if n in before)
    assert line in str(error.value) and "\n" not in str(error.value) and "Fix: " in str(error.value)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_negative_domain_weights(tmp_path: Path) -> None:
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="objective.domain_weights"):
            OPDConfig(output_dir=str(tmp_path), domain_weights={"a": weight})


def write(folder: Path, given: list[dict[str, Any]]) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    return str(folder / "rows.jsonl")


@pytest.fixture
def refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*words: str) -> str:
        with pytest.raises(SystemExit) as exit_:
            run_front_door(main, [*command, *words])
        error = capsys.readouterr().err
        assert exit_.value.code == 2 and "Traceback" not in error, error
        line = error.rpartition("error: ")[2].rstrip()
        assert len(line.splitlines()) == 1, line
        return line

    return run


CONTEXT = ["--teacher.context", "told", "--data.contexts", "{told: hint}"]
LIVE = ["--teacher.model=", "--teacher.student", "live"]
METHOD = ["--method", "context_distillation", "--sequences", "dataset"]


@pytest.mark.parametrize(
    ("given", "words", "line"),
    [
        (rows(), [*METHOD, *CONTEXT], "row 0 has no column 'hint', which data.contexts.told names"),
        (rows(hint=ANSWERED), [*METHOD, *CONTEXT], "row 0: data.contexts.told ends with an assistant message"),
        (rows(hint=None), [*METHOD, *CONTEXT], "teacher.context is 'told', and no row has such a context"),
        (rows(hint="x"), [*METHOD, "--teacher.context", "told"], "data.contexts has nothing. Fix: --data.contexts"),
        (rows(w=0), [*METHOD, "--data.weight_column", "w"], "all rows have weight 0, and term 'divergence'"),
        (rows(w=-2), [*METHOD, "--data.weight_column", "w"], "row 0: w is -2; a weight is a finite number >= 0"),
        (rows(w=[1, 2]), [*METHOD, "--data.weight_column", "w"], "row 1: w has 2 weights, and the completion 4 tokens"),
        (tiny.rows(8, completion=False), METHOD, "row 0: completion is empty. Fix: --data.completion_column NAME"),
        (tiny.rows(8, completion=False), ["--ce_weight", "1"], "term 'cross_entropy' is on the dataset's completions"),
        (rows(), [*METHOD, *LIVE], "compares the live student with itself on the same text: it is always 0"),
        (rows(), ["--method", "layers", "--teacher_layers", "2"], "teacher's layers, names layer 2"),
        (rows(), ["--method", "layers", "--student_layers", "-3"], "student's layers, names layer -3"),
        (rows(), ["--method", "vopd", "--objective.top_k", "265"], "objective.top_k is 265, the vocabulary has 264"),
        (rows(), ["--xi", "0.5", "--ce_weight", "1", "--sequences", "dataset"], "objective.xi is 0.5"),
    ],
)
def test_from_a_recipe(refused: Any, tmp_path: Path, given: Any, words: list[str], line: str) -> None:
    assert line in refused("--data.train", write(tmp_path, given), *words)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_context_beside_a_store(refused: Any, tmp_path: Path) -> None:
    words = [*METHOD, *CONTEXT, "--teacher.model=", "--teacher.stored", str(tmp_path / "store")]
    line = refused("--data.train", write(tmp_path, rows(hint="x")), *words)
    assert "teacher.context is 'told'; it must be empty beside teacher.stored" in line


def test_layers_of_a_store(refused: Any, tmp_path: Path, command: list[str]) -> None:
    """Made by an ordinary run that fills it."""
    file, store = write(tmp_path, rows()), str(tmp_path / "store")
    filled = ["--estimator", "top_k", "--objective.top_k", "4", "--sequences", "dataset", "--teacher.stored", store]
    assert main([*command, "--data.train", file, *filled]) == 0
    words = ["--method", "layers", "--sequences", "dataset", "--teacher.model=", "--teacher.stored", store]
    assert "only a model in this process has them. Fix: " in refused("--data.train", file, *words)
