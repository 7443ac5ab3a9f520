"""``llmdistill eval``: the command line of :func:`llmdistill.evals.evaluate`, and the table it ends with.

llmdistill eval eval/math500.yaml --model PATH_OR_NAME --n 16 --temperature 0.6
llmdistill eval gsm8k aime24 --model PATH_OR_NAME            # several suites, the model loaded once
llmdistill eval --grade runs/eval/MODEL/gsm8k                # verdicts again, without generating
llmdistill eval --compare runs/eval/A/gsm8k runs/eval/B/gsm8k
accelerate launch --num_processes 8 eval/run.py eval/math500.yaml --model PATH_OR_NAME
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmdistill.errors import UserError
from llmdistill.evals.config import EvalConfig
from llmdistill.evals.runner import Evaluation, evaluate, launch, regrade
from llmdistill.evals.suite import bundled_suites
from llmdistill.evals.summary import drawn_with
from llmdistill.options import OptionParser
from llmdistill.quiet import quiet


def run(argv: Sequence[str]) -> int:
    """The command. Exit status 0, or what :class:`UserError` makes of it one level up."""
    rank, world = launch()  # before anything starts a group or counts GPUs
    words, unknown = _parser().parse_known_intermixed_args(argv)
    if unknown:
        fields = [f.name for f in dataclasses.fields(EvalConfig)]
        near = difflib.get_close_matches(unknown[0].lstrip("-").split("=")[0], fields, n=1)
        hint = f"did you mean --{near[0]}?" if near else "llmdistill eval --help lists the settings."
        raise UserError(f"llmdistill eval does not know {unknown[0]}; {hint}")
    given = {f.name: getattr(words, f.name) for f in dataclasses.fields(EvalConfig)}
    if words.compare:
        from llmdistill.evals.compare import compare, matched

        _no_more(words.suites, "--compare")
        for a, b in matched(*words.compare):
            Console(markup=False).print(compare(a, b).table())
        return 0
    if words.grade:
        _no_more(words.suites, "--grade")
        options = EvalConfig(**{**given, "model": "stored"})
        done = [regrade(f, workers=options.workers, allow_unsafe_exec=options.allow_unsafe_exec) for f in words.grade]
    else:
        if not words.suites:
            raise UserError("llmdistill eval was given no suite. Fix: a YAML file, or a name such as gsm8k.")
        quiet()
        found = evaluate(words.suites, config=EvalConfig(**given), rank=rank, world=world)
        assert isinstance(found, list)
        done = found
    for one in done:
        Console(markup=False).print(table(one))
        written = f"results {one.folder / 'results.json'}\npage    {one.folder / 'report.html'}"
        if how := one.results.get("sandbox"):  # what confined the programs, and what that leaves open
            written += f"\nsandbox {how}"
        Console(soft_wrap=True, markup=False).print(written)
    return 0


def table(done: Evaluation) -> Table:
    """The numbers of one suite, shares in percent, with 95 % intervals over problems."""
    r = done.results
    shown = Table(title=Text(f"{r['suite']}: {r['model']}"), caption_justify="left")
    shown.add_column("")
    shown.add_column("%", justify="right")
    shown.add_column("95 % interval", justify="right")

    def row(name: str, entry: dict[str, float]) -> None:
        interval = f"{100 * entry['low']:.1f} – {100 * entry['high']:.1f}"
        shown.add_row(Text(name), f"{100 * entry['value']:.1f}", interval)  # a group may look like rich's markup

    score = f"avg@{r['n']}" if r["n"] > 1 else "accuracy"
    row(f"{score} ({drawn_with(r)})", r["avg"])
    for k, entry in r["pass"].items():
        if r["n"] > 1 and k != "1":  # pass@1 is avg@n
            row(f"pass@{k}", entry)
    for k, entry in r["maj"].items():
        row(f"maj@{k}", entry)
    shown.add_section()
    for k, different in r.get("distinct", {}).items():  # of results of an earlier version there are none
        shown.add_row(f"different answers of {k}, number", f"{different:.2f}", "")
    health = r["health"]
    for name, key in (("cut off", "truncated"), ("no answer", "no_answer"), ("repetitive", "repetitive")):
        shown.add_row(name, f"{100 * health[key]:.1f}", "")
    if health.get("finished_avg") is not None:
        shown.add_row("right, of those not cut off", f"{100 * health['finished_avg']:.1f}", "")
    shown.add_section()
    for name, values in r["groups"].items():
        for value, entry in values.items():
            label = f"{name} {value} ({entry['problems']})"
            row(label, {"value": entry["avg"], "low": entry["low"], "high": entry["high"]})
    lengths, template = r["lengths"]["all"], r["template"]
    mean, median = lengths.get("mean"), lengths.get("median")
    length = f"{mean:,.0f} tokens on average, median {median:,.0f}" if mean is not None else ""
    sampling = ", ".join(f"{key} {value}" for key, value in r["sampling"].items())
    few_shot = f", {shots['examples']} examples ({shots['hash']})" if (shots := r.get("few_shot")) else ""
    shown.caption = Text(
        f"{r['problems']} problems × {r['n']}; {length}\n{sampling}\n"
        f"template {template['name']} v{template['version']} ({template['hash']}){few_shot}"
    )
    return shown


def _parser() -> argparse.ArgumentParser:
    top = OptionParser(
        prog="llmdistill eval",
        usage="llmdistill eval SUITE [SUITE ...] --model PATH_OR_NAME [--key value ...]\n"
        "       llmdistill eval --grade FOLDER [FOLDER ...]\n"
        "       llmdistill eval --compare FOLDER_A FOLDER_B",
        description="Scores a model. An evaluation that was interrupted goes on where it stopped.",
        epilog=f"bundled suites: {', '.join(bundled_suites())}",
    )
    top.add_argument("suites", nargs="*", metavar="SUITE", help="YAML file, or the name of a bundled suite")
    top.add_argument("--grade", nargs="+", metavar="FOLDER", help="grade stored samples again, without generating")
    top.add_argument(
        "--compare", nargs=2, metavar="FOLDER", help="two evaluations of one suite, or the folders of several"
    )
    top.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    settings = top.add_argument_group("settings (default: the suite's)")
    types = get_type_hints(EvalConfig)
    for field in dataclasses.fields(EvalConfig):
        known = field.default not in (None, "", False, dataclasses.MISSING)
        help = field.metadata["help"] + (f" [{field.default}]" if known else "")
        kind, options = types[field.name], {"default": field.default, "help": help}
        if kind is bool:
            settings.add_argument(f"--{field.name}", action="store_true", help=help)
        elif get_origin(kind) is dict:
            settings.add_argument(f"--{field.name}", type=_mapping, metavar="JSON", default={}, help=help)
        elif get_origin(kind) is Literal:
            settings.add_argument(f"--{field.name}", choices=get_args(kind), **options)
        else:  # a plain type, or one that may be None
            plain = next(t for t in (*get_args(kind), kind) if t is not type(None))
            settings.add_argument(f"--{field.name}", type=plain, metavar=plain.__name__.upper(), **options)
    return top


def _mapping(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("no mapping")  # argparse says which setting it is
    return value


def _no_more(words: Sequence[str], option: str) -> None:
    if words:
        raise UserError(f"{option} takes folders only, not {words[0]!r}.")
