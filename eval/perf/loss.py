"""The streamed loss against its peers: seconds and extra memory, by vocabulary and rows.

    OMP_NUM_THREADS=2 python eval/perf/loss.py [--columns 32000 152064 256000] [--rows 256 1024] [--runs 5]

All form the reverse KL of a student's rows to a teacher's, each from hidden states through its own output head, and the
gradient by the student's hidden states and head:

- ``ours``: `llmdistill.objectives.streaming.streamed`, chunks as it chooses them.
- ``naive``: both logits [rows, columns] at once, PyTorch's own operations.
- ``trl``: the kernel of TRL's DistillationTrainer (on a CPU its plain PyTorch form, in tiles of 4096 rows and 32768
  columns); it also forms the entropy of the student.
- ``liger``: Liger's chunked_loss (JSD with beta 1, no hard labels), plain PyTorch, where liger-kernel can be imported.
  It takes chunks of 1024 rows and, on a CPU, is not compiled.

Before anything is timed losses and gradients are held against each other. Every contender is a process of its own; they
take turns on one cell, so that another load of the machine meets all of them. Extra memory is the most that was held
above what was there before the call, the gradient of the head (columns x hidden) among it: resident memory of the
process on a CPU, allocated memory on a GPU. ``ours over the best peer`` is the ratio in each turn, peers being all but
``naive``.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from eval.perf.record import add_results_option, note

CONTENDERS = ("ours", "naive", "trl", "liger")
TOLERANCE = 1e-3  # relative, of loss and gradients: float32 sums of up to 256k terms in another order


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, nargs="+", default=[32_000, 152_064, 256_000])
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--without", nargs="*", default=[], choices=CONTENDERS[1:])
    add_results_option(parser)
    options = parser.parse_args(words)
    contenders = {name: Contender(name) for name in CONTENDERS if name not in options.without}
    missing = {name: reason for name, c in contenders.items() if (reason := c.ask("start"))}
    for name, reason in missing.items():
        print(f"loss: {name} is left out: {reason}", flush=True)
        contenders.pop(name).close()
    try:
        for columns in options.columns:
            for rows in options.rows:
                measure(contenders, columns, rows, options)
    finally:
        for contender in contenders.values():
            contender.close()


def measure(contenders: dict[str, Contender], columns: int, rows: int, options: argparse.Namespace) -> None:
    cell = f"{rows} rows, {columns} columns, hidden {options.hidden}, {options.dtype}"
    found = {}
    for name, contender in contenders.items():  # one after another: inputs of all of them are there at one time
        found[name] = contender.ask("make", rows, columns, options.hidden, options.dtype)
    agree(found, TOLERANCE if options.dtype == "float32" else 0.05)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    extra: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.runs):
        for name, contender in contenders.items():
            taken, held = contender.ask("run")
            seconds[name].append(taken)
            extra[name].append(held / 2**30)
    for name, contender in contenders.items():
        contender.ask("drop")
        note("loss", f"{name}, {cell}: time", "s", seconds[name], options.results)
        note("loss", f"{name}, {cell}: extra memory", "GiB", extra[name], options.results)
    peers = [name for name in contenders if name not in ("ours", "naive")]
    if peers:
        best = min(peers, key=lambda name: sorted(seconds[name])[options.runs // 2])
        ratios = [a / b for a, b in zip(seconds["ours"], seconds[best], strict=True)]
        note("loss", f"ours over the best peer ({best}), {cell}: time", "ratio", ratios, options.results)


def agree(found: dict[str, dict[str, float]], tolerance: float) -> None:
    """Raises ValueError where two contenders have not computed the same."""
    for name, numbers in found.items():
        for key, value in numbers.items():
            wanted = found["ours"][key]
            if not abs(value - wanted) <= tolerance * abs(wanted):
                raise ValueError(f"{name} has {key} {value}, ours {wanted}: the work is not equal")


class Contender:
    """A process that keeps its inputs and runs one call when it is asked to."""

    def __init__(self, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(name, theirs), daemon=True)
        self.process.start()

    def ask(self, *request: Any) -> Any:
        self.pipe.send(request)
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self.pipe.send(("end",))
        self.process.join()


def serve(name: str, pipe: Connection) -> None:
    prepare: Callable[..., Any] | None = None
    call: Callable[[], tuple[Any, ...]] | None = None
    while (request := pipe.recv())[0] != "end":
        answer: Any = None
        try:
            if request[0] == "start":
                try:
                    prepare = globals()[f"prepare_{name}"]()
                except ImportError as error:
                    answer = f"{type(error).__name__}: {error}"
            elif request[0] == "make":
                assert prepare is not None
                inputs = make_inputs(*request[1:])
                call = prepare(*inputs)
                loss, *gradients = call()
                answer = {"loss": float(loss)} | {f"gradient {i}": float(g.norm()) for i, g in enumerate(gradients)}
                del loss, gradients, inputs
            elif request[0] == "run":
                assert call is not None
                answer = measured(call)
            else:
                call = None
                gc.collect()
        except Exception as error:
            answer = RuntimeError(f"{name}: {type(error).__name__}: {error}")
        pipe.send(answer)


def make_inputs(rows: int, columns: int, hidden: int, dtype: str) -> Any:
    """(student's hidden states [N, H], its head [V, H], teacher's hidden states [N, H], its head [V, H])."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    random = torch.Generator().manual_seed(0)

    def normal(n: int, scale: float) -> torch.Tensor:
        made = torch.empty(n, hidden).normal_(generator=random).mul_(scale)
        return made.to(device, getattr(torch, dtype))

    student, head = normal(rows, 1.0), normal(columns, 0.1)
    teacher, of_teacher = normal(rows, 1.0), normal(columns, 0.1)
    return student.requires_grad_(), head.requires_grad_(), teacher, of_teacher


def measured(call: Callable[[], tuple[Any, ...]]) -> tuple[float, float]:
    """(seconds, bytes above what was there)."""
    import torch

    gc.collect()
    on_gpu = torch.cuda.is_available()
    before = forget_peak(on_gpu)
    start = time.perf_counter()
    results = call()
    if on_gpu:
        torch.cuda.synchronize()
    taken = time.perf_counter() - start
    del results
    return taken, peak(on_gpu) - before


def forget_peak(on_gpu: bool) -> int:
    """What is held now, in bytes; the peak is counted from here on."""
    import torch

    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is given back: else the next call would take it from there
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    return _status("VmRSS")


def peak(on_gpu: bool) -> int:
    import torch

    return torch.cuda.max_memory_allocated() if on_gpu else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def prepare_ours() -> Callable[..., Callable[[], tuple[Any, ...]]]:
    from llmdistill.objectives.divergences import reverse_kl
    from llmdistill.objectives.streaming import streamed

    def prepare(student: Any, head: Any, teacher: Any, of_teacher: Any) -> Callable[[], tuple[Any, ...]]:
        ours, theirs = linear(head), linear(of_teacher)

        def call() -> tuple[Any, ...]:
            return with_gradients(streamed(reverse_kl, student, ours, (teacher, theirs))[0], student, ours.weight)

        return call

    return prepare


def prepare_naive() -> Callable[..., Callable[[], tuple[Any, ...]]]:
    import torch

    def prepare(student: Any, head: Any, teacher: Any, of_teacher: Any) -> Callable[[], tuple[Any, ...]]:
        def call() -> tuple[Any, ...]:
            log_s = torch.log_softmax((student @ head.T).float(), -1)
            with torch.no_grad():
                log_t = torch.log_softmax((teacher @ of_teacher.T).float(), -1)
            return with_gradients((log_s.exp() * (log_s - log_t)).sum(), student, head)

        return call

    return prepare


def prepare_trl() -> Callable[..., Callable[[], tuple[Any, ...]]]:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def prepare(student: Any, head: Any, teacher: Any, of_teacher: Any) -> Callable[[], tuple[Any, ...]]:
        def call() -> tuple[Any, ...]:
            per_token, _ = ChunkedDivergenceFunction.apply(
                student, head, None, teacher, of_teacher, None, 1.0, 1.0, 1.0, None, 1.0, None
            )
            return with_gradients(per_token.sum(), student, head)

        return call

    return prepare


def prepare_liger() -> Callable[..., Callable[[], tuple[Any, ...]]]:
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    def prepare(student: Any, head: Any, teacher: Any, of_teacher: Any) -> Callable[[], tuple[Any, ...]]:
        loss_of = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0,
            weight_soft_loss=1.0,
            beta=1.0,
            compiled=torch.cuda.is_available(),
        )
        labels = torch.zeros(len(student), dtype=torch.long, device=student.device)

        def call() -> tuple[Any, ...]:
            loss = loss_of(student, head, teacher, of_teacher, labels)
            return with_gradients(loss * len(student), student, head)  # theirs is a mean

        return call

    return prepare


def linear(weight: Any) -> Any:
    from torch import nn

    made = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    made.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    return made


def with_gradients(loss: Any, *inputs: Any) -> tuple[Any, ...]:
    import torch

    return loss.detach(), *torch.autograd.grad(loss, inputs)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
