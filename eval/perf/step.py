"""The whole optimizer step: ours, TRL's DistillationTrainer's, and the floor under both, in alternation.

    python eval/perf/step.py --rounds 3 --steps 4 --threads 2

All three sample the same number of tokens from the same student for the same prompts and minimise the full-vocabulary
reverse KL in float32 weights under bfloat16 autocast:

- ``floor``: what no trainer can do without, by hand: generate, the teacher's forward pass, the student's forward
  and backward pass, AdamW. No masks to get right (every completion has full length), no logs, no checkpoints.
- ``ours``: OPDTrainer with transformers' generate, the engine the other two use. ``ours_vllm``: with vLLM.
- ``trl``: TRL's stable trainer at its defaults.

A step is timed from the end of one to the end of the next; the first of a run is left out. The learning rate is 0, so
that every step does the same work. Prints JSON: medians in seconds and the ratios of each round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

ROOT = Path(__file__).resolve().parents[2]


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
        logging_steps=1000,
        report_to="none",
        disable_tqdm=True,
    )


def teacher_dtype(options: argparse.Namespace) -> torch.dtype:
    return torch.float32 if options.float32 else torch.bfloat16


def ours(options: argparse.Namespace, rows: list[dict[str, Any]], engine: str) -> list[float]:
    from llmdistill import DataConfig, OPDConfig, OPDTrainer, RolloutConfig

    clock = StepClock()
    args = OPDConfig(**shared(options), rollouts=RolloutConfig(engine=engine, max_new_tokens=options.new_tokens))
    trainer = OPDTrainer(
        AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32),
        args,
        AutoModelForCausalLM.from_pretrained(options.teacher, dtype=teacher_dtype(options)),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(options.student),
        callbacks=[clock],
        data=DataConfig(max_prompt_tokens=256),
    )
    trainer.train()
    trainer.rollout_engine.close()
    return clock.seconds()


def trl(options: argparse.Namespace, rows: list[dict[str, Any]]) -> list[float]:
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    clock = StepClock()
    args = DistillationConfig(**shared(options), max_completion_length=options.new_tokens, beta=1.0)
    trainer = DistillationTrainer(
        AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32),
        AutoModelForCausalLM.from_pretrained(options.teacher, dtype=teacher_dtype(options)),
        args,
        Dataset.from_list([{"prompt": r["prompt"]} for r in rows]),
        processing_class=AutoTokenizer.from_pretrained(options.student),
        callbacks=[clock],
    )
    trainer.train()
    return clock.seconds()


def floor(options: argparse.Namespace, rows: list[dict[str, Any]]) -> list[float]:
    student = AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=teacher_dtype(options)).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.student, padding_side="left")
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.0, fused=True)
    ends = []
    for step in range(options.steps + 1):
        batch = rows[step * options.batch : (step + 1) * options.batch]
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
        student.train()
        mask = torch.cat([prompts["attention_mask"], torch.ones(len(batch), new, dtype=torch.long)], 1)
        with torch.no_grad():
            log_t = teacher(ids, attention_mask=mask, logits_to_keep=new + 1).logits[:, :-1].float().log_softmax(-1)
        with torch.autocast("cpu", torch.bfloat16, enabled=not options.float32):
            logits = student(ids, attention_mask=mask, logits_to_keep=new + 1).logits[:, :-1]
        log_s = logits.float().log_softmax(-1)
        (log_s.exp() * (log_s - log_t)).sum(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ends.append(time.perf_counter())
        assert ids.shape[1] == width + new
    return [b - a for a, b in zip(ends, ends[1:], strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default=str(ROOT / "data/quickstart/student"))
    parser.add_argument("--teacher", default=str(ROOT / "data/quickstart/teacher"))
    parser.add_argument("--prompts", default=str(ROOT / "data/quickstart/train.jsonl"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--float32", action="store_true", help="no bfloat16: for a CPU without the instructions")
    parser.add_argument("--without", nargs="*", default=[], choices=["floor", "ours", "ours_vllm", "trl"])
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    torch.set_num_threads(options.threads)
    with open(options.prompts) as file:
        rows = [json.loads(line) for line in file][: options.batch * (options.steps + 1)]
    contenders: dict[str, Callable[[], list[float]]] = {
        "floor": lambda: floor(options, rows),
        "ours": lambda: ours(options, rows, "hf"),
        "trl": lambda: trl(options, rows),
        "ours_vllm": lambda: ours(options, rows, "vllm"),
    }
    medians: dict[str, list[float]] = {name: [] for name in contenders if name not in options.without}
    for _ in range(options.rounds):
        for name in medians:
            medians[name].append(statistics.median(contenders[name]()))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    base = medians.get("floor")
    report = {
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}",
        "step_seconds": {name: round(statistics.median(runs), 3) for name, runs in medians.items()},
        "per_round": {name: [round(x, 3) for x in runs] for name, runs in medians.items()},
        "over_floor": {
            name: [round(x / y, 3) for x, y in zip(runs, base, strict=True)] for name, runs in medians.items() if base
        },
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
