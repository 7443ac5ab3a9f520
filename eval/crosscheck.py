"""Our verdicts beside lm-eval's on the same stored generations; every difference is printed in full.

    python eval/crosscheck.py build traces/mip_traces.jsonl.gz cross/mip --samples 600   # completions of others
    LMEVAL/bin/python eval/crosscheck.py compare cross/mip --out cross/mip.json
    LMEVAL/bin/python eval/crosscheck.py compare runs/eval/MODEL/gsm8k                        # or an evaluation of ours

lm-eval is no dependency of llmdistill: give it an environment of its own, with this repository in it.

    python -m venv LMEVAL && LMEVAL/bin/pip install "lm-eval[math]==0.4.13" -e ".[eval]"

``compare`` needs no network and no model. It writes a task file for each of lm-eval's own tasks below, which *includes*
the shipped one (filters, metrics, process_results, stop sequences) and changes nothing but where the documents come
from and that no examples precede the question; and it hands ``lm_eval.simple_evaluate`` a model that replays the text.
As lm-eval's own models do, the replay drops the text up to ``--think-end-token`` and cuts at the task's stop sequences.

    strict-match      gsm8k: the first "#### NUMBER"
    flexible-extract  gsm8k: the last thing that looks like a number
    math-verify       minerva_math: math_verify.verify(parse(gold solution), parse(completion)), the library's defaults
    final-answer      minerva_math: "Final Answer: The final answer is ...", normalised, sympy difference is zero
    boxed             aime: the last \\boxed (else what stands between the first and last $), as normalised strings

Source: lm-eval 0.4.13, tasks/gsm8k/gsm8k.yaml, tasks/minerva_math/utils.py, tasks/aime/utils.py.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmdistill.evals.records import EvalFolder, Problem, Sample

TAIL = 300  # characters kept of a text whose verdicts differ
# name: the shipped task file, the task's filter, its metric
METHODS = {
    "strict-match": ("gsm8k", "strict-match", "exact_match"),
    "flexible-extract": ("gsm8k", "flexible-extract", "exact_match"),
    "math-verify": ("minerva_math", "none", "math_verify"),
    "final-answer": ("minerva_math", "none", "exact_match"),
    "boxed": ("aime", "none", "exact_match"),
}
SHIPPED = {
    "gsm8k": "gsm8k/gsm8k.yaml",
    "minerva_math": "minerva_math/minerva_math_algebra.yaml",
    "aime": "aime/aime.yaml",
}


def document(task: str, problem: Problem) -> dict[str, str]:
    """A problem with the columns that lm-eval's task reads, its gold in the form of that task's data."""
    gold = problem.gold or ""
    if task == "gsm8k":
        return {"question": problem.question, "answer": f"#### {gold}"}
    if task == "minerva_math":
        return {"problem": problem.question, "solution": f"The answer is $\\boxed{{{gold}}}$."}
    return {"Question": problem.question, "Answer": gold}


def text_of(row: dict[str, Any]) -> str:
    """A trace as the model wrote it: thinking, where it was recorded, and response."""
    return f"<think>{row['thinking']}</think>{row['response']}" if row.get("thinking") else row["response"]


def build(traces: Path, folder: EvalFolder, count: int, seed: int) -> None:
    """An evaluation folder of recorded completions, drawn at random and graded by us; a problem for each completion."""
    from llmdistill.evals.grades import GradesSoFar
    from llmdistill.evals.grading import grade

    data = traces.read_bytes()
    rows = [json.loads(line) for line in (gzip.decompress(data) if traces.suffix == ".gz" else data).splitlines()]
    rows = random.Random(seed).sample(rows, min(count, len(rows)))
    problems = [Problem(row["id"], row["problem"], "math", row["answer"]) for row in rows]
    folder.write_json(folder.config_file, {"suite": traces.name, "n": 1, "seed": seed, "template": {"prefill": ""}})
    folder.write_problems(problems)
    writer = folder.appender(0)
    had = folder.samples()
    for row in rows:
        if (row["id"], 0) not in had:
            text = text_of(row)
            writer.add(Sample(row["id"], 0, text, len(text.split()), "stop", seed))
    writer.close()
    samples, kept = folder.samples(), GradesSoFar(folder, {"prefill": ""})
    grade(problems, samples.of, kept)
    folder.write_grades(g for p in problems for g in kept.of(p, samples.of(p.id)) if g is not None)
    kept.close(True)
    print(f"{folder.path}: {len(rows)} completions of {traces.name}, {sum(g.passed for g in folder.grades())} right")


def lm_eval_verdicts(problems: Sequence[Problem], texts: Sequence[str], think_end: str) -> list[dict[str, Any]]:
    """What lm-eval makes of each text: {method: {"passed": bool, "extracted": str}}."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[name] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HF_DATASETS_CACHE"] = f"{scratch}/cache"  # documents of an earlier run must not be found again
        from lm_eval import simple_evaluate
        from lm_eval.api.model import LM
        from lm_eval.models.utils import postprocess_generated_text
        from lm_eval.tasks import TaskManager

        class Replay(LM):
            def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
                return [
                    postprocess_generated_text(texts[r.doc_id], r.args[1]["until"], think_end or None) for r in requests
                ]

            def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
                raise NotImplementedError("stored text has no likelihood")

            loglikelihood_rolling = loglikelihood

        for task in SHIPPED:
            write_task(Path(scratch), task, problems)
        found = simple_evaluate(
            Replay(),
            tasks=[f"replayed_{task}" for task in SHIPPED],
            num_fewshot=0,
            bootstrap_iters=0,
            task_manager=TaskManager(include_path=scratch),
        )
    verdicts: list[dict[str, Any]] = [{} for _ in texts]
    for method, (task, chosen, metric) in METHODS.items():
        for row in found["samples"][f"replayed_{task}"]:
            if row["filter"] == chosen:
                verdicts[row["doc_id"]][method] = {"passed": bool(row[metric]), "text": row["filtered_resps"][0]}
    if any(set(row) != set(METHODS) for row in verdicts):
        raise RuntimeError("lm-eval left some completions without a verdict")
    return verdicts


def write_task(folder: Path, task: str, problems: Sequence[Problem]) -> None:
    """A task file that includes lm-eval's and reads our documents. JSON is YAML."""
    import lm_eval

    rows = "".join(json.dumps(document(task, problem)) + "\n" for problem in problems)
    (folder / f"{task}.jsonl").write_text(rows)
    settings = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / SHIPPED[task]),
        "task": f"replayed_{task}",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{task}.jsonl")}},
        "training_split": None,
        "fewshot_split": None,
        "fewshot_config": None,
        "test_split": "test",
        "num_fewshot": 0,
    }
    (folder / f"{task}.yaml").write_text(json.dumps(settings))


def extracted(method: str, text: str) -> str:
    """What lm-eval judged. gsm8k's filters have left nothing else; the others are asked with their own functions."""
    if METHODS[method][0] == "gsm8k":
        return text
    if method == "math-verify":
        from math_verify import parse

        return str(parse(text))
    if method == "final-answer":
        from lm_eval.tasks.minerva_math.utils import get_unnormalized_answer, normalize_final_answer

        return str(normalize_final_answer(get_unnormalized_answer(text)))
    from lm_eval.tasks.aime.utils import last_boxed_only_string

    return str(last_boxed_only_string(text) or "no box")


def compare(folder: EvalFolder, think_end: str) -> dict[str, Any]:
    """Counts for each method, and all differing verdicts."""
    problems = {p.id: p for p in folder.problems()}
    grades = list(folder.grades())
    if not grades or any(problems[g.problem].kind != "math" for g in grades):
        raise SystemExit(f"{folder.path} has no graded maths answers; grade it first: llmdistill eval --grade FOLDER")
    prefill = (folder.read_config() or {})["template"]["prefill"]
    samples = folder.samples()
    written = {(s.problem, s.index): s.text for s in samples}
    texts = [prefill + written[g.problem, g.index] for g in grades]
    theirs = lm_eval_verdicts([problems[g.problem] for g in grades], texts, think_end)
    counts = {method: Counter[str]() for method in METHODS}
    differing: list[dict[str, Any]] = []
    for grade, text, row in zip(grades, texts, theirs, strict=True):
        for method, verdict in row.items():
            counts[method][f"ours {_word(grade.passed)}, theirs {_word(verdict['passed'])}"] += 1
            if grade.passed != verdict["passed"]:
                gold, judged = problems[grade.problem].gold, extracted(method, verdict["text"])
                row_of = {"method": method, "gold": gold, "lm_eval": judged, "lm_eval_passed": verdict["passed"]}
                differing.append({**row_of, "ours": asdict(grade), "tail": text[-TAIL:]})
    versions = {name: version(name) for name in ("lm_eval", "math-verify", "antlr4-python3-runtime", "sympy")}
    about = {"folder": folder.path.name, "samples": len(grades), "versions": versions, "commit": _commit()}
    return {**about, "agreement": {method: dict(count) for method, count in counts.items()}, "differing": differing}


def _word(passed: bool) -> str:
    return "right" if passed else "wrong"


def _commit() -> str:
    asked = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()


def show(found: dict[str, Any]) -> None:
    for row in found["differing"]:
        ours = row["ours"]
        print(f"\n{row['method']}: {ours['problem']} #{ours['index']}, gold {row['gold']!r}")
        print(f"  ours   {ours['kind']:<9} {ours['extracted']!r} by {ours['stage']}; {ours['detail']}")
        print(f"  theirs {_word(row['lm_eval_passed']):<9} {row['lm_eval']!r}\n  ... {row['tail']!r}")
    print(f"\n{found['folder']}: {found['samples']} samples, {found['versions']}, commit {found['commit']}")
    columns = ["method", "both right", "both wrong", "only ours right", "only lm-eval right", "agreement %"]
    print("|", " | ".join(columns), "|\n" + "|---" * len(columns) + "|")
    for method, count in found["agreement"].items():
        ours_theirs = [(True, True), (False, False), (True, False), (False, True)]
        cells = [count.get(f"ours {_word(a)}, theirs {_word(b)}", 0) for a, b in ours_theirs]
        print("|", " | ".join(map(str, [method, *cells, f"{100 * sum(cells[:2]) / found['samples']:.1f}"])), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("build", help="an evaluation folder of recorded completions, graded")
    make.add_argument("traces", type=Path, help="JSON lines with id, problem, answer, response and maybe thinking")
    make.add_argument("folder", type=EvalFolder)
    make.add_argument("--samples", type=int, default=600)
    make.add_argument("--seed", type=int, default=0)
    check = commands.add_parser("compare", help="our grades beside lm-eval's")
    check.add_argument("folder", type=EvalFolder)
    check.add_argument("--out", type=Path, help="where the JSON goes")
    check.add_argument("--think-end-token", default="</think>", help="'' keeps the thinking, lm-eval's default")
    given = parser.parse_args()
    if given.command == "build":
        build(given.traces, given.folder, given.samples, given.seed)
        return
    found = compare(given.folder, given.think_end_token)
    show(found)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
