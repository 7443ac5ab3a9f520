"""Checks of the machine and of settings that only make sense once the models are known."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from llmdistill.errors import UserError
from llmdistill.preflight.finding import Finding, Side, Subject, fail, notice, ok
from llmdistill.recipe.launches import asks_for_deepspeed, asks_for_fsdp
from llmdistill.teachers.base import DenseTeacher, is_live

GIB = 2**30
FREE_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86, x86, Arm


def disk(s: Subject) -> Iterator[Finding]:
    """Room for the checkpoints that exist at one time, and one being written."""
    args = s.args
    folder = Path(args.output_dir or "runs/default").absolute()
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    trained = [(numel(p), p.element_size()) for p in s.student.parameters() if p.requires_grad]
    adapter = hasattr(s.student, "peft_config")
    weights = sum(numel(p) * p.element_size() for p in s.student.parameters() if p.requires_grad or not adapter)
    optimizer = 0 if args.save_only_model else 2 * 4 * sum(count for count, _ in trained)
    one = weights + optimizer  # AdamW's two moments in float32
    if args.save_strategy == "no":
        held, what = 1, "the student"
        one = weights
    else:
        held = (args.save_total_limit or 3) * s.stages + 1
        what = f"{held} checkpoints of {one / GIB:.2f} GiB"
    if held * one > free:
        fix = "free space, another train.output_dir, or a lower train.save_total_limit"
        yield fail(f"{what} need {held * one / GIB:.1f} GiB, {folder} has {free / GIB:.1f}", fix)
    elif args.save_strategy == "steps" and args.save_total_limit is None and args.max_steps > 0:
        every = args.save_steps if args.save_steps >= 1 else args.save_steps * args.max_steps
        total = math.ceil(args.max_steps / every) * one
        if total > free:
            fix = "train.save_total_limit 3"
            yield notice(f"keeping all checkpoints takes {total / GIB:.1f} GiB, {free / GIB:.1f} are free", fix)
    yield ok(f"{what} fit into {free / GIB:.1f} GiB free")


def numel(parameter: nn.Parameter) -> int:
    """Its size, also when ZeRO-3 left a shard of it here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def memory(s: Subject) -> Iterator[Finding]:
    """Weights, gradients and the optimizer's state alone fit into the device: a bound from below, without activations.

    What fits may still be too much; what does not would be killed in its first step, after everything was loaded.
    """
    args, adam = s.args, str(getattr(s.args.optim, "value", s.args.optim)).startswith("adamw_torch")
    if asks_for_deepspeed() or asks_for_fsdp():
        yield ok("not counted: DeepSpeed or FSDP shares weights and optimizer out")
        return
    models = {id(m): m for m in (s.student, *(side.model for side in s.sides if side.model is not None))}
    weights = sum(p.numel() * p.element_size() for m in models.values() for p in m.parameters())
    trained = [p for p in s.student.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    moments = 2 * gradients if adam else 0  # AdamW's, of the weights' own dtype
    needed, there = weights + gradients + moments, device_memory(args.device)
    what = f"weights, gradients and {'the moments of AdamW' if adam else 'no moments'} need {needed / GIB:.2f} GiB"
    place = "the GPU" if args.device.type == "cuda" else "this process"
    if needed > there:
        fix = "student.lora_r 16, a smaller model, or --config_file recipes/accelerate/zero3.yaml on several devices"
        yield fail(f"{what} without a single activation, {place} has {there / GIB:.2f}", fix)
    elif needed > 0.8 * there:
        yield notice(
            f"{what}, {place} has {there / GIB:.2f}: little is left for activations",
            "train.gradient_checkpointing, or a smaller train.per_device_train_batch_size",
        )
    yield ok(f"{what} of {there / GIB:.1f}")


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU, or this process's share of the machine's memory (of the container's, where that is less)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        limit = "max"
    there = min(there, int(limit)) if limit.isdigit() else there
    return there // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def device(s: Subject) -> Iterator[Finding]:
    """Devices and dtypes as they came out."""
    args = s.args
    on_cpu = args.device.type == "cpu"
    student = next(s.student.parameters()).dtype
    embedded = [next(side.model.parameters()).dtype for side in s.sides if side.model is not None]
    dtypes = {student, *embedded}
    if on_cpu and (args.fp16 or torch.float16 in dtypes):
        yield fail("float16 on a CPU", "student.dtype float32, teacher.dtype bfloat16, and train.bf16 for train.fp16")
    full = not hasattr(s.student, "peft_config")
    if student == torch.float16 and full:
        yield fail("the student's own weights are float16, which loses small gradients", "student.dtype float32")
    if student == torch.bfloat16 and full:
        yield notice(
            "the student's own weights are bfloat16: an update below 1/256 of a weight is rounded away",
            "student.dtype float32 with train.bf16",
        )
    maths = "bfloat16 autocast" if args.bf16 else "float16 autocast" if args.fp16 else "its dtype"
    if not on_cpu and not (args.bf16 or args.fp16) and student == torch.float32:
        yield notice(
            "a GPU computes in float32 here, several times slower than in bfloat16 and with twice the activations",
            "--bf16 true; the trained weights stay float32",
        )
    frozen = [p for p in s.student.parameters() if not p.requires_grad]
    if not (on_cpu or full) and any(p.dtype == torch.float32 for p in frozen):
        yield notice("the frozen weights of a LoRA student are float32: twice the memory", "--student.dtype bfloat16")
    if args.bf16 and student == torch.float32:
        yield notice("bfloat16 autocast over float32 weights: losses are float32, activations are not")
    if on_cpu and (args.bf16 or torch.bfloat16 in dtypes) and cpu_flags().isdisjoint(BF16_FLAGS):
        yield notice(
            "this CPU has no bfloat16 instructions (avx512_bf16, amx_bf16): float32 is faster here, up to 150 times",
            "the options that python -m llmdistill.precision prints",
        )
    threads, cores = torch.get_num_threads(), cores_here()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if on_cpu and threads * processes > cores:
        yield notice(f"{processes} processes of {threads} threads on {cores} cores", f"OMP_NUM_THREADS={cores}")
    elif on_cpu and threads * processes < cores:
        yield notice(f"{threads * processes} of {cores} cores are used", "raise OMP_NUM_THREADS if the machine is idle")
    names = [f"teacher {side.name!r}" if len(s.sides) > 1 else "the teacher" for side in s.sides]
    teachers = "".join(f"; {name} {_place(side)}" for name, side in zip(names, s.sides, strict=True))
    yield ok(f"student {_name(student)}, computed in {maths}, on {args.device}{teachers}")


def _place(side: Side) -> str:
    if side.model is not None:
        return f"is {_name(next(side.model.parameters()).dtype)}"
    return "runs elsewhere" if is_live(side.teacher) else "is read from disk"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cpu_flags() -> set[str]:
    """What /proc/cpuinfo says the first processor can do; without that file, everything."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set(BF16_FLAGS)
    return set(next((line for line in lines if line.lower().startswith(("flags", "features"))), "").split())


def cores_here() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def objective(s: Subject) -> Iterator[Finding]:
    """Settings of rollouts and estimator that contradict each other or the models."""
    r, width = s.args.rollouts, s.trainer.vocab_size
    if not any(p.requires_grad for p in s.student.parameters()):
        yield fail(
            "no weight of the student is trained", "do not give the model itself as its own teacher, a copy of it"
        )
    for term in s.trainer.method.terms:
        try:
            term.check_top_k(width)
        except UserError as error:  # beside what else is found
            yield Finding("fail", "", str(error))
    if s.kind == "full" and s.live and not isinstance(s.trainer.teacher, DenseTeacher):
        yield notice(
            f"the full estimator asks a teacher outside this process for {width} log-probs a token",
            "--estimator top_k, or teacher.engine hf",
        )
    reference = s.trainer.judges.get("reference")
    if reference is not None and reference.info().tokenizer != s.info.tokenizer:
        yield fail(
            f"reference {reference.info().name!r} has another vocabulary than teacher {s.info.name!r}: its "
            "log-probs would be of other tokens",
            "--reference initial, or a model of the teacher's family",
        )
    if not s.trainer.on_policy:
        yield ok(f"{s.kind} estimator on the {' or '.join(sorted(s.trainer.method.uses))}'s completions")
        return
    if r.push_every > 1 and s.args.save_strategy == "steps" and s.args.save_steps % r.push_every:
        yield notice(
            f"rollouts.push_every is {r.push_every}, train.save_steps {s.args.save_steps:g}: a run resumed from a "
            "checkpoint between two pushes samples from newer weights than the undisturbed one",
            "save at multiples of push_every",
        )
    if r.temperature == 0 and r.samples_per_prompt > 1:
        yield fail(
            f"rollouts.samples_per_prompt is {r.samples_per_prompt} at temperature 0: all samples are the same",
            "raise the temperature, or draw one sample",
        )
    narrowed = [
        f"rollouts.{name} {getattr(r, name)}" for name, free in FREE_SAMPLING.items() if getattr(r, name) != free
    ]
    if narrowed and s.kind == "sampled":
        yield notice(
            f"{', '.join(narrowed)}: the sampled estimator is unbiased for samples of the student itself only",
            "temperature 1, top_p 1, top_k 0",
        )
    if r.top_k > s.columns:
        yield fail(f"rollouts.top_k is {r.top_k}, the student has {s.columns} columns", "0, the whole vocabulary")
    yield ok(f"{s.kind} estimator over {width} columns, {r.samples_per_prompt} samples a prompt")
