"""What a step costs when the texts of the next one are made beside it, against the longer of the two.

    python eval/perf/overlap.py --steps 12 --rounds 3

This process trains on one core; another one, bound to the other core, serves the student's rollouts and the teacher.
Runs with ``rollouts.staleness`` 0 say what a step is made of: its text and evidence (weights pushed, completions
written, scored and brought here), and training, the rest. Runs with staleness 1 in alternation with them say what a
step takes then: its ratio to the longer of the two is 1 where nothing is lost. ``--new_tokens`` and
``--train_passes`` (backward passes of a step, all but one of them for balance alone) make the two about equal. The
learning rate is 0: every step does the same work. CPU seconds are this process's: what they grow by is what overlap
costs it, whatever else is running.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import TrainerCallback

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from eval.perf.record import add_results_option, note, quantile  # noqa: E402
from llmdistill import DataConfig, OPDConfig, OPDTrainer, RolloutConfig  # noqa: E402
from llmdistill.service import serve  # noqa: E402
from llmdistill.teachers.remote import RemoteTeacher  # noqa: E402
from tests import tiny  # noqa: E402

START_S = 120.0


class Timed(OPDTrainer):
    """Remembers how long each step's text and evidence took, and when each step ended."""

    repeats = 1  # backward passes of a step

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.made_s: list[float] = []
        self.ends: list[float] = []
        self.cpu: list[float] = []
        super().__init__(*args, callbacks=[Clock(self.ends, self.cpu)], **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        found = super().get_batch_samples(*args, **kwargs)
        self.made_s.append(time.perf_counter() - began)
        return found

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        for _ in range(self.repeats - 1):
            super().compute_loss(*args, **kwargs).backward()
        return super().compute_loss(*args, **kwargs)

    def of_steps(self, first: int = 2) -> tuple[list[float], list[float], list[float]]:
        """Seconds of each step, of these for its text and evidence, and CPU seconds; without the ``first`` steps."""
        steps, cpu = ([b - a for a, b in zip(at, at[1:], strict=False)][first - 1 :] for at in (self.ends, self.cpu))
        return steps, self.made_s[first : first + len(steps)], cpu


class Clock(TrainerCallback):
    def __init__(self, ends: list[float], cpu: list[float]) -> None:
        self.ends, self.cpu = ends, cpu

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())
        self.cpu.append(time.process_time())


def serve_both(models: Path, ports: Sequence[int], core: int | None) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    shared = ["--dtype", "float32", "--engine", "hf"]
    commands = [
        ["--model", str(models / "student"), "--port", str(ports[0]), "--updatable", "true", *shared],
        ["--model", str(models / "teacher"), "--port", str(ports[1]), *shared],
    ]

    async def both() -> None:
        await asyncio.gather(*(serve.serve(serve.parsed(words), None) for words in commands))

    asyncio.run(both())


def ready(url: str) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        try:
            if httpx.get(f"{url}/ready", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"no service at {url} within {START_S:g} s")


def run(options: argparse.Namespace, models: Path, urls: Sequence[str], staleness: int) -> Timed:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rollouts = RolloutConfig(
        engine="remote",
        url=urls[0],
        max_new_tokens=options.new_tokens,
        ignore_eos=True,
        batch_tokens=options.batch_tokens,
        staleness=staleness,
    )
    args = OPDConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=options.steps + 2,
        per_device_train_batch_size=options.batch,
        learning_rate=0.0,
        save_strategy="no",
        logging_steps=1000,
        use_cpu=True,
        estimator="top_k",
        top_k=64,
        rollouts=rollouts,
    )
    trainer = Timed(
        AutoModelForCausalLM.from_pretrained(models / "student", dtype=torch.float32),
        args,
        RemoteTeacher(urls[1]),
        train_dataset=[{"prompt": f"{'add ' * 8}{i}+{i}"} for i in range(100, 100 + 4 * options.batch)],
        processing_class=AutoTokenizer.from_pretrained(models / "student"),
        data=DataConfig(max_prompt_tokens=128),
        preflight=False,
    )
    trainer.repeats = options.train_passes
    trainer.train()
    trainer.close()
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of one run without and one with overlap")
    parser.add_argument("--steps", type=int, default=12, help="timed, of a run")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--batch_tokens", type=int, default=0, help="of rollouts: smaller requests, which overlap too")
    parser.add_argument("--train_passes", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    add_results_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as temporary:
        models = Path(temporary)
        for name, seed in (("student", 1), ("teacher", 2)):
            model = tiny.llama(seed, vocab=1024, hidden=options.hidden, layers=options.layers)
            model.save_pretrained(models / name)
            tiny.tokenizer().save_pretrained(models / name)
        ports = []
        for _ in range(2):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                ports.append(free.getsockname()[1])
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        core = cores[1] if len(cores) > 1 else None
        server = multiprocessing.get_context("fork").Process(
            target=functools.partial(serve_both, models, ports, core), daemon=True
        )
        server.start()
        if core is not None:
            os.sched_setaffinity(0, {cores[0]})
        try:
            for url in urls:
                ready(url)
            measure(options, models, urls)
        finally:
            server.kill()
            server.join()


def measure(options: argparse.Namespace, models: Path, urls: Sequence[str]) -> None:
    made_s, train_s, plain_s, ahead_s = list[float](), list[float](), list[float](), list[float]()
    ratios, plain_cpu, ahead_cpu = list[float](), list[float](), list[float]()
    for _ in range(options.rounds):
        steps, made, cpu = run(options, models, urls, 0).of_steps()
        train = [step - text for step, text in zip(steps, made, strict=True)]
        floor = max(quantile(made, 0.5), quantile(train, 0.5))
        ahead, _, cpu_ahead = run(options, models, urls, 1).of_steps()
        plain_cpu, ahead_cpu = plain_cpu + cpu, ahead_cpu + cpu_ahead
        made_s, train_s, plain_s, ahead_s = made_s + made, train_s + train, plain_s + steps, ahead_s + ahead
        ratios += [step / floor for step in ahead]
    cell = f"{options.batch} x {options.new_tokens} new tokens, hidden {options.hidden}"
    for what, unit, values in (
        ("text and evidence, alone", "s", made_s),
        ("train, alone", "s", train_s),
        ("step, staleness 0", "s", plain_s),
        ("step, staleness 1", "s", ahead_s),
        ("CPU of a step, staleness 0", "s", plain_cpu),
        ("CPU of a step, staleness 1", "s", ahead_cpu),
        ("step, staleness 1, over the longer of the two", "ratio", ratios),
    ):
        note("overlap", f"{cell}: {what}", unit, values, options.results)


if __name__ == "__main__":
    main()
