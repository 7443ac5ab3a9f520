"""``llmdistill verify FILE``: verdicts on completions in a file, with their reasons.

    llmdistill verify answers.jsonl                    # rows of completion and answer
    llmdistill verify answers.jsonl --gold solution --kind choice --json

A row is a JSON object. Its completion stands in ``completion``, ``prediction`` or ``response``, the right answer in
``answer``, ``gold`` or ``solution``; ``kind`` or ``task`` ("math", "choice") of a row overrides --kind, and a row with
``tests`` is a program. Nothing is generated, and nothing is written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from llmdistill.errors import UserError
from llmdistill.options import OptionParser
from llmdistill.verify.code import find_program, judge_program
from llmdistill.verify.math import AnswerJudge, Kind
from llmdistill.verify.rewards import text_of

COMPLETIONS = ("completion", "prediction", "response")
GOLDS = ("answer", "gold", "solution")
KINDS = ("math", "choice")


def parser() -> argparse.ArgumentParser:
    made = OptionParser(
        prog="llmdistill verify",
        description="Verdicts on completions in a JSONL file, with their reasons.",
        allow_abbrev=False,
    )
    made.add_argument(
        "file",
        metavar="FILE",
        help="rows of completion and right answer, or of completion and tests; -: standard input",
    )
    made.add_argument("--completion", metavar="COLUMN", help=f"the completion's column [{', '.join(COMPLETIONS)}]")
    made.add_argument("--gold", metavar="COLUMN", help=f"the right answer's column [{', '.join(GOLDS)}]")
    made.add_argument("--kind", choices=KINDS, default="math", help="of rows that do not say it [math]")
    made.add_argument("--json", action="store_true", help="one JSON object for each row instead of a line of text")
    made.add_argument("--wrong", action="store_true", help="show only what is not right")
    made.add_argument(
        "--allow_unsafe_exec", action="store_true", help="run programs where the kernel cannot confine them"
    )
    return made


def run(words: Sequence[str], out: TextIO | None = None) -> int:
    """Prints a verdict for each row and their number at the end. 0 whatever the verdicts are.

    Raises:
        UserError: no such file, a line that is no JSON object, a column that is missing.
    """
    options = parser().parse_args(words)
    out = out or sys.stdout
    counts: Counter[str] = Counter()
    with AnswerJudge() as judge:
        for line, row in rows(options.file):
            found = {"line": line, **verdict(judge, row, line, options)}
            counts[found["verdict"]] += 1
            if options.wrong and found["verdict"] == "right":
                continue
            print(json.dumps(found, ensure_ascii=False) if options.json else _shown(found), file=out)
    total = counts.total()
    if not options.json:
        others = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()) if kind != "right")
        print(f"{counts['right']} of {total} right" + (f"; {others}" if others else ""), file=out)
    return 0


def rows(file: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line number, row) of a JSONL file."""
    if file != "-" and not Path(file).is_file():
        raise UserError(f"there is no file {file}; it must be a JSONL file of completions and right answers")
    with sys.stdin if file == "-" else open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"line {number} of {file} is no JSON: {error.msg}. Fix: one object on each line."
                ) from error
            if not isinstance(row, dict):
                raise UserError(f"line {number} of {file} is a {type(row).__name__}; it must be a JSON object")
            yield number, row


def verdict(judge: AnswerJudge, row: Mapping[str, Any], line: int, options: argparse.Namespace) -> dict[str, Any]:
    """The verdict on one row: what was judged, against what, by which rules."""
    text = text_of(_value(row, options.completion, COMPLETIONS, line, "completion"))
    if row.get("tests"):
        tests = dict(row["tests"])
        unsafe = options.allow_unsafe_exec
        where = {"entry_point": tests.get("entry_point"), "prompt": tests.get("setup")}
        program = find_program(text, **where, allow_unsafe_exec=unsafe)
        ran = judge_program(program, tests, allow_unsafe_exec=unsafe)
        passed = "right" if ran.passed else ran.kind
        return {"verdict": passed, "extracted": program, "gold": None, "found_by": "program", "reason": ran.detail}
    gold = str(_value(row, options.gold, GOLDS, line, "gold"))
    said = next((row[name] for name in ("kind", "task") if row.get(name) in KINDS), options.kind)
    kind: Kind = "choice" if said == "choice" else "math"
    found = judge.judge(text, gold, kind)
    return {
        "verdict": found.kind,
        "extracted": found.extracted,
        "gold": gold,
        "found_by": found.stage,
        "reason": found.detail,
    }


def _value(row: Mapping[str, Any], asked: str | None, known: Sequence[str], line: int, option: str) -> Any:
    names = [asked] if asked else list(known)
    found = next((row[name] for name in names if row.get(name) is not None), None)
    if found is None:
        raise UserError(
            f"line {line} has no {' or '.join(names)}; it has {', '.join(sorted(row))}. Fix: --{option} COLUMN."
        )
    return found


def _shown(found: Mapping[str, Any]) -> str:
    if found["gold"] is None:
        return f"{found['line']:>5}  {found['verdict']:<10} {found['reason']}"
    answer = "nothing" if found["extracted"] is None else " ".join(str(found["extracted"]).split())
    answer = answer if len(answer) <= 60 else answer[:57] + "..."
    gold = " ".join(str(found["gold"]).split())
    gold = gold if len(gold) <= 60 else gold[:57] + "..."
    return (
        f"{found['line']:>5}  {found['verdict']:<10} {answer}  for  {gold}   ({found['found_by']}; {found['reason']})"
    )
