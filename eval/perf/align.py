"""Alignment of two tokenizations: tokens in a second by pair and length, and what a longer text costs in memory.

    OMP_NUM_THREADS=1 python eval/perf/align.py [--student-tokens-per-second N]
    OMP_NUM_THREADS=1 python eval/perf/align.py --steps 4

Prints JSON. ``align``: spelling both sides out and cutting chunks, of ids that are there; ``whole``: all that a round
does for a text, with the teacher's ids from its bytes and every row's chunk. In student tokens a second of CPU time on
one core, the median of ``--runs``, on a machine that other work may share. ``share``: that of the whole in a step in
which the student passes so many tokens a second (forward, backward, head), by default 2,000; SmolLM2-135M passes 70 on
a CPU core. ``bytes_per_token``: the most that NumPy and Python hold at a time while chunks are cut, over the tokens of
the text.

``--steps`` trains instead: ALM from SmolLM2-135M-Instruct into a model of its size with Mistral's tokenizer, the quick
start's pairs in batches of 8, and the share of alignment in a step as the run logs it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llmdistill.texts import Prompt, collate
from llmdistill.texts.chat import ChatTemplate
from llmdistill.texts.retokenized import Retokenizer
from llmdistill.tokenization.align import align, spell
from llmdistill.tokenization.token_bytes import table_of
from tests.tokenization.vocabularies import encode, tokenizer

PAIRS = (("smollm2", "qwen"), ("smollm2", "deepseek"), ("deepseek", "mistral-fast"), ("smollm2", "bytes"))
LENGTHS = (1_000, 8_000, 32_000, 128_000)
LINE = (
    "Natalia sold 48 clips in April, and half as many in May: 48 / 2 = 24, so 48 + 24 = 72 in all.\n"
    "def total(prices):\n    return sum(p * 1.19 for p in prices)  # 含税\n\n"
)


def seconds(run: Callable[[], Any], runs: int) -> float:
    run()
    taken = []
    for _ in range(runs):
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def row(pair: tuple[str, str], tokens: int, runs: int, step: float) -> dict[str, Any]:
    toks = [tokenizer(name) for name in pair]
    tables = [table_of(tok) for tok in toks]
    text = LINE * (tokens // len(encode(toks[0], LINE)))
    ids = [encode(tok, text) for tok in toks]

    def cut() -> int:
        found = align(*(spell(i, table) for i, table in zip(ids, tables, strict=True)))
        assert found.exact
        return len(found.student_ends)

    convert = Retokenizer(toks[0], [], toks[1], ChatTemplate(toks[1]), pad_id=0)
    document = Prompt(ids[0][:1], "", completion=tuple(ids[0][1:]))
    rollout = collate([document.ids], [list(document.completion)], pad_id=0)

    def whole() -> None:
        assert convert(rollout, [document], "teacher").shares.aligned_sequences == 1

    aligning, everything = seconds(cut, runs), seconds(whole, max(1, runs // 3))
    tracemalloc.start()
    chunks = cut()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    count = len(ids[0])
    return {
        "pair": "-".join(pair),
        "tokens": count,
        "chunks_per_token": round(chunks / count, 3),
        "align_tokens_per_s": round(count / aligning),
        "whole_tokens_per_s": round(count / everything),
        "whole_s": round(everything, 3),
        "share": round(everything / (count / step), 5),
        "bytes_per_token": round(peak / count, 1),
    }


def trained(steps: int) -> dict[str, Any]:
    """Seconds of alignment and of all else in every step of a run."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from llmdistill.cross_tokenizer import CrossTokenizerConfig, CrossTokenizerTrainer
    from llmdistill.teachers.local import LocalTeacher

    quickstart = Path(__file__).resolve().parents[2] / "data" / "quickstart"
    tok = tokenizer("mistral-fast")
    tok.chat_template = "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + eos_token }}{% endfor %}"
    config = AutoConfig.from_pretrained(quickstart / "teacher")
    config.vocab_size, config.eos_token_id, config.bos_token_id = len(tok), tok.eos_token_id, tok.bos_token_id
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(quickstart / "teacher", dtype=torch.float32)
    lines = (quickstart / "pairs.jsonl").read_text().splitlines()[: 8 * steps]
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in map(json.loads, lines)]
    with tempfile.TemporaryDirectory() as folder:
        args = CrossTokenizerConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            logging_steps=1,
            save_strategy="no",
            optim="sgd",
        )
        read = LocalTeacher(teacher, tokenizer("smollm2"))
        trainer = CrossTokenizerTrainer(student, args, read, train_dataset=rows, processing_class=tok, preflight=False)
        trainer.train()
        logged = [line for line in trainer.state.log_history if "loss" in line]
    parts = ("time/teacher", "time/student", "time/optimizer")
    shares = [line["teacher/align_seconds"] / sum(line[part] for part in parts) for line in logged]
    told = (*parts, "teacher/align_seconds", "rollout/mean_length")
    measured = [{name: round(line[name], 4) for name in told} for line in logged]
    return {"rows": len(rows), "steps": measured, "share": round(statistics.median(shares), 5)}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, as docs/cross_tokenizer.md has them."""
    lines = [
        "| student, teacher | tokens | chunks a token | cut, tokens/s | whole, tokens/s | whole, s | bytes a token |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        rates = f"{r['align_tokens_per_s'] / 1e6:.1f} M | {r['whole_tokens_per_s'] / 1e3:.0f} k | {r['whole_s']:.2f}"
        pair = r["pair"].replace("mistral-fast", "mistral").replace("-", ", ")
        lines.append(
            f"| {pair} | {r['tokens']:,} | {r['chunks_per_token']:.2f} | {rates} | {r['bytes_per_token']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--student-tokens-per-second", type=float, default=2000.0)
    parser.add_argument("--steps", type=int, default=0)
    args = parser.parse_args()
    machine = platform.processor() or platform.machine()
    if args.steps:
        print(json.dumps({"machine": machine, **trained(args.steps)}, indent=1))
        return
    rows = [row(pair, n, args.runs, args.student_tokens_per_second) for pair in PAIRS for n in LENGTHS]
    print(json.dumps({"machine": machine, "rows": rows}, indent=1))
    print(table(rows), file=sys.stderr)


if __name__ == "__main__":
    main()
