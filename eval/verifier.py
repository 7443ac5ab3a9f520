"""How well the maths verdicts agree with other people's: the figures of eval/VERIFIER.md.

    LLMDISTILL_DATA=data python eval/verifier.py cases          # labelled pairs, ours and the bare library's
    LLMDISTILL_DATA=data python eval/verifier.py golds          # benchmark golds against themselves and shuffled
    LLMDISTILL_DATA=data python eval/verifier.py traces         # completions that others have judged
    LLMDISTILL_DATA=data python eval/verifier.py speed          # verdicts a second on one core

The data folder holds verifier_cases.jsonl, benchmarks/ and traces/.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmdistill.verify.equal import quickly
from llmdistill.verify.extract import extract
from llmdistill.verify.math import AnswerJudge, AnswerVerdict
from llmdistill.verify.workers import Pool

BENCHMARKS = ("math500", "aime24", "aime25", "amc23", "gsm8k_test", "minerva_math", "olympiadbench")
TRACES = ("gsm8k_gpt3_solutions.jsonl.gz", "mip_traces.jsonl.gz", "qwen25math_maj8_sample.jsonl")


def rows(file: Path) -> Iterator[dict[str, Any]]:
    data = file.read_bytes()
    yield from map(json.loads, (gzip.decompress(data) if file.suffix == ".gz" else data).splitlines())


def bare_request(request: dict[str, Any]) -> dict[str, Any]:
    """math-verify by itself: the gold as it is, or wrapped in \\boxed (EVALUATION section 10, second and third row)."""
    import math_verify as lib

    gold, prediction = request["gold"], request["prediction"]
    if request["wrapped"]:
        rules = [lib.LatexExtractionConfig(boxed_match_priority=0), lib.ExprExtractionConfig()]
        bare = gold[1:-1] if gold.startswith("$") and gold.endswith("$") and gold.count("$") == 2 else gold
        parsed = [lib.parse(text, rules, parsing_timeout=None) for text in (f"$\\boxed{{{bare}}}$", prediction)]
    else:
        parsed = [lib.parse(text, parsing_timeout=None) for text in (gold, prediction)]
    return {"equal": lib.verify(*parsed, float_rounding=6, timeout_seconds=None)}


def show(text: str | None, limit: int = 90) -> str:
    text = repr(text)
    return text if len(text) <= limit else text[: limit // 2] + " ... " + text[-limit // 2 :]


def cases(data: Path, judge: AnswerJudge) -> None:
    bare = Pool("verifier:bare_request", workers=1, time_limit_s=5)
    right: dict[str, Counter[str]] = defaultdict(Counter)
    halves: Counter[tuple[int, bool]] = Counter()
    wrong = []
    for number, row in enumerate(rows(data / "verifier_cases.jsonl")):
        expected = row["expected_equal"]
        verdict = judge.judge(row["prediction"], row["gold"])
        request = {"gold": row["gold"], "prediction": row["prediction"]}
        if row["kind"] == "unit_test_other_convention":  # bare answers, where the library looks for completions
            request["prediction"] = f"$\\boxed{{{row['prediction']}}}$"
        found = {
            "ours": verdict.passed,
            "library, gold bare": bool(bare.call({**request, "wrapped": False}).get("equal")),
            "library, gold wrapped": bool(bare.call({**request, "wrapped": True}).get("equal")),
        }
        for kind in (row["kind"], "all"):
            right["rows"][kind] += 1
            for name, equal in found.items():
                right[name][kind] += equal == expected
        halves[number % 2, verdict.passed == expected] += 1
        if verdict.passed != expected:
            wrong.append((row, verdict))
    bare.close()
    kinds = list(right["rows"])
    print("| |", " | ".join(f"{kind} ({right['rows'][kind]})" for kind in kinds), "|")
    for name in ("ours", "library, gold bare", "library, gold wrapped"):
        print(f"| {name} |", " | ".join(f"{100 * right[name][k] / right['rows'][k]:.1f}" for k in kinds), "|")
    for half, name in enumerate(("even rows", "odd rows")):
        n = halves[half, True] + halves[half, False]
        print(f"{name}: {halves[half, True]}/{n} = {100 * halves[half, True] / n:.2f}")
    for row, verdict in wrong:
        print(f"\n{row['id']} {row['kind']}, expected {row['expected_equal']}: {verdict.kind} by {verdict.detail}")
        print(f"  gold {show(row['gold'])}\n  {verdict.stage} {show(verdict.extracted)} of {show(row['prediction'])}")


def golds(data: Path, judge: AnswerJudge) -> None:
    for name in BENCHMARKS:
        problems = list(rows(data / "benchmarks" / f"{name}.jsonl"))
        shuffled = random.Random(0).sample(problems, len(problems))
        itself, solution, other = Counter[bool](), Counter[bool](), Counter[bool]()
        notes = []
        for problem, stranger in zip(problems, shuffled, strict=True):
            gold, text = problem["answer"], problem.get("solution") or ""
            verdict = judge.judge(f"So it is $\\boxed{{{gold}}}$.", gold)
            itself[verdict.passed] += 1
            if not verdict.passed:
                notes.append(("itself", problem["id"], gold, verdict))
            if "\\boxed" in text or "####" in text or "final answer" in text.lower():
                verdict = judge.judge(text, gold)
                solution[verdict.passed] += 1
                if not verdict.passed:
                    notes.append(("solution", problem["id"], gold, verdict))
            if stranger["answer"] != gold:
                verdict = judge.judge(f"\\boxed{{{stranger['answer']}}}", gold)
                other[verdict.passed] += 1
                if verdict.passed:
                    notes.append(("another gold", problem["id"], gold, verdict))
        print(
            f"{name}: itself {itself[True]}/{itself.total()}, its solution {solution[True]}/{solution.total()}, "
            f"another problem's gold {other[True]}/{other.total()}"
        )
        for what, key, gold, verdict in notes:
            print(f"   {what} {key} gold {show(gold)} found {show(verdict.extracted)} {verdict.kind} {verdict.detail}")


def traces(data: Path, judge: AnswerJudge) -> None:
    for name in TRACES:
        agreed, wrong = Counter[bool](), []
        stages: dict[str, Counter[bool]] = defaultdict(Counter)
        for row in rows(data / "traces" / name):
            if row.get("correct") is None:
                continue
            verdict = judge.judge(row["response"], row["answer"])
            agrees = verdict.passed == bool(row["correct"])
            agreed[agrees] += 1
            stages[verdict.stage][agrees] += 1
            if not agrees:
                wrong.append((row, verdict))
        print(f"{name}: {agreed[True]}/{agreed.total()} = {100 * agreed[True] / agreed.total():.2f}")
        print("  ", ", ".join(f"{stage} {count[True]}/{count.total()}" for stage, count in stages.items()))
        for row, verdict in wrong:
            print(f"   {row['id']} label {row['correct']} gold {row['answer']} {verdict.stage}", end=" ")
            print(show(verdict.extracted), show(row["response"][-120:], 130))


def speed(data: Path, judge: AnswerJudge) -> None:
    pairs = [(row["prediction"], row["gold"]) for row in rows(data / "verifier_cases.jsonl")]
    judge.judge("\\boxed{x+y}", "y+x")  # the worker's start is not a verdict
    for name, chosen in (("all cases", pairs), ("cases that reach the worker", None)):
        if chosen is None:
            chosen = [p for p in pairs if quickly(p[1], extract(p[0]).answer or "") is None]
        times, verdicts = [], Counter[str]()
        for prediction, gold in chosen:
            start = time.perf_counter()
            verdict: AnswerVerdict = judge.judge(prediction, gold)
            times.append(time.perf_counter() - start)
            verdicts[verdict.kind] += 1
        times.sort()
        print(
            f"{name}: {len(times) / sum(times):.0f} verdicts/s, median {1e3 * times[len(times) // 2]:.2f} ms, "
            f"p99 {1e3 * times[int(0.99 * len(times))]:.0f} ms, max {times[-1]:.2f} s; {dict(verdicts)}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cases", "golds", "traces", "speed"])
    parser.add_argument("--data", type=Path, default=os.environ.get("LLMDISTILL_DATA", "data"))
    arguments = parser.parse_args()
    with AnswerJudge() as judge:
        globals()[arguments.what](arguments.data, judge)


if __name__ == "__main__":
    main()
