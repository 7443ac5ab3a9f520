"""The whole optimizer step: ours, TRL's DistillationTrainer's, and the floor under both, in alternation.

    OMP_NUM_THREADS=2 python eval/perf/step.py --shapes 8x40 16x192 --rounds 2 --steps 3

A shape is sequences by new tokens. All sample the same number of tokens from the same student for the same prompts and
minimise the full-vocabulary reverse KL in float32 weights, under bfloat16 autocast or with ``--float32`` without:

- ``floor``: what no trainer can do without, by hand: generate, the teacher's forward pass, the student's forward
  and backward pass, AdamW. No masks to get right (every completion has full length), no logs, no checkpoints.
- ``ours``: OPDTrainer with transformers' generate, the engine the other two use. ``ours_vllm``: with vLLM.
- ``trl``: TRL's stable trainer at its defaults. (Without vLLM: on a CPU its colocated engine fails at the first sync.)

Each runs in a process of its own, whose peak of resident memory is noted, loading included. A step is timed from the
end of one to the end of the next; the first of a run is left out. The learning rate is 0, so that every step does the
same work. A line of results.csv has the steps of all rounds; ratios are of the medians of a round.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval.perf.record import ROOT, add_results_option, note

Times = dict[str, list[float]]  # "step", and parts of it


class StepClock(TrainerCallback):
    """Seconds between the ends of steps."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]


def shared(options: argparse.Namespace) -> dict[str, Any]:
    """Trainer settings that mean the same to both trainers."""
    return dict(
        output_dir=tempfile.mkdtemp(),
        max_steps=options.steps + 1,
        per_device_train_batch_size=options.batch,
        learning_rate=0.0,
        bf16=not options.float32,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def teacher_dtype(options: argparse.Namespace) -> torch.dtype:
    return torch.float32 if options.float32 else torch.bfloat16


def ours(options: argparse.Namespace, rows: list[dict[str, Any]], engine: str) -> Times:
    from llmdistill import DataConfig, OPDConfig, OPDTrainer, RolloutConfig

    clock = StepClock()
    rollouts = RolloutConfig(
        engine=engine,  # type: ignore[arg-type]
        max_new_tokens=options.new_tokens,
        ignore_eos=True,
        dtype="float32" if options.float32 else "bfloat16",
    )
    trainer = OPDTrainer(
        AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32),
        OPDConfig(**shared(options), logging_steps=1, rollouts=rollouts),
        AutoModelForCausalLM.from_pretrained(options.teacher, dtype=teacher_dtype(options)),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(options.student),
        callbacks=[clock],
        data=DataConfig(max_prompt_tokens=256),
    )
    trainer.train()
    trainer.rollout_engine.close()
    lines = [line for line in trainer.state.log_history if "loss" in line][1:]
    parts = sorted({name for line in lines for name in line if name.startswith("time/")})
    return {"step": clock.seconds()} | {
        name.removeprefix("time/"): [line[name] for line in lines if name in line] for name in parts
    }


def trl(options: argparse.Namespace, rows: list[dict[str, Any]]) -> Times:
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    clock = StepClock()
    args = DistillationConfig(
        **shared(options),
        logging_steps=1000,
        max_completion_length=options.new_tokens,
        beta=1.0,
        generation_kwargs={"min_new_tokens": options.new_tokens},
    )
    trainer = DistillationTrainer(
        AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32),
        AutoModelForCausalLM.from_pretrained(options.teacher, dtype=teacher_dtype(options)),
        args,
        Dataset.from_list([{"prompt": r["prompt"]} for r in rows]),
        processing_class=AutoTokenizer.from_pretrained(options.student),
        callbacks=[clock],
    )
    trainer.train()
    return {"step": clock.seconds()}


def floor(options: argparse.Namespace, rows: list[dict[str, Any]]) -> Times:
    student = AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=teacher_dtype(options)).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.student, padding_side="left")
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.0, fused=True)
    times: Times = {name: [] for name in ("step", "rollout", "teacher", "student", "optimizer")}
    for step in range(options.steps + 1):
        batch = rows[step * options.batch : (step + 1) * options.batch]
        marks = [time.perf_counter()]
        prompts = tokenizer.apply_chat_template(
            [r["prompt"] for r in batch],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        width, new = prompts["input_ids"].shape[1], options.new_tokens
        student.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=not options.float32):
            ids = student.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=new, min_new_tokens=new)
        marks.append(time.perf_counter())
        student.train()
        mask = torch.cat([prompts["attention_mask"], torch.ones(len(batch), new, dtype=torch.long)], 1)
        with torch.no_grad():
            log_t = teacher(ids, attention_mask=mask, logits_to_keep=new + 1).logits[:, :-1].float().log_softmax(-1)
        marks.append(time.perf_counter())
        with torch.autocast("cpu", torch.bfloat16, enabled=not options.float32):
            logits = student(ids, attention_mask=mask, logits_to_keep=new + 1).logits[:, :-1]
        log_s = logits.float().log_softmax(-1)
        (log_s.exp() * (log_s - log_t)).sum(-1).mean().backward()
        marks.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad()
        marks.append(time.perf_counter())
        assert ids.shape[1] == width + new
        if step:
            parts = [b - a for a, b in zip(marks, marks[1:], strict=False)]
            for name, seconds in zip(times, [sum(parts), *parts], strict=True):
                times[name].append(seconds)
    return times


CONTENDERS: dict[str, Callable[[argparse.Namespace, list[dict[str, Any]]], Times]] = {
    "floor": floor,
    "ours": lambda options, rows: ours(options, rows, "hf"),
    "trl": trl,
    "ours_vllm": lambda options, rows: ours(options, rows, "vllm"),
}


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One contender's run in this process: {"times", "peak_gib"}."""
    torch.set_num_threads(options.threads)
    with open(options.prompts) as file:
        rows = [json.loads(line) for line in file]
    needed = options.batch * (options.steps + 1)
    rows = (rows * -(-needed // len(rows)))[:needed]
    times = CONTENDERS[name](options, rows)
    return {"times": times, "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def in_a_process(name: str, words: list[str]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--only", name, *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"step: {name} ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(shape: str, options: argparse.Namespace) -> None:
    batch, new = shape.split("x")
    words = ["--batch", batch, "--new-tokens", new, "--steps", str(options.steps), "--threads", str(options.threads)]
    for name in ("student", "teacher", "prompts"):
        words += [f"--{name}", getattr(options, name)]
    words += ["--float32"] if options.float32 else []
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS if name not in options.without}
    for _ in range(options.rounds):
        for name in runs:
            runs[name].append(in_a_process(name, words))
    how = f"{batch} x {new} new tokens, {'float32' if options.float32 else 'bfloat16'}, {options.threads} threads"
    for name, found in runs.items():
        for part in found[0]["times"]:
            seconds = [s for r in found for s in r["times"].get(part, [])]
            note("step", f"{name}, {how}: {part}", "s", seconds, options.results)
        note("step", f"{name}, {how}: peak resident memory", "GiB", [r["peak_gib"] for r in found], options.results)
    for over, under in (("ours", "floor"), ("trl", "floor"), ("trl", "ours"), ("trl", "ours_vllm")):
        if over in runs and under in runs:
            pairs = list(zip(runs[over], runs[under], strict=True))
            ratios = [statistics.median(a["times"]["step"]) / statistics.median(b["times"]["step"]) for a, b in pairs]
            note("step", f"{over} over {under}, {how}: step", "ratio", ratios, options.results)
    for name in ("ours", "ours_vllm"):
        if name in runs and "trl" in runs:
            ratios = [a["peak_gib"] / b["peak_gib"] for a, b in zip(runs[name], runs["trl"], strict=True)]
            note("step", f"{name} over trl, {how}: peak resident memory", "ratio", ratios, options.results)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default=str(ROOT / "data/quickstart/student"))
    parser.add_argument("--teacher", default=str(ROOT / "data/quickstart/teacher"))
    parser.add_argument("--prompts", default=str(ROOT / "data/quickstart/train.jsonl"))
    parser.add_argument("--shapes", nargs="+", default=["8x40"], metavar="SEQUENCESxTOKENS")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--float32", action="store_true", help="no bfloat16: for a CPU without the instructions")
    parser.add_argument("--without", nargs="*", default=[], choices=list(CONTENDERS))
    parser.add_argument("--only", choices=list(CONTENDERS), help="one run in this process, its JSON on the last line")
    parser.add_argument("--batch", type=int, default=8, help="of --only")
    parser.add_argument("--new-tokens", type=int, default=40, help="of --only")
    add_results_option(parser)
    options = parser.parse_args(words)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if options.only:
        print(json.dumps(run(options.only, options)))
        return
    for shape in options.shapes:
        compare(shape, options)


if __name__ == "__main__":
    main()
