"""The contamination check on a million training documents: rate, peak memory, and that what was planted is found.

    python eval/perf/contamination.py --problems data/*.jsonl --documents 1000000 --workers 1

Documents of 150 to 300 words are made up from the words of the problems themselves, as often as those use them: no word
can be skipped as unknown, the worst case for the index. In one of a thousand a whole question is planted, one of a
hundred holds LaTeX and non-ASCII text. They are written to a JSON Lines file first (1.4 GB for a million); what is
timed is reading that file, parsing and searching. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import tempfile
import time
from pathlib import Path

from llmdistill.evals.contamination import check, read_problems
from llmdistill.evals.ngrams import words
from llmdistill.evals.records import Problem
from llmdistill.evals.training_rows import TrainingFiles


def write_documents(file: Path, problems: list[Problem], count: int, seed: int) -> set[str]:
    """Writes the documents; returns the ids of the problems planted in them."""
    rng = random.Random(seed)
    vocabulary = [w.decode() for p in problems for w in words(p.question)]
    long_enough = [p for p in problems if len(words(p.question)) >= 13]
    planted = set()
    with file.open("w", encoding="utf-8") as lines:
        for i in range(count):
            text = " ".join(rng.choices(vocabulary, k=rng.randint(150, 300)))
            if i % 1000 == 500:
                problem = rng.choice(long_enough)
                planted.add(problem.id)
                text += "\n" + problem.question.upper()
            elif i % 100 == 0:
                text = text.replace(" the ", r" \left( the \right) ").replace(" a ", " “é” ")
            lines.write(json.dumps({"id": str(i), "text": text}, ensure_ascii=False) + "\n")
    return planted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", required=True, metavar="FILE", help=".jsonl[.gz] files of problems")
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    problems = {Path(f).name: read_problems(f) for f in options.problems}
    everything = [p for ps in problems.values() for p in ps]
    result = {
        "documents": options.documents,
        "problems": len(everything),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "runs": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "train.jsonl"
        planted = write_documents(file, everything, options.documents, options.seed)
        result["megabytes"] = round(file.stat().st_size / 1e6)
        for workers in options.workers:
            start = time.perf_counter()
            report = check(TrainingFiles([file]), problems, workers=workers)
            seconds = time.perf_counter() - start
            own, children = (resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
            run = {
                "workers": workers,
                "seconds": round(seconds, 1),
                "documents_per_second": round(options.documents / seconds),
                "peak_rss_mib_reader": own // 1024,
                "peak_rss_mib_worker": children // 1024,
                "planted": len(planted),
                "planted_found_whole": len(planted & {h.problem for h in report.hits if h.exact_rows}),
            }
            result["runs"].append(run)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
