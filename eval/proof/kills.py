"""Runs that are killed with SIGKILL at random moments and resumed, beside one that nobody disturbed.

    python eval/proof/kills.py --kills 20 --seed 0            # both modes, and writes eval/proof/kills.md

Two modes: ``synchronous`` (a teacher in this process, transformers' generate) has to end with the undisturbed run's
weights bit by bit; ``overlap`` (rollouts and teacher in services, ``rollouts.staleness: 1``) to 1e-5. A checkpoint is
written after every step. Half of the kills come at a moment drawn evenly over the undisturbed run's time, the others
within a few milliseconds after a checkpoint has begun to be written (the folder it is written aside in is there), at a
step that is drawn. A killed run is resumed from the newest checkpoint, or begins anew where there is none.

Every run is a fork of this process, which has imported everything, and the services are forks too and stay: a run takes
a second or two. Small enough for a test (tests/trainer/test_kills.py).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import safetensors.torch
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

from llmdistill import DataConfig, OPDConfig, OPDTrainer, RolloutConfig
from llmdistill.compat.checkpoints import ASIDE
from llmdistill.service import command
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.remote import RemoteTeacher

ROOT = Path(__file__).resolve().parents[2]
MODES = {"synchronous": 0.0, "overlap": 1e-5}  # the largest difference of a weight
STEPS, WAIT_S = 10, 120.0
forked = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Kill:
    """What became of one run."""

    mode: str
    where: str
    after: int  # steps of the newest checkpoint when it died
    difference: float  # the largest, of any weight at the end

    @property
    def good(self) -> bool:
        return self.difference <= MODES[self.mode]


def train(models: Path, output: Path, mode: str, urls: tuple[str, str], steps: int) -> None:
    """One run, from the newest checkpoint in ``output``, in a process of its own."""
    tokenizer = AutoTokenizer.from_pretrained(models / "student")
    overlap = mode == "overlap"
    rollouts = {"engine": "remote", "url": urls[0], "staleness": 1} if overlap else {}
    args = OPDConfig(
        output_dir=str(output),
        max_steps=steps,
        save_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        save_total_limit=2,
        use_cpu=True,
        rollouts=RolloutConfig(max_new_tokens=8, samples_per_prompt=2, **rollouts),  # type: ignore[arg-type]
    )
    student, judge = (
        AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32) for name in ("student", "teacher")
    )
    trainer = OPDTrainer(
        student,
        args,
        RemoteTeacher(urls[1], lossless=True) if overlap else LocalTeacher(judge, tokenizer),
        train_dataset=[{"prompt": f"{'add ' * (i % 3 + 1)}{i}+{7 * i}"} for i in range(14)],
        processing_class=tokenizer,
        data=DataConfig(max_prompt_tokens=40),
        preflight=False,
    )
    trainer.train(get_last_checkpoint(str(output)) if output.is_dir() else None)
    trainer.save_model(str(output / "student"))


def started(work: Callable[..., None], *arguments: Any) -> Any:
    """A fork that does ``work``, says nothing, and runs no handlers of this process at its end."""

    def quietly() -> None:
        with Path(os.devnull).open("w") as nothing:
            os.dup2(nothing.fileno(), 1)
            if not os.environ.get("KILLS_VERBOSE"):
                os.dup2(nothing.fileno(), 2)
        # tqdm's own is a semaphore that all forks share: whoever is killed while holding it leaves it held for ever.
        tqdm.set_lock(threading.RLock())
        work(*arguments)
        os._exit(0)

    process = forked.Process(target=quietly, daemon=True)
    process.start()
    return process


def kill(process: Any) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.join()


@contextlib.contextmanager
def services(models: Path) -> Iterator[tuple[str, str]]:
    """The student's and the teacher's, with float32 weights."""
    made, urls = [], []
    for name, more in (("student", ["--updatable", "true"]), ("teacher", ["--top_k", "264"])):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = ["--model", str(models / name), "--port", str(port), "--dtype", "float32", "--engine", "hf", *more]
        made.append(started(command.main, words))
        urls.append(f"http://127.0.0.1:{port}")
    try:
        for url in urls:
            wait_for(functools.partial(answers, url), f"the service at {url}", nap_s=0.05)
        yield urls[0], urls[1]
    finally:
        for process in made:
            kill(process)


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/ready", timeout=2).status_code == 200
    return False


def wait_for(there: Callable[[], bool], what: str, nap_s: float = 0.002) -> None:
    end = time.monotonic() + WAIT_S
    while not there():
        if time.monotonic() > end:
            raise RuntimeError(f"{what} did not come within {WAIT_S:g} s")
        time.sleep(nap_s)


def finish(process: Any) -> None:
    process.join(WAIT_S)
    status = process.exitcode
    if status != 0:
        kill(process)
        how = f"did not end within {WAIT_S:g} s" if status is None else f"ended with {status}"
        raise RuntimeError(f"a run {how}; KILLS_VERBOSE=1 shows what it said")


def newest(output: Path) -> int:
    last = get_last_checkpoint(str(output)) if output.is_dir() else None
    return int(last.rsplit("-", 1)[1]) if last else 0


def writes(process: Any, output: Path, step: int) -> bool:
    """The run writes a checkpoint, of a later step than ``step``; or has ended."""
    return process.exitcode is not None or (newest(output) >= step and (output / ASIDE).is_dir())


def difference(a: Path, b: Path) -> float:
    """The largest of any weight; 0 is bit by bit."""
    one, two = (safetensors.torch.load_file(folder / "student" / "model.safetensors") for folder in (a, b))
    assert one.keys() == two.keys()
    if all(torch.equal(one[name], two[name]) for name in one):
        return 0.0
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def kills(
    models: Path, folder: Path, mode: str, urls: tuple[str, str], count: int, chance: random.Random, steps: int = STEPS
) -> Iterator[Kill]:
    """``count`` runs of ``mode``, each killed once; the undisturbed one comes first."""
    whole = folder / "whole"
    began = time.monotonic()
    finish(started(train, models, whole, mode, urls, steps))
    seconds = time.monotonic() - began
    for number in range(count):
        torn = folder / f"torn-{number}"
        process = started(train, models, torn, mode, urls, steps)
        if number % 2:
            step, more = chance.randrange(steps - 1), chance.uniform(0.0, 0.02)
            wait_for(functools.partial(writes, process, torn, step), "a checkpoint", 0.0002)
            where = f"{1000 * more:.1f} ms into the writing of a checkpoint, from step {step} on"
        else:
            more = chance.uniform(0.0, 0.95 * seconds)
            where = f"{more:.2f} s after its start"
        time.sleep(more)
        kill(process)
        after = newest(torn)
        if not (torn / "student" / "model.safetensors").is_file():
            finish(started(train, models, torn, mode, urls, steps))
        yield Kill(mode, where, after, difference(whole, torn))


def page(found: list[Kill], steps: int, seed: int) -> str:
    from eval.perf.record import commit, machine, versions

    each = len(found) // len({k.mode for k in found})
    command = f"python eval/proof/kills.py --kills {each} --steps {steps} --seed {seed}"
    lines = [
        "# Runs killed with SIGKILL",
        "",
        f"`{command}` on {machine()}; {versions()}; commit {commit()}.",
        "",
        f"Runs of {steps} steps, a checkpoint after each, killed once and resumed. Difference: the largest of any "
        "weight at the end from the run that nobody disturbed; 0 is bit by bit.",
        "",
        "| mode | allowed | runs | as allowed | largest difference |",
        "|---|---|---|---|---|",
    ]
    for mode, allowed in MODES.items():
        if runs := [k for k in found if k.mode == mode]:
            worst = max(k.difference for k in runs)
            lines.append(f"| {mode} | {allowed:g} | {len(runs)} | {sum(k.good for k in runs)} | {worst:.2g} |")
    lines += ["", "| mode | killed | newest checkpoint | difference |", "|---|---|---|---|"]
    lines += [f"| {k.mode} | {k.where} | {k.after} | {k.difference:.2g} |" for k in found]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each mode")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--out", default=str(ROOT / "eval/proof/kills.md"), help="empty: only print")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tests import tiny

    found: list[Kill] = []
    with tempfile.TemporaryDirectory() as temporary:
        models, chance = Path(temporary), random.Random(options.seed)
        for name, seed in (("student", 1), ("teacher", 2)):
            tiny.llama(seed).save_pretrained(models / name)
            tiny.tokenizer().save_pretrained(models / name)
        with services(models) as urls:
            for mode in options.modes:
                for each in kills(models, models / mode, mode, urls, options.kills, chance, options.steps):
                    found.append(each)
                    print(
                        f"{each.mode}: killed {each.where}, checkpoint {each.after}: {each.difference:.2g}", flush=True
                    )
    text = page(found, options.steps, options.seed)
    if options.out:
        Path(options.out).write_text(text)
    print(text)
    return 0 if all(each.good for each in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
