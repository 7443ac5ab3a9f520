"""The ``llmdistill`` command: what is not a training run.

    llmdistill doctor --config recipes/quickstart.yaml   # every start-up check of that run, without the run
    llmdistill report runs/quickstart                    # its page again, from the files in the folder
    llmdistill eval gsm8k --model runs/quickstart/student
    llmdistill serve --model TEACHER                     # the teacher-rollout service
    llmdistill transfer --model M --tokenizer T --out DIR  # another vocabulary, from which training goes on
    llmdistill contamination --train prompts.jsonl       # which benchmark problems are in there
    llmdistill verify answers.jsonl                      # verdicts on completions, with their reasons
    llmdistill generate --prompts P --teacher M --out F  # traces, resumable call by call
    llmdistill data run recipes/data/sums.yaml           # a chain: traces, verdicts, pairs, curation, ...

Training has its own front doors (``accelerate launch -m llmdistill.opd``). Nothing heavy is imported before a command
is known.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from llmdistill.errors import UserError
from llmdistill.failures import reported
from llmdistill.recipe.heads import no_recipe

# module of the package -> its config and trainer
METHODS = {
    "opd": ("OPDConfig", "OPDTrainer"),
    "taid": ("TAIDConfig", "TAIDTrainer"),
    "cross_tokenizer": ("CrossTokenizerConfig", "CrossTokenizerTrainer"),
}


def doctor(words: argparse.Namespace, rest: Sequence[str]) -> int:
    """Builds what the front door would build, runs all checks, prints all findings. 2 if one failed."""
    if "LOCAL_RANK" not in os.environ:  # one process looks at one GPU; a run of one that sees several is refused
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    _check_named(rest)  # before a minute of imports
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from llmdistill.pipeline.run import build
    from llmdistill.preflight import STYLE, examine
    from llmdistill.preflight.foreseen import foreseen
    from llmdistill.preflight.foreseen import table as table_of_memory
    from llmdistill.quiet import quiet
    from llmdistill.recipe.command_line import named, parse

    if words.method == "diffusion":
        from llmdistill.diffusion.__main__ import of_stage

        config_class, trainer_class = of_stage(named(rest, "objective", "stage") or "sft")
    else:
        module = importlib.import_module(f"llmdistill.{words.method}")
        config_class, trainer_class = (getattr(module, name) for name in METHODS[words.method])
    quiet()
    recipe = parse(config_class, rest)
    console = Console(markup=False)
    memory = foreseen(recipe, gpus=words.gpus, zero=words.zero, gpu_gib=words.gpu_gib)
    if memory is not None:
        console.print(table_of_memory(*memory))
    if words.estimate:
        if memory is None:
            raise UserError(
                f"the config of {recipe.student.model!r} or of a teacher cannot be had. Fix: a folder or name."
            )
        return 2 if memory[0].peak > memory[1] else 0
    folder = Path(recipe.args.output_dir or "runs/default")
    was_there = folder.exists()
    trainer = build(recipe, trainer_class)
    try:
        findings = examine(trainer, recipe, recipe.flags.skip_checks)
    finally:
        trainer.close()
        if not was_there and folder.exists() and not any(folder.iterdir()):
            folder.rmdir()  # transformers makes it; a look leaves nothing behind
    teachers = " + ".join(t.label for t in recipe.teachers if t.label)
    title = f"{words.method}: {f'{teachers} into ' if teachers else ''}{recipe.student.model}"
    table = Table("", "check", "found", title=title)
    for f in findings:
        found = f.message + (f"\nFix: {f.fix}" if f.fix else "")
        table.add_row(Text(f.level, STYLE[f.level]), Text(f.check), Text(found))
    console.print(table)
    return 2 if any(f.level == "fail" for f in findings) else 0


def _check_named(rest: Sequence[str]) -> None:
    if not rest:
        raise UserError("llmdistill doctor looks at a recipe, and none is named. Fix: --config RECIPE.")
    for word, following in zip(rest, [*rest[1:], ""], strict=True):
        name, given, value = word.partition("=")
        if name == "--config" and not (path := Path(value if given else following)).is_file():
            raise no_recipe(path)


def report(words: argparse.Namespace, rest: Sequence[str]) -> int:
    """Writes ``report.html`` of a run folder and prints its path."""
    if rest:
        raise UserError(f"llmdistill report takes a run folder only, not {rest[0]!r}")
    run = Path(words.run)
    if not (run / "metrics.jsonl").is_file():
        raise UserError(f"{run} is no run folder: it has no metrics.jsonl. Fix: the train.output_dir of a run.")
    from llmdistill.record.page.page import write_report

    print(write_report(run))
    return 0


def serve(words: argparse.Namespace, rest: Sequence[str]) -> int:
    """Runs the teacher-rollout service until it is told to stop."""
    from llmdistill.service.command import main as run_service

    return run_service(rest)


def evaluation(words: argparse.Namespace, rest: Sequence[str]) -> int:
    """Scores a model on suites."""
    from llmdistill.evals.command import run

    return run(rest)


def contamination(words: argparse.Namespace, rest: Sequence[str]) -> int:
    """Which benchmark problems occur in a training set."""
    from llmdistill.evals.contamination import main as check

    return check(rest)


def verify(words: argparse.Namespace, rest: Sequence[str]) -> int:
    """Verdicts on completions in a file, with their reasons."""
    from llmdistill.verify.command import run

    return run(rest)


def generate(words: argparse.Namespace, rest: Sequence[str]) -> int:
    """Traces of prompts, by one or several models."""
    from llmdistill.datagen.generate_command import run

    return run(rest)


def data(words: argparse.Namespace, rest: Sequence[str]) -> int:
    """A chain of data steps, or one of them."""
    from llmdistill.datagen.command import run

    return run(rest)


def transfer(words: argparse.Namespace, rest: Sequence[str]) -> int:
    """Gives a model another tokenizer."""
    from llmdistill.models.transfer import run

    return run(rest)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="llmdistill", description="Distil large language models into small ones.")
    top.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    look = commands.add_parser(
        "doctor",
        help="run the start-up checks of a recipe and nothing else",
        usage="llmdistill doctor [--method METHOD] [--estimate] [--gpus N] [--zero STAGE] [--gpu_gib GIB] "
        "--config FILE [--key value ...] [--skip-check NAME]",
        description="Takes the options of the front door (python -m llmdistill.opd --help lists them). "
        "Exit status 2 when a check fails.",
        allow_abbrev=False,
    )
    look.add_argument(
        "--method", choices=sorted({*METHODS, "diffusion"}), default="opd", help="front door the recipe is for [opd]"
    )
    look.add_argument("--estimate", action="store_true", help="only the estimate of memory and bytes; loads no model")
    look.add_argument("--gpus", type=int, metavar="N", help="processes it is for [as launched]")
    look.add_argument("--zero", type=int, choices=range(4), help="stage of ZeRO it is for [as launched]")
    look.add_argument("--gpu_gib", type=float, metavar="GIB", help="memory of a GPU it is for [of this device]")
    look.set_defaults(run_command=doctor)
    service = commands.add_parser(
        "serve", help="serve a model to trainers: scores, samples, new weights", add_help=False, allow_abbrev=False
    )
    service.set_defaults(run_command=serve)
    for name, command, what in (
        ("eval", evaluation, "score a model on MATH500, AIME, GSM8K, HumanEval, ... or a suite of yours"),
        ("contamination", contamination, "find benchmark problems in a training set"),
        ("transfer", transfer, "give a model another tokenizer"),
        ("verify", verify, "judge completions in a file against right answers or tests"),
        ("generate", generate, "have models write traces of prompts"),
        ("data", data, "run a chain of data steps, or one: verify, build_pairs, curate, ..."),
    ):
        other = commands.add_parser(name, help=what, add_help=False, allow_abbrev=False)
        other.set_defaults(run_command=command)
    page = commands.add_parser("report", help="rebuild report.html of a run folder", allow_abbrev=False)
    page.add_argument("run", metavar="RUN", help="the run's train.output_dir")
    page.set_defaults(run_command=report)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit status: 0 fine, 1 a fault of ours, 2 the user's to mend, 130 interrupted."""
    words, rest = parser().parse_known_args(argv)
    command: Callable[[argparse.Namespace, Sequence[str]], int] = words.run_command
    goes_on = words.command in ("eval", "generate", "data")
    return reported(
        lambda: command(words, rest),
        [*(["--debug"] if words.debug else []), words.command, *rest],
        interrupted="interrupted" + ("; the same command goes on from here" if goes_on else ""),
    )


if __name__ == "__main__":
    sys.exit(main())
