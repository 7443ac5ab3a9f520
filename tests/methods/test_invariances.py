"""What holds of every method: padding, packing, micro-batches and a student that says what its judge says."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from llmdistill import methods
from llmdistill.recipe.data_config import DataConfig
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.student import StudentTeacher
from tests import tiny
from tests.methods import rounds

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "distillm2": ("distillm2", {}),
    "distillm2_adaptive": ("distillm2", {"adaptive_alpha": True}),
    "sampled_f": ("sampled_f", {}),
    "vopd_kl": ("vopd", {"top_k": 9}),
    "vopd_optimal": ("vopd", {"baseline": "optimal"}),
    "opsd": ("opsd", {"context": rounds.CONTEXT}),
    "context_distillation": ("context_distillation", {"context": rounds.CONTEXT}),
    "sdpo": ("sdpo", {"context": rounds.CONTEXT, "top_k": 9, "sampling": {"samples_per_prompt": 2}}),
    "tip": ("tip", {"keep": 0.4}),
    "entropy_aware": ("entropy_aware", {"threshold": 4.35, "top_k": 5}),
    "selected": ("selected", {"first": 2}),
    "returns": ("returns", {}),
    "opsa": ("opsa", {"strongest": -1.0}),
    "layers_cosine": ("layers", {"student_layers": [0, 1], "teacher_layers": [0, 1]}),
    "layers_mse": ("layers", {"distance": "mse"}),
    "layers_mi_alpha": ("layers", {"distance": "mi_alpha"}),
}


def test_every_method_is_here() -> None:
    # see test_chunks.py and test_classes.py: their judge has another tokenizer
    in_chunks = {"alm", "chunk_opd", "p_kl", "h_kl", "simct"}
    assert {name for name, _ in CASES.values()} == set(methods.names()) - in_chunks


def trainer(folder: Path, case: str, **more: Any) -> Any:
    name, settings = CASES[case]
    if "context" in settings:
        rows = [{**row, "hint": f"it is {i}" if i % 3 else None} for i, row in enumerate(tiny.rows(16))]
        more = {"rows": rows, "data": DataConfig(contexts={rounds.CONTEXT: "hint"}), **more}
    if name == "sdpo":
        more["trainer"] = {"reward": lambda prompts, written: [float(len(text) % 2) for text in written]}
    return rounds.make(folder, name, **settings, **more)


def texts(case: str, **padding: int) -> Any:
    if CASES[case][0] != "distillm2":
        return rounds.text(**padding)
    other = [(p, [*c[::-1], 90], None, [0.0] * (len(c) + 1)) for p, c, *_ in rounds.SEQUENCES]
    return {"teacher": rounds.text(other, **padding), "student": rounds.text(**padding)}


@pytest.mark.parametrize("case", CASES)
def test_gradients_do_not_depend_on_micro_batches_padding_or_packing(tmp_path: Path, case: str) -> None:
    t = trainer(tmp_path, case)
    for schedule in t.method.schedules.values():  # a first round sets anchors
        schedule.load_state_dict(
            {**schedule.state_dict(), "anchor": 0.01} if "anchor" in schedule.state_dict() else {"now": 1.25}
        )
    loss, whole = rounds.gradients(t, texts(case))
    for parts, padding in ((2, {}), (4, {}), (1, {"left": 3, "right": 4}), (4, {"left": 2})):
        other, found = rounds.gradients(t, texts(case, **padding), parts)
        assert other == pytest.approx(loss, rel=1e-5, abs=1e-7)
        rounds.assert_same(found, whole, 5e-5)
    t.passes = dataclasses.replace(t.passes, packed=True)
    for judge in t.judges.values():
        if isinstance(judge, LocalTeacher):
            judge.packs = True
    for parts in (1, 4):
        other, found = rounds.gradients(t, texts(case), parts)
        assert other == pytest.approx(loss, rel=1e-5, abs=1e-7)
        rounds.assert_same(found, whole, 5e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_run_does_not_depend_on_the_micro_batch_split(tmp_path: Path, case: str) -> None:
    """Losses, gradient norms and weights of two steps: 8 prompts at once, in two, in four micro-batches."""
    runs = []
    for size, steps in ((8, 1), (4, 2), (2, 4)):
        student = tiny.llama(1)
        shape = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        more: dict[str, Any] = {"learning_rate": 1e-2, "optim": "sgd", "max_grad_norm": 0.5}
        if "context" not in CASES[case][1]:
            more["rows"] = tiny.rows(16)
        t = trainer(tmp_path / str(size), case, student=student, **shape, **more)
        t.train()
        lines = [(x["loss"], x["grad_norm"]) for x in t.state.log_history if "loss" in x]
        runs.append((lines, {n: p.detach() for n, p in student.named_parameters()}))
    lines, weights = runs[0]
    assert len(lines) == 2 and lines[0][1] > 1e-3
    for other_lines, other_weights in runs[1:]:
        assert other_lines == [pytest.approx(line, rel=2e-4, abs=1e-6) for line in lines]
        for name in weights:
            torch.testing.assert_close(other_weights[name], weights[name], rtol=1e-3, atol=2e-5)


# layers has projectors between twins, entropy_aware a sum over a part of the vocabulary, and opsa no judge
VANISHING = [c for c in CASES if not c.startswith(("layers", "entropy_aware", "opsa"))]


@pytest.mark.parametrize("case", VANISHING)
@pytest.mark.parametrize("own", [False, True], ids=["a copy", "itself"])
def test_a_student_that_says_what_its_judge_says_has_no_loss_and_no_gradient(
    tmp_path: Path, case: str, own: bool
) -> None:
    """Contexts that add nothing: the judge reads the very prompt. An average of a student that has not moved is one."""
    student = tiny.llama(1)
    teacher = StudentTeacher("ema", 0.9) if own else copy.deepcopy(student)
    t = trainer(tmp_path, case, student=student, teacher=teacher)
    rows = [(p, c, p, b) for p, c, _, b in rounds.SEQUENCES]
    both = {"teacher": rounds.text(rows), "student": rounds.text(rows)}
    loss, found = rounds.gradients(t, both if CASES[case][0] == "distillm2" else rounds.text(rows))
    assert abs(loss) < 2e-6
    assert all(float(g.abs().max()) < 2e-5 for g in found.values())
    assert abs(rounds.gradients(trainer(tmp_path / "b", case), texts(case))[0]) > 1e-4  # it does see a difference


def masked(text: Any, sequences: Any) -> Any:
    counted = text.rollout.completion_mask.clone()
    counted[sequences] = False
    return dataclasses.replace(text, rollout=dataclasses.replace(text.rollout, completion_mask=counted))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("parts", [1, 4])
def test_a_round_without_a_counted_token_has_no_loss(tmp_path: Path, case: str, parts: int) -> None:
    """As after rollouts.mask_truncated, where every completion was cut off: 0, and no NaN, in loss and gradients."""
    t = trainer(tmp_path, case)
    given = texts(case)
    given = given if isinstance(given, dict) else {"main": given}
    loss, found = rounds.gradients(t, {name: masked(text, slice(None)) for name, text in given.items()}, parts)
    assert loss == 0.0 and all(not g.any() for g in found.values())
    whole, _ = rounds.gradients(t, given)
    assert whole == pytest.approx(rounds.gradients(trainer(tmp_path / "b", case), given)[0], rel=1e-6)  # nothing stays


@pytest.mark.parametrize("case", CASES)
def test_a_sequence_without_a_counted_token_is_as_none(tmp_path: Path, case: str) -> None:
    given = texts(case)
    given = given if isinstance(given, dict) else {"main": given}
    kept = [0, 2, 3]
    loss, found = rounds.gradients(trainer(tmp_path / "a", case), {n: masked(x, 1) for n, x in given.items()}, 2)
    without = {n: x.reorder(kept) for n, x in given.items()}
    expected, by_hand = rounds.gradients(trainer(tmp_path / "b", case), without, 1)
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-7)
    rounds.assert_same(found, by_hand, 5e-5)
