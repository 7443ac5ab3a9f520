"""One way to write options, and the other taken everywhere: ``--max_new_tokens`` and ``--max-new-tokens``."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmdistill import OPDConfig, UserError, cli
from llmdistill.datagen.chain import find_step
from llmdistill.datagen.command import step_parser
from llmdistill.datagen.generate_command import _parser as generate_parser
from llmdistill.datagen.generate_command import roles_of
from llmdistill.evals.command import _parser as eval_parser
from llmdistill.evals.contamination import _parser as contamination_parser
from llmdistill.options import OptionParser, as_declared
from llmdistill.recipe.command_line import named, parse
from llmdistill.service import serve
from llmdistill.verify.command import parser as verify_parser

PARSERS = [
    eval_parser(),
    generate_parser(),
    contamination_parser(),
    verify_parser(),
    *(step_parser(name, find_step(name, ""), "data") for name in ("curate", "build_pairs", "verify")),
]


@pytest.mark.parametrize("parser", PARSERS, ids=lambda p: p.prog)
def test_every_option_is_taken_in_both_forms_and_shown_in_one(parser: argparse.ArgumentParser) -> None:
    declared = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    assert isinstance(parser, OptionParser) and not [option for option in declared if "-" in option[2:]]
    for option in declared:
        assert as_declared([option.replace("_", "-"), f"{option}=a-b"], declared) == [option, f"{option}=a-b"]


def test_a_training_door(tmp_path: Path) -> None:
    out = ["--output-dir", str(tmp_path)]
    words = ["--rollouts.max-new-tokens", "5", "--learning-rate=1e-3", "--skip_check", "disk", "--skip-check=head"]
    recipe = parse(OPDConfig, [*words, *out])
    assert (recipe.args.rollouts.max_new_tokens, recipe.args.learning_rate) == (5, 1e-3)
    assert recipe.flags.skip_checks == ("disk", "head") and recipe.args.output_dir == str(tmp_path)
    assert named(out, "train", "output_dir") == str(tmp_path)
    file = tmp_path / "r.yaml"  # a name with a dash is the user's own
    file.write_text("teachers: [{model: a, name: my-math, domains: [m]}, {model: b}]")
    recipe = parse(OPDConfig, ["--config", str(file), "--teachers.my-math.batch-tokens", "7", *out])
    assert recipe.teachers[0].batch_tokens == 7
    with pytest.raises(UserError, match="unknown option --max_new_token; did you mean 'max_new_tokens'"):
        parse(OPDConfig, ["--max-new-token", "5"])


@pytest.mark.parametrize(
    ("refused", "words", "said"),
    [
        (
            eval_parser().parse_args,
            ["gsm8k", "--model", "m", "--limit", "ten"],
            "--limit is 'ten'; it must be a whole number",
        ),
        (generate_parser().parse_args, ["--top_p", "x"], "--top_p is 'x'; it must be a number"),
        (serve.parsed, ["--model", "m", "--port", "http"], "--port is 'http'; it must be a whole number"),
    ],
)
def test_what_is_no_number_is_said_in_our_words(refused: Any, words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        refused(words)


def test_values_stay_as_they_are() -> None:
    words = verify_parser().parse_args(["a-b_c.jsonl", "--gold", "my-column", "--allow-unsafe-exec"])
    assert (words.file, words.gold, words.allow_unsafe_exec) == ("a-b_c.jsonl", "my-column", True)
    assert roles_of(["--teacher", "a-b", "--teacher.trust-remote-code"])["teacher"]["model"] == "a-b"


def test_serve() -> None:
    for form in ("--max_model_len", "--max-model-len"):
        assert serve.parsed(["--model", "m", form, "64"]).max_model_len == 64


@pytest.mark.parametrize("command", ["eval", "verify", "contamination", "generate", "transfer"])
def test_a_wrong_option_is_a_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--no-such", "1"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: llmdistill {command}") and len(err.splitlines()) == 1


def test_nothing_heavy_is_loaded_for_it() -> None:
    code = (
        "import sys, llmdistill.options, llmdistill.failures; assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
