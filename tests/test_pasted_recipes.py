"""What people paste: recipes with blanks and other types, and settings of other trainers. A line, or the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmdistill import OPDConfig, UserError
from llmdistill.recipe.command_line import _keys, _sections, parse
from llmdistill.recipe.elsewhere import ELSEWHERE


def recipe(folder: Path, text: str) -> Any:
    (folder / "r.yaml").write_text(text)
    return parse(OPDConfig, ["--config", str(folder / "r.yaml"), "--output_dir", str(folder)])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "student: /models/x",
            "student is '/models/x'; it must be a mapping of keys to values. Fix: student: {model: /m",
        ),
        ("teacher: a/b", "Fix: teacher: {model: a/b}"),
        ("teachers: [null]", "teachers[0] is None; it must be a mapping"),
        ("train: foo", "train is 'foo'; it must be a mapping"),
        ("train: {learning_rate: null}", "train.learning_rate is null; it must be a number. Fix: leave it out"),
        ("train: {eval_strategy: null}", "train.eval_strategy is null"),
        ("train: {seed: null}", "train.seed is null; it must be a whole number"),
        ("train: {max_steps: 10.0}", "train.max_steps: invalid int value: '10.0'"),
        ("train: {logging_steps: null}", "train.logging_steps is null"),
        ("train: {optim: adamw_hf}", "train.optim: invalid choice: 'adamw_hf'"),
        (
            "train: {gradient_checkpointing_kwargs: [a]}",
            "it must be a mapping. Fix: gradient_checkpointing_kwargs: {NAME",
        ),
        ("train: {fsdp: true}", "train.fsdp is True, and no launcher started several processes"),
        ("train: {parallelism_config: {tp_size: 2}}", "train.parallelism_config is {'tp_size': 2}, and nothing here"),
        ("rollouts: {temperature: null}", "rollouts.temperature is null; it must be a number"),
        ("rollouts: {dtype: null}", "rollouts.dtype is null; it must be one of its choices"),
        ("rollouts: {kv_cache_gib: 0}", "rollouts.kv_cache_gib is 0.0; it must be > 0"),
        ("rollouts: {gpu_memory_utilization: 90}", "rollouts.gpu_memory_utilization is 90.0; it must be in (0, 1]"),
        ("data: {contexts: [a]}", "data.contexts is ['a']; it must be a mapping"),
        ("data: {limit: -1}", "data.limit is -1; it must be >= 0"),
        ("data: {max_prompt_tokens: 0}", "data.max_prompt_tokens is 0; it must be >= 1"),
        ("data: {train: {a: b.jsonl}}", "data.train is {'a': 'b.jsonl'}; it must be files or a dataset"),
        ("objective: {domain_weights: [1]}", "objective.domain_weights is [1]; it must be a mapping"),
        ("objective: {domain_weights: {a: x}}", "objective.domain_weights is {'a': 'x'}; it must be >= 0"),
        ("objective: {heldout_sequences: -1}", "objective.heldout_sequences is -1"),
        ("teacher: {batch_tokens: 0}", "teacher.batch_tokens is 0; it must be >= 1"),
        (
            "train: {warmup_ratio: 0.03}",
            "unknown key train.warmup_ratio; here train.warmup_steps; below 1 it is a share",
        ),
        ("train: {deepspeed: {zero_optimization: {stage: 2}}}", "no launcher started this process"),
    ],
)
def test_what_cannot_be_is_a_line(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        recipe(tmp_path, text)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_blanks_are_nothing_where_nothing_is_the_default(tmp_path: Path) -> None:
    read = recipe(
        tmp_path,
        "student: {lora_target_modules: null, attn_implementation: null}\ndata: {contexts: null, heldout: null}\n"
        "rollouts: {stop: null}\nevals: {suites: null}\ntrain: {debug: null, warmup_steps: }\nobjective:\n",
    )
    assert read.student.lora_target_modules == [] and read.data.contexts == {} and read.data.heldout == ""
    assert read.args.rollouts.stop == [] and read.evals.suites == [] and read.args.warmup_steps == 0
    assert parse(OPDConfig, ["--student.attn_implementation", "null"]).student.attn_implementation is None
    assert parse(OPDConfig, ["--objective.beta", "null"]).args.beta is None


def test_numbers_that_yaml_takes_for_text(tmp_path: Path) -> None:
    read = recipe(
        tmp_path,
        "train: {learning_rate: 1e-5, lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr: 1e-6}}\n"
        "student: {lora_r: '16'}\n",
    )
    assert (read.args.learning_rate, read.args.lr_scheduler_kwargs) == (1e-5, {"min_lr": 1e-6})
    assert read.student.lora_r == 16


@pytest.mark.parametrize("name", ELSEWHERE)
def test_names_of_other_trainers(name: str) -> None:
    with pytest.raises(UserError) as error:
        parse(OPDConfig, [f"--{name}", "1"])
    assert str(error.value) == f"unknown option --{name}; {ELSEWHERE[name]}"


def test_the_names_that_are_given_instead_are_there() -> None:
    sections = _sections(OPDConfig)
    named = [word.strip(",;()") for advice in ELSEWHERE.values() for word in advice.split() if "." in word.strip(".")]
    settings = [word for word in named if word.split(".")[0] in sections]
    assert len(settings) > 40
    for word in settings:
        section, _, key = word.partition(".")
        assert key in _keys(sections[section], section), word
