"""``llmdistill data``: a chain of steps, or one of them.

llmdistill data run recipes/data/sums.yaml
llmdistill data verify traces.jsonl judged.jsonl --judge math
llmdistill data build_pairs judged.jsonl pairs.jsonl --rule redi
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from llmdistill import datagen
from llmdistill.datagen.chain import Link, StepFunction, find_step, run_chain
from llmdistill.datagen.tell import summary
from llmdistill.options import OptionParser
from llmdistill.quiet import quiet
from llmdistill.record.manifest import Manifest

STEPS = tuple(name for name in datagen.__all__ if name != "generate")  # that one is a command of its own


def run(argv: Sequence[str]) -> int:
    """The command. Exit status 0, or what :class:`UserError` makes of it one level up."""
    top = OptionParser(
        prog="llmdistill data",
        usage="llmdistill data run RECIPE\n       llmdistill data STEP FILE [FILE ...] OUT [--key value ...]",
        description=f"STEP is one of {', '.join(STEPS)}, or package.module:function; llmdistill data STEP --help.",
        allow_abbrev=False,
    )
    top.add_argument("what", metavar="run | STEP")
    words, rest = top.parse_known_args(argv[:1])[0], list(argv[1:])
    if words.what == "run":
        return _chain(rest)
    return run_one(words.what, rest)


def run_one(name: str, argv: Sequence[str], prog: str = "") -> int:
    """One step over files, its settings as options. For ``llmdistill data STEP`` and the scripts in data/."""
    step = find_step(name, "llmdistill data")
    words = step_parser(name, step, prog or f"llmdistill data {name}").parse_args(argv)
    settings = {key: value for key, value in vars(words).items() if key not in ("src", "out", "debug")}
    for line in summary(step(words.src, words.out, **settings)):
        print(line)
    return 0


def step_parser(name: str, step: StepFunction, prog: str) -> argparse.ArgumentParser:
    """The options of a step: its keyword settings, with their types and defaults."""
    description = inspect.getdoc(step) or ""
    parser = OptionParser(
        prog=prog, description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("src", nargs="+", metavar="FILE", help=".jsonl, .jsonl.gz, .json or .parquet")
    parser.add_argument("out", metavar="OUT", help=".jsonl, .jsonl.gz or .parquet, with a manifest beside it")
    parser.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    kinds = get_type_hints(step)
    for key, parameter in list(inspect.signature(step).parameters.items())[2:]:
        default, kind = parameter.default, kinds.get(key, str)
        needed = default is inspect.Parameter.empty
        shown = "" if needed or default in ("", None, False, ()) else f"[{default}]"
        options: dict[str, Any] = {"required": True} if needed else {"default": default, "help": shown}
        if kind is bool:
            parser.add_argument(f"--{key}", action="store_true")
        elif get_origin(kind) is Literal:
            parser.add_argument(f"--{key}", choices=get_args(kind), **options)
        elif kind in (int, float, str):
            parser.add_argument(f"--{key}", type=kind, metavar=kind.__name__.upper(), **options)
        else:
            parser.add_argument(f"--{key}", type=_value, metavar="JSON", **options)
    return parser


def _chain(argv: Sequence[str]) -> int:
    parser = OptionParser(
        prog="llmdistill data run", description="Does the steps of a recipe; finished ones are skipped."
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML: folder, steps")
    parser.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)

    def told(link: Link, manifest: Manifest, done_before: bool) -> None:
        first, *more = summary(manifest)
        print(f"{link.name}: finished before, {link.out}" if done_before else "\n".join([first, *more]), flush=True)

    recipe = parser.parse_args(argv).recipe
    quiet()
    run_chain(recipe, told)
    return 0


def _value(text: str) -> Any:
    """JSON, or a text as it stands."""
    try:
        return json.loads(text)
    except ValueError:
        return text
