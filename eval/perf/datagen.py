"""Curation and decontamination of many short traces: rows a second and peak memory at 10k, 100k and a million rows.

    python eval/perf/datagen.py --problems math500.jsonl gsm8k_test.jsonl --rows 10000 100000 1000000

Traces of 40 to 160 words are made up; one in ten is a former one with a word changed, one in fifty a former one as it
was, and one in a thousand holds a benchmark question. Each step runs in a process of its own, from file to file,
reading and writing of JSON included, so that its peak memory is its own. What was planted must be found: the shares are
printed (above 1 for copies: some changed ones are changed in the same way). Prints JSON; seconds are of the clock,
``cpu_seconds`` of the processor, which say the same on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CURATION = ["finished", "no_loops", "exact_duplicates", {"near_duplicates": {"threshold": 0.8}}]


def write_traces(file: Path, questions: list[str], count: int, seed: int) -> dict[str, int]:
    """Writes the traces; returns how many of each kind there are."""
    rng = random.Random(seed)
    words = [f"{a}{b}{c}" for a in "bcdfghklmnprst" for b in "aeiou" for c in ("", "n", "rk", "st", "l")]
    kinds = {"new": 0, "changed": 0, "copied": 0, "contaminated": 0}
    before: list[list[str]] = []
    with file.open("w", encoding="utf-8") as lines:
        for i in range(count):
            chance = rng.random()
            text = rng.choices(words, k=rng.randint(40, 160))
            kind = "new"
            if before and chance < 0.02:
                kind, text = "copied", rng.choice(before)
            elif before and chance < 0.12:
                kind, text = "changed", [*(old := rng.choice(before))]
                text[rng.randrange(len(old))] = "changed"
            elif chance < 0.121:
                kind, text = "contaminated", [*text, *rng.choice(questions).split()]
            else:
                before.append(text)
                if len(before) > 2000:
                    before[rng.randrange(2000)] = before.pop()
            kinds[kind] += 1
            # one prompt for all, so that copies are copies of one prompt's traces
            row = {"id": str(i), "prompt": "Say something.", "completion": " ".join(text), "finish": "stop"}
            lines.write(json.dumps(row) + "\n")
    return kinds


def step(name: str, source: Path, out: Path, suites: list[str]) -> None:
    """One step in this process; prints its figures."""
    from llmdistill.datagen.curation import curate
    from llmdistill.datagen.decontamination import decontaminate

    start = time.perf_counter()
    if name == "curate":
        manifest = curate(source, out, steps=CURATION)
    else:
        manifest = decontaminate(source, out, suites=suites, columns=["completion"])
    seconds, usage = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    figures = {
        "rows": manifest.counts["read"],
        "written": manifest.counts["written"],
        "lost": dict(manifest.lost),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "rows_per_second": round(manifest.counts["read"] / seconds),
        "peak_rss_mib": usage.ru_maxrss // 1024,
    }
    print(json.dumps(figures))


def measured(name: str, source: Path, out: Path, suites: list[str]) -> Any:
    words = [
        sys.executable,
        __file__,
        "--step",
        name,
        "--problems",
        *suites,
        "--source",
        str(source),
        "--out",
        str(out),
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--problems", nargs="+", required=True, metavar="FILE", help=".jsonl files of problems")
    add("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    add("--step", help=argparse.SUPPRESS)
    add("--source", help=argparse.SUPPRESS)
    add("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        step(options.step, Path(options.source), Path(options.out), options.problems)
        return
    from llmdistill.evals.contamination import read_problems

    questions = [p.question for file in options.problems for p in read_problems(file) if len(p.question.split()) > 20]
    result: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "runs": []}
    for count in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            source, curated, clean = (Path(folder) / f"{name}.jsonl" for name in ("traces", "curated", "clean"))
            kinds = write_traces(source, questions, count, seed=count)
            run = {"rows": count, "megabytes": round(source.stat().st_size / 1e6), "kinds": kinds}
            run["curate"] = measured("curate", source, curated, options.problems)
            run["decontaminate"] = measured("decontaminate", curated, clean, options.problems)
            lost = run["curate"]["lost"]
            run["copies_found"] = lost.get("completion stood before", 0) / kinds["copied"]
            run["changed_found"] = lost.get("completion nearly stood before", 0) / kinds["changed"]
            run["contaminated_found"] = sum(run["decontaminate"]["lost"].values()) / kinds["contaminated"]
            result["runs"].append(run)
            print(json.dumps(run), file=sys.stderr)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
