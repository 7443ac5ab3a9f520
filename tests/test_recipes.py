"""Every recipe that comes with the repository parses, and runs with tiny models in the places of its own."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmdistill import methods
from llmdistill.recipe.command_line import parse
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
DOORS = {
    "taid": ("taid", "TAIDConfig"),
    "redi": ("redi", "REDIConfig"),
    "alm": ("cross_tokenizer", "CrossTokenizerConfig"),
    "alm-cpu": ("cross_tokenizer", "CrossTokenizerConfig"),
    "chunk_opd": ("cross_tokenizer", "CrossTokenizerConfig"),
    "p_kl": ("cross_tokenizer", "CrossTokenizerConfig"),
    "h_kl": ("cross_tokenizer", "CrossTokenizerConfig"),
    "simct": ("cross_tokenizer", "CrossTokenizerConfig"),
}  # every other one is opd's
ON_GPUS = sorted(f"gpu/{file.stem}" for file in (ROOT / "recipes" / "gpu").glob("*.yaml"))
RECIPES = [*sorted(file.stem for file in (ROOT / "recipes").glob("*.yaml")), *ON_GPUS]


def door(recipe: str) -> tuple[Any, Any]:
    if recipe.startswith("diffusion-"):
        found = import_module("llmdistill.diffusion.__main__")
        return found, found.of_stage(read(recipe)["objective"]["stage"])[0]
    module, config = DOORS.get(recipe, ("opd", "OPDConfig"))
    found = import_module(f"llmdistill.{module}")
    return found, methods.config_class(recipe) if recipe in methods.names() else getattr(found, config)


def read(recipe: str) -> Any:
    return yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text())


def test_every_method_has_a_recipe_that_names_it() -> None:
    for name in methods.names():
        recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
        assert recipe["objective"]["method"] == name


def test_every_file_of_the_quick_starts_is_named_with_what_makes_it() -> None:
    """Who comes from another recipe, or from `make quickstart`, has not made them yet."""
    made_by = {
        **dict.fromkeys(("teacher", "student", "student24"), "data/quickstart_models.py"),
        **dict.fromkeys(("train.jsonl", "heldout.jsonl"), "data/quickstart_prompts.py"),
        **dict.fromkeys(("questions.jsonl", "questions_heldout.jsonl"), "data/quickstart_questions.py"),
        **dict.fromkeys(("pairs.jsonl", "pairs_heldout.jsonl"), "data/redi_pairs.py"),
        "transferred": "llmdistill transfer",
    }
    read_by = [(recipe, name) for recipe in RECIPES for name in _quickstart_files(read(recipe))]
    said = {recipe: (ROOT / "recipes" / f"{recipe}.yaml").read_text() for recipe in RECIPES}
    said["alm-cpu"] = said["alm-cpu"].replace("make quickstart", made_by["teacher"])  # which runs it
    silent = [(recipe, name) for recipe, name in read_by if made_by[name] not in said[recipe]]
    assert len(read_by) > 60 and silent == []


def _quickstart_files(value: Any) -> set[str]:
    if isinstance(value, dict | list):
        return set().union(*(_quickstart_files(v) for v in (value.values() if isinstance(value, dict) else value)))
    return {value.removeprefix("data/quickstart/")} if str(value).startswith("data/quickstart/") else set()


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_parses_and_says_how_it_is_launched(recipe: str) -> None:
    file = ROOT / "recipes" / f"{recipe}.yaml"
    module, config = door(recipe)
    parse(config, ["--config", str(file)])
    head, _, foot = file.read_text().partition("\ntrain:")
    name = module.__name__.removesuffix(".__main__")
    assert f"-m {name} --config recipes/{recipe}.yaml" in head and "accelerate launch" in head
    assert "# Measured" in foot or "# Not measured" in foot


@pytest.mark.parametrize("recipe", ON_GPUS)
def test_gpu_recipes_are_scored_on_math500_and_aime(recipe: str) -> None:
    """During training, and by the command at their head when it is done."""
    head = (ROOT / "recipes" / f"{recipe}.yaml").read_text().partition("\nstudent:")[0]
    assert {"math500", "aime24"} <= set(read(recipe)["evals"]["suites"])
    assert all(suite in head for suite in ("math500", "aime24", "aime25"))


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r not in ("redi", "remote_teacher")])  # have their own tests
def test_it_runs(recipe: str, tmp_path: Path) -> None:
    models = {}
    for name, seed in (("student", 1), ("teacher", 2)):
        models[name] = str(tmp_path / name)
        tiny.llama(seed).save_pretrained(models[name])
        tiny.tokenizer().save_pretrained(models[name])
    rows: list[dict[str, Any]] = tiny.rows(24)
    for i, row in enumerate(rows):
        row |= {"answer": "8", "chosen": f"It is {i}.", "domain": "everyday" if i % 2 else "gcd"}
    for name, part in (("train", rows[:16]), ("heldout", rows[16:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    teachers = ["--teacher.model", models["teacher"]]
    if recipe == "experts":
        teachers = [w for t in ("everyday", "reasoning") for w in (f"--teachers.{t}.model", models["teacher"])]
    if "student" in read(recipe).get("teacher", {}) or not read(recipe).keys() & {"teacher", "teachers"}:
        teachers = []  # the student is its own, or nobody is asked
    elsewhere = []  # what only the machines of a GPU recipe have
    if recipe in ON_GPUS:
        elsewhere = ["--teacher.url", "", "--evals.suites", "[]", "--data.chat_template_kwargs", "{}"]
        elsewhere += ["--gradient_accumulation_steps", "1", "--student.dtype", "float32", "--teacher.dtype", "float32"]
    module, _ = door(recipe)
    small = ["--max_steps", "2", "--max_new_tokens", "6", "--logging_steps", "1", "--save_strategy", "no"]
    files = ["--data.train", str(tmp_path / "train.jsonl"), "--data.heldout", str(tmp_path / "heldout.jsonl")]
    words = ["--config", str(ROOT / "recipes" / f"{recipe}.yaml"), "--student.model", models["student"], *teachers]
    folder = tmp_path / "run"
    module.main(
        [*words, *files, *small, *elsewhere, "--rollouts.engine", "hf", "--bf16", "false", "--output_dir", str(folder)]
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert (folder / "student" / "config.json").is_file() and (folder / "report.html").is_file()
