"""Settings of the methods: what is out of range, read by nothing or contradicted is one line, before anything is
loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from llmdistill import methods, opd
from llmdistill.errors import UserError
from llmdistill.recipe.command_line import run_front_door
from llmdistill.recipe.config import RolloutConfig
from llmdistill.recipe.settings import check_conflicts

LIMITS = ("at_least", "above", "at_most", "below")
NEEDED: dict[str, dict[str, Any]] = {  # to be sound at all
    "selected": {"first": 4},
    "sdpo": {"rollouts": RolloutConfig(samples_per_prompt=2)},
}


def ranged() -> list[tuple[str, str, Any, bool]]:
    """(method, setting, value, sound) just inside and just outside of every limit that a field declares."""
    found = []
    for method in methods.names():
        for f in dataclasses.fields(methods.load(method).Settings):
            for name in LIMITS:
                if (limit := f.metadata.get(name)) is None:
                    continue
                step = 1 if isinstance(f.default, int) else 1e-6
                inside, outside = (limit, -step) if name in ("at_least", "at_most") else (None, 0)
                out = limit + (outside if name in ("at_least", "above") else -outside)
                found.append((method, f.name, type(step)(out), False))
                if inside is not None:
                    found.append((method, f.name, type(step)(inside), True))
    return found


RANGED = ranged()


def test_every_number_of_a_method_has_a_range() -> None:
    bare = [
        (method, f.name)
        for method in methods.names()
        for f in dataclasses.fields(methods.load(method).Settings)
        if isinstance(f.default, int | float) and not isinstance(f.default, bool)
        if not any(name in f.metadata for name in LIMITS)
    ]
    assert not bare and len(RANGED) > 30


@pytest.mark.parametrize(("method", "name", "value", "sound"), RANGED)
def test_ranges(method: str, name: str, value: Any, sound: bool, tmp_path: Path) -> None:
    settings = {**NEEDED.get(method, {}), name: value}
    if sound:
        if method == "selected":
            settings["without"] = [3]
        methods.config_class(method)(output_dir=str(tmp_path), **settings)
        return
    with pytest.raises(UserError) as error:
        methods.config_class(method)(output_dir=str(tmp_path), **settings)
    line = str(error.value)
    assert line.startswith(f"objective.{name} is {value!r}; it must be") and "Fix: " in line and "\n" not in line


@pytest.mark.parametrize(
    ("method", "settings", "line"),
    [
        ("vopd", {"baseline": "optimal", "top_k": 7}, "objective.top_k is 7, and objective.baseline optimal does not"),
        ("selected", {}, "objective.first is 0 and objective.without empty"),
        ("sampled_f", {"f": "kl"}, "objective.f is 'kl', which is no f-divergence"),
        (
            "layers",
            {"student_layers": [0, 1]},
            "objective.student_layers is [0, 1], objective.teacher_layers [-1]; they are pairs",
        ),
        ("layers", {"student_layers": [], "teacher_layers": []}, "at least one"),
        ("sdpo", {}, "rollouts.samples_per_prompt is 1"),
        *(
            (name, {"rollouts": RolloutConfig(temperature=0, samples_per_prompt=2)}, "rollouts.temperature is 0")
            for name in ("sampled_f", "vopd", "entropy_aware", "sdpo")
        ),
    ],
)
def test_contradictions(method: str, settings: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        methods.config_class(method)(output_dir=str(tmp_path), **settings)
    assert line in str(error.value) and "Fix: " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("method", methods.names())
def test_what_contradictions_say_can_be_written(method: str, tmp_path: Path) -> None:
    """Of settings as they stand, whichever of them are numbers."""
    settings: dict[str, Any] = {"rollouts": RolloutConfig(samples_per_prompt=2)}
    settings |= {"without": [3]} if method == "selected" else {}
    args = methods.config_class(method)(output_dir=str(tmp_path), **settings)
    for conflict in getattr(type(args), "conflicts", ()):
        always = dataclasses.replace(conflict, when=lambda s: True)
        with pytest.raises(UserError, match="Fix: "):
            check_conflicts(args, [always])


def test_greedy_samples_do_where_no_token_is_weighed(tmp_path: Path) -> None:
    greedy = RolloutConfig(temperature=0, samples_per_prompt=2)
    for name, more in (("tip", {}), ("opsd", {}), ("sdpo", {"importance_cap": 0.0})):
        methods.config_class(name)(output_dir=str(tmp_path), rollouts=greedy, **more)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--method", "tip", "--keep", "1.5"], "objective.keep is 1.5; it must be > 0 and <= 1. Fix: use 0.5."),
        (["--method", "vopd", "--baseline", "best"], "objective.baseline"),
        (["--method", "opsd", "--divergence", "jsd"], "divergence"),  # a setting of another method
        (["--method", "redi"], "Fix: accelerate launch -m llmdistill.redi, which is a front door; or one of alm, "),
        (["--method", "tipp"], "objective.method is 'tipp', and there is no module llmdistill.methods.tipp"),
        (["--method", "json:decoder"], "json.decoder has no Settings and build(args)"),
        (["--method", "layers", "--teacher_layers", "[0, 1]"], "objective.teacher_layers [0, 1]; they are pairs"),
        (
            ["--method", "layers", "--teacher_layers", "[0, a]"],
            "objective.teacher_layers is '[0, a]'; it must be a list",
        ),
    ],
)
def test_from_the_command_line_before_anything_is_loaded(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The student's folder does not exist: that would be the next mistake."""
    with pytest.raises(SystemExit) as exit_:
        run_front_door(opd.main, ["--student.model", str(tmp_path / "nowhere"), *words])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and "Traceback" not in error
    assert error.startswith("error: ") and line in error and len(error.splitlines()) == 1
