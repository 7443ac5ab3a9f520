"""The 170 programs of shared/cases/eval: verdicts of a careful teacher, after kinds of failure that people reported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmdistill.verify.code import find_program, run_functional, run_stdin, run_tests

CASES = Path(__file__).parents[3] / "shared/cases/eval/programs.jsonl"


def printed_by_python(program: str, given: str) -> str:
    """What plain Python prints, with numbers of any length."""
    command = [sys.executable, "-X", "int_max_str_digits=0", "-c", program]
    return subprocess.run(command, input=given, capture_output=True, text=True, check=True).stdout


def extracted(completion: str, entry_point: str | None, prompt: str | None, probe: str | None, **options) -> bool:
    """Whether a program is found, and is right: ``STDIN:x`` wants x printed, other probes are tests."""
    program = find_program(completion, entry_point=entry_point, prompt=prompt)
    if probe is None or program is None:
        return program is not None
    if probe.startswith("STDIN:"):
        return run_stdin(program, [("\n", probe.removeprefix("STDIN:"))], **options).passed
    return run_tests(program, probe, **options).passed


def passed(row: dict) -> bool:
    call, args, options = row["call"], row["args"], row["options"]
    if call == "extract":
        return extracted(*args, **options)
    if call == "run_tests":
        return run_tests(*args, **options).passed
    if call == "run_functional":
        return run_functional(args[0], args[1], [tuple(case) for case in args[2]], **options).passed
    program, cases = args
    filled = [(given, printed_by_python(program, given) if wanted is None else wanted) for given, wanted in cases]
    return run_stdin(program, filled, **options).passed


def test_every_shared_program_is_judged_right():
    if not CASES.is_file():
        pytest.skip(f"no {CASES}")
    rows = [json.loads(line) for line in CASES.read_text().splitlines()]
    wrong = {row["id"]: row["what"] for row in rows if passed(row) is not row["expected"]}
    assert len(rows) == 170 and not wrong
