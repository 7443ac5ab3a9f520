"""Recipes, overrides, help and the ``llmdistill`` command."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmdistill import UserError, cli, redi
from llmdistill.opd import SUMMARY, OPDConfig, main
from llmdistill.recipe.command_line import help_text, parse, run_front_door


def recipe_file(folder: Path, **sections: Any) -> str:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(sections))
    return str(file)


def test_sections_and_overrides(tmp_path: Path) -> None:
    file = recipe_file(
        tmp_path,
        student={"model": "s", "lora_target_modules": ["q_proj"]},
        rollouts={"temperature": 0.5},
        objective={"divergence": "jsd", "beta": 0.3},
        train={"learning_rate": 1e-3, "max_steps": 7, "output_dir": str(tmp_path / "run"), "report_to": []},
    )
    recipe = parse(
        OPDConfig,
        ["--config", file, "--rollouts.temperature=0.9", "--teacher.model", "t", "--max_steps", "9", "--bf16", "true"],
    )
    args: Any = recipe.args
    assert recipe.student.model == "s" and recipe.student.lora_target_modules == ["q_proj"]
    assert recipe.teacher.model == "t"
    assert (args.rollouts.temperature, args.max_steps, args.bf16) == (0.9, 9, True)
    assert (args.divergence, args.beta, args.learning_rate) == ("jsd", 0.3, 1e-3)


def test_flags_stay_out_of_the_recipe(tmp_path: Path) -> None:
    words = ["--resume", "--skip-check", "disk", "--debug", "--skip-check=head", "--output_dir", str(tmp_path)]
    recipe = parse(OPDConfig, words)
    assert recipe.flags.resume and recipe.flags.debug and recipe.flags.skip_checks == ("disk", "head")
    assert "flags" not in recipe.resolved()


def test_a_resolved_recipe_says_the_same_when_read_again(tmp_path: Path) -> None:
    words = ["--student.model", "s", "--estimator", "top_k", "--learning_rate", "3e-4", "--output_dir", str(tmp_path)]
    resolved = parse(OPDConfig, words).resolved()
    again = parse(OPDConfig, ["--config", recipe_file(tmp_path, **resolved)]).resolved()
    assert again == resolved
    assert resolved["train"]["learning_rate"] == 3e-4 and resolved["objective"]["estimator"] == "top_k"


TWO = [{"model": "a", "domains": ["math"]}, {"url": "http://b", "name": "code", "domains": ["code", "law"]}]


def test_a_list_of_teachers_and_overrides_by_place_and_name(tmp_path: Path) -> None:
    file = recipe_file(tmp_path, teachers=TWO)
    words = ["--teachers.0.dtype", "float32", "--teachers.code.url", "http://c,http://d", "--teachers.1.lossless=true"]
    recipe = parse(OPDConfig, ["--config", file, *words, "--output_dir", str(tmp_path)])
    first, second = recipe.teachers
    assert (first.model, first.dtype, first.domains) == ("a", "float32", ["math"])
    assert (second.url, second.lossless, second.domains) == ("http://c,http://d", True, ["code", "law"])
    assert recipe.teacher_sections == ["teachers[0]", "teachers[1]"]
    with pytest.raises(UserError, match="has 2 teachers; this takes one"):
        _ = recipe.teacher
    resolved = recipe.resolved()
    assert "teacher" not in resolved and len(resolved["teachers"]) == 2
    assert parse(OPDConfig, ["--config", recipe_file(tmp_path, **resolved)]).resolved() == resolved


def test_one_teacher_is_written_back_as_it_was_given(tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path)]
    listed = parse(OPDConfig, ["--config", recipe_file(tmp_path, teachers=[{"model": "a"}]), *words])
    single = parse(OPDConfig, ["--teacher.model", "a", *words])
    assert listed.teacher == single.teacher == listed.teachers[0]
    assert "teacher" not in listed.resolved() and "teachers" not in single.resolved()
    assert (listed.teacher_sections, single.teacher_sections) == (["teachers[0]"], ["teacher"])


def test_domains_that_yaml_reads_as_numbers_are_names(tmp_path: Path) -> None:
    (recipe,) = parse(
        OPDConfig, ["--config", recipe_file(tmp_path, teachers=[{"model": "a", "domains": [1, "x"]}])]
    ).teachers
    assert recipe.domains == ["1", "x"]


@pytest.mark.parametrize(
    "teachers,words,said",
    [
        ([{"model": "a"}, {"modle": "b"}], [], "unknown key teachers[1].modle; did you mean 'model'"),
        ([{"model": "a", "dtype": "float31"}], [], "teachers[0].dtype: invalid choice: 'float31'"),
        ([{"model": "a", "url": "http://b"}], [], "teachers[0].url is 'http://b'; it must be empty beside teachers"),
        (["a"], [], "teachers[0] is 'a'; it must be a mapping"),
        ({"model": "a"}, [], "teachers is a dict; it must be a list"),
        ([], [], "teachers is an empty list"),
        (TWO, ["--teacher.model", "c"], "has a list teachers, and teacher.model is set too"),
        (TWO, ["--teachers.2.model", "c"], "no teacher '2'; it has 0, 1 (code)"),
        (TWO, ["--teachers.math.model", "c"], "no teacher 'math'; it has 0, 1 (code)"),
        (TWO, ["--teachers.code.modle", "c"], "did you mean 'model'"),
        (TWO, ["--teachers.model", "c"], "of which teacher? Fix: --teachers.0.model"),
        (None, ["--teachers.0.model", "c"], "has no list teachers. Fix: --teacher.model"),
        (None, ["--techers.0.model", "c"], "unknown section 'techers.0'; did you mean 'teachers'"),
        (
            [{"model": "a"}, {"model": "b"}],
            [],
            "teachers[0] and teachers[1] have no domains, and teachers[0].weight is 0",
        ),
        ([{"model": "a", "weight": 1}, {"model": "b"}], [], "teachers[1].weight is 0"),
        (
            TWO,
            ["--teachers.code.weight", "1"],
            "teachers[1].weight is 1, and no other teacher has domains ['code', 'law']",
        ),
        (TWO, ["--teachers.0.domains", "law"], "domain 'law' is both teachers[0]'s and teachers[1]'s"),
        (TWO, ["--teachers.0.name", "code"], "teachers[0] and teachers[1] are both named 'code'"),
        (TWO, ["--teachers.0.weight", "-1"], "teachers[0].weight is -1.0; it must be >= 0"),
        (None, ["--teacher.weight", "1"], "teacher.weight is 1, and no other teacher has no domains"),
        (None, ["--teacher.in_flight", "0"], "teacher.in_flight is 0; it must be >= 1"),
        (None, ["--teacher.timeout_s", "0"], "teacher.timeout_s is 0.0; it must be > 0"),
        (
            None,
            ["--teacher.tokenizer", "x"],
            "teacher.tokenizer is 'x'; it must be empty without a model, a url or a store",
        ),
        (None, ["--rollouts.engine", "remote"], "rollouts.url is ''; it must be set for engine remote"),
        (None, ["--rollouts.url", "http://x"], "rollouts.url is 'http://x'; it must be empty for engine hf"),
        (None, ["--push_folder", "x"], "rollouts.push_folder is 'x'; it must be empty for engine hf"),
        (None, ["--push_every", "0"], "rollouts.push_every is 0; it must be >= 1"),
        (
            None,
            ["--rollouts.tensor_parallel_size", "2"],
            "rollouts.tensor_parallel_size is 2; it must be 1 for engine hf",
        ),
        (None, ["--rollouts.lora", "adapter"], "rollouts.lora is 'adapter'; it must be merged for engine hf"),
        (None, ["--push_every", "2"], "rollouts.push_every is 2; it must be 1 for engine hf"),
        (None, ["--url", "http://x"], "--teacher.url or --rollouts.url"),
        (None, ["--sequences", "dataset", "--estimator", "sampled"], "objective.sequences is dataset, and"),
    ],
)
def test_mistakes_with_teachers_and_services_are_named(
    tmp_path: Path, teachers: Any, words: list[str], said: str
) -> None:
    file = [] if teachers is None else ["--config", recipe_file(tmp_path, teachers=teachers)]
    with pytest.raises(UserError) as error:
        parse(OPDConfig, [*file, *words])
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not re.search(r"(rollouts|teacher|teachers\[\d\])\.(rollouts|teacher)\.", str(error.value))


def test_keys_that_tell_teachers_apart_take_no_short_name_from_others() -> None:
    recipe = parse(OPDConfig, ["--divergence", "f_divergence", "--name", "jeffreys_sum", "--sequences", "dataset"])
    args: Any = recipe.args
    assert args.name == "jeffreys_sum" and recipe.teacher.name == "" and args.sequences == "dataset"


@pytest.mark.parametrize(
    "words,said",
    [
        (["--learing_rate", "1"], "did you mean 'learning_rate'"),
        (["--rollouts.temprature", "1"], "did you mean 'temperature'"),
        (["--rolouts.temperature", "1"], "did you mean 'rollouts'"),
        (["--dtype", "float32"], "--student.dtype or --teacher.dtype or --rollouts.dtype"),
        (["--max_steps"], "--max_steps needs a value, and none follows"),
        (["--student.model", "--bf16"], "'--bf16' is an option; one that begins so is written --student.model=VALUE"),
        (["--per_device_train_batch_size", "0"], "train.per_device_train_batch_size is 0; it must be a number >= 1"),
        (["--gradient_accumulation_steps", "0"], "train.gradient_accumulation_steps is 0"),
        (["--seed", "-1"], "train.seed is -1"),
        (["--learning_rate", "nan"], "train.learning_rate is nan"),
        (["--max_grad_norm", "inf"], "train.max_grad_norm is inf"),
        (["--max_steps", "0"], "train.max_steps is 0; it must be >= 1, or -1 for num_train_epochs"),
        (["--num_train_epochs", "0"], "train.num_train_epochs is 0.0; it must be above 0"),
        (["max_steps", "3"], "not an option"),
        (["recipes/gkd.yaml"], "is not an option; overrides are written --key value. Fix: --config recipes/gkd.yaml."),
        (["--config", "recipes/quikstart.yaml"], "Fix: --config recipes/quickstart.yaml."),
        (["--config", "recipes/diffusion-sft-cpu.yaml"], "Its head says: accelerate launch -m llmdistill.diffusion"),
        (["--max_steps", "three"], "train.max_steps: invalid int value: 'three'"),
        (["--top_p", "most"], "rollouts.top_p: invalid float value: 'most'"),
        (
            ["--divergence", "reverse_lk"],
            "objective.divergence: invalid choice: 'reverse_lk' (choose from 'reverse_kl'",
        ),
        (["--config", "nowhere.yaml"], f"there is no such file in {Path.cwd()}. Fix: recipes/"),
        (["--rollouts.temperature", "-1"], "rollouts.temperature is -1.0; it must be >= 0"),
        (["--loss_temperature", "0"], "objective.loss_temperature is 0.0"),
        (["--beta", "0.5"], "objective.beta is 0.5, and objective.divergence reverse_kl does not read it"),
        (["--estimator", "sampled", "--divergence", "jsd", "--beta", "0.5"], "sampled estimates the reverse KL"),
    ],
)
def test_mistakes_are_named(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        parse(OPDConfig, words)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert "rollouts.rollouts" not in str(error.value)  # what a config says of itself is not said again


def test_options_in_the_forms_that_people_write() -> None:
    """A switch without its value, nothing behind "=", and a list of several words."""
    words = ["--bf16", "--student.model", "X", "--data.heldout=", "--evals.suites", "gsm8k", "math500", "--debug"]
    recipe = parse(OPDConfig, [*words, "--gradient_checkpointing"])
    assert recipe.args.bf16 is True and recipe.args.gradient_checkpointing is True and recipe.flags.debug
    assert (recipe.student.model, recipe.data.heldout) == ("X", "")
    assert recipe.evals.suites == ["gsm8k", "math500"]
    assert parse(OPDConfig, ["--bf16", "false", "--learning_rate=-0.0"]).args.bf16 is False
    assert parse(OPDConfig, ["--evals.suites", "gsm8k"]).evals.suites == ["gsm8k"]


def test_words_that_yaml_takes_for_truth_values(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("train: {eval_strategy: no, save_strategy: off, report_to: null}\n")
    args = parse(OPDConfig, ["--config", str(tmp_path / "r.yaml")]).args
    assert (args.eval_strategy, args.save_strategy, args.report_to) == ("no", "no", [])
    (tmp_path / "r.yaml").write_text("data: {split: yes}\n")
    with pytest.raises(UserError, match="data.split is true, which YAML makes of yes and on too"):
        parse(OPDConfig, ["--config", str(tmp_path / "r.yaml")])


@pytest.mark.parametrize(
    "sections,said",
    [
        ({"studnet": {}}, "did you mean 'student'"),
        ({"train": {"learning_rat": 1}}, "did you mean 'learning_rate'"),
        ({"train": {"divergence": "jsd"}}, "unknown key train.divergence"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path: Path, sections: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(OPDConfig, ["--config", recipe_file(tmp_path, **sections)])


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    for text, said in (("a: [", "is not YAML"), ("just words", "holds no mapping")):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(UserError, match=said):
            parse(OPDConfig, ["--config", str(tmp_path / "r.yaml")])


def test_help_is_grouped_and_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert redi.main(["--help"]) == 0
    text = capsys.readouterr().out
    unread = ("teacher:", "--teachers", "rollouts:")
    assert "guard_drop" in text and not any(word in text for word in unread)
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    groups = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert groups == [f"{s}:" for s in ("student", "teacher", "data", "rollouts", "evals", "objective", "train")]
    assert len(lines) <= 190  # a line per setting: contexts, weights, documents and several methods have theirs
    assert max(map(len, lines)) <= 140
    text = help_text(OPDConfig, "llmdistill.opd", SUMMARY)
    for option in ("--resume", "--skip-check", "--debug", "loss_temperature", "gradient_accumulation_steps"):
        assert option in text


def test_exit_status_and_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def mistaken(argv: Any) -> int:
        raise UserError("x is 1; it must be 2. Fix: 2.")

    def stopped(argv: Any) -> int:
        raise KeyboardInterrupt

    for run, argv, status, said in (
        (mistaken, [], 2, "error: x is 1"),
        (mistaken, ["--debug"], 2, "Traceback"),
        (stopped, [], 130, "--resume"),
        (lambda argv: None, [], 0, ""),
    ):
        with pytest.raises(SystemExit) as exit_:
            run_front_door(run, argv)
        err = capsys.readouterr().err
        assert exit_.value.code == status and said in err
        assert ("Traceback" in err) == ("--debug" in argv)


# ---------------------------------------------------------------- llmdistill


def test_the_command_starts_without_loading_torch() -> None:
    code = "import sys, llmdistill.cli as c; c.parser(); assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0 and "doctor" in out and "report" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "llmdistill doctor looks at a recipe, and none is named. Fix: --config RECIPE."),
        (["--config", "recipes/gdk.yaml"], "there is no such file in .* Fix: --config recipes/gkd.yaml."),
        (["--config=recipes/gdk.yaml", "--bf16"], "there is no such file in .* Fix: --config recipes/gkd.yaml."),
    ],
)
def test_doctor_says_that_a_recipe_is_missing_before_it_imports_the_libraries(words: list[str], said: str) -> None:
    code = f"import sys, llmdistill.cli as c; r = c.main({['doctor', *words]!r}); print(r, 'torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert re.search(said, ended.stderr) and ended.stdout == "2 False\n"


def test_doctor(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", *command]) == 0
    out = capsys.readouterr().out
    for check in ("tokenizers", "round-trip", "self"):
        assert check in out
    assert not (tmp_path / "run").exists()
    assert cli.main(["doctor", "--method", "opd", *command, "--max_new_tokens", "999"]) == 2
    assert "context" in capsys.readouterr().out
    assert cli.main(["doctor", *command, "--max_new_tokens", "999", "--skip-check", "context"]) == 0
    capsys.readouterr()
    assert cli.main(["doctor", *command, "--skip-check", "contxt"]) == 2
    assert "did you mean 'context'" in capsys.readouterr().err


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "no metrics.jsonl" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    monkeypatch.setattr("llmdistill.record.page.page.write_report", lambda path: path / "report.html")
    assert cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert cli.main(["report", str(tmp_path), "--fast"]) == 2


def test_a_mapping_is_read_from_a_recipe_and_from_the_command_line(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data:\n  contexts: {privileged: solution}\n")
    assert parse(OPDConfig, ["--config", str(recipe)]).data.contexts == {"privileged": "solution"}
    for text in ('{"hint": "column"}', "{hint: column}"):
        words = ["--config", str(recipe), "--data.contexts", text]
        assert parse(OPDConfig, words).data.contexts == {"hint": "column"}
    for text in ("column", "{", "[a]"):
        with pytest.raises(UserError, match=r"data\.contexts is .*; it must be a mapping\. Fix: --data\.contexts"):
            parse(OPDConfig, ["--data.contexts", text])
    given = parse(OPDConfig, ["--gradient_checkpointing_kwargs", '{"use_reentrant": false}'])
    assert given.args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    recipe.write_text("train:\n  gradient_checkpointing_kwargs: {use_reentrant: false}\n")
    given = parse(OPDConfig, ["--config", str(recipe)])
    assert given.args.gradient_checkpointing_kwargs == {"use_reentrant": False}
