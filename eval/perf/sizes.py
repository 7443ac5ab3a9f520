"""Sizes beyond this machine, worked out: bytes of a GPU, seconds of each phase of a step, and what bounds it.

    python eval/perf/sizes.py            # a table in Markdown for each plan below
    python eval/perf/sizes.py --json

Nothing here is measured. Memory is `llmdistill.preflight.estimate`, the formula that a run is refused by. Seconds are
the larger of arithmetic and traffic, at the shares of a device's peak that stand in `Device`. With P, P_T the
parameters of student and teacher, L layers, q and k the widths of all query and key heads, V columns, h hidden:

    rollouts      all sequences of an engine start together; the share of them longer than t is exp(-t / typical),
                  none longer than max_new_tokens. A token of each costs max((2 P + sequences x context x 4 L k) bytes /
                  (tp x bandwidth), 2 P x sequences / (tp x flops)): weights and keys and values are read once a step.
                  Sequences that do not fit the cache at their mean length wait for a next wave.
    teacher       2 P_T + 2 L q context arithmetic a token (context: half of the sequence), no gradient
    student       6 P + 6 L q context a token; 8 and 8 with activation checkpointing
    gather        shards of weights, 2 P bytes x (N - 1) / N for the forward pass, again for the backward pass, and as
                  much of gradients, of each micro-batch: hidden behind arithmetic where it is the shorter one
    optimizer     AdamW reads and writes 28 bytes a parameter of its shard
    push          2 P bytes gathered into the engine's own copy, its half of every layer where tp is 2
    wire          score blocks of the teacher's evidence, over the network of the node

``overlapped`` is a step with rounds made ahead (``rollouts.staleness``): the longest of training, sampling and scoring,
where these have GPUs of their own.
Simplified away: launch latency, stragglers, prefill of prompts (one pass, as the teacher's), tokenizing, checkpoints.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llmdistill.preflight.estimate import Estimate, Shape, block_bytes, of_shapes

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """A GPU: what its makers say, and the share of it that such work reaches."""

    name: str = "H100 80 GB"
    memory: int = 80 * 10**9
    flops: float = 989e12  # bfloat16, dense
    bandwidth: float = 3.35e12  # bytes/s of its memory
    link: float = 450e9  # bytes/s to others in the node, one way
    network: float = 50e9  # bytes/s to other nodes
    trains: float = 0.40  # of flops, in long matrix products with a backward pass
    scores: float = 0.50  # of flops, forward only
    decodes: float = 0.60  # of bandwidth


@dataclass(frozen=True)
class Plan:
    """A run. Counts of sequences are of a whole optimizer step."""

    name: str
    student: Shape
    teacher: Shape
    training_gpus: int  # the student is sharded over them, and sampled from on them unless rollout_gpus
    teacher_gpus: int  # of a served teacher; 0: on the training GPUs, shared out
    sequences: int
    prompt: int
    max_new_tokens: int
    typical: int  # see ``rollouts``
    tensor_parallel: int = 1
    share: float = 0.6  # of a GPU for the engine, which sleeps while the student trains
    micro_batch_tokens: int = 32768
    top_k: int = 0  # 0: all columns of a teacher here
    rollout_gpus: int = 0  # of a service that samples; 0: the training GPUs do
    device: Device = Device()

    @property
    def mean_completion(self) -> float:
        return self.typical * (1 - math.exp(-self.max_new_tokens / self.typical))

    @property
    def tokens(self) -> float:
        """Of a step: prompts and completions."""
        return self.sequences * (self.prompt + self.mean_completion)


def parameters(hidden: int, mlp: int, layers: int, queries: int, keys: int, columns: int, tied: bool) -> int:
    """Of a Llama or Qwen decoder, norms left out (under 0.01 %)."""
    return layers * (hidden * (2 * queries + 2 * keys) + 3 * hidden * mlp) + (1 if tied else 2) * columns * hidden


def shape(hidden: int, mlp: int, layers: int, heads: int, groups: int, columns: int, tied: bool, normed: bool) -> Shape:
    queries, keys = heads * 128, groups * 128
    count = parameters(hidden, mlp, layers, queries, keys, columns, tied)
    return Shape(count, hidden, mlp, queries, keys, layers, columns, normed)


QWEN3_1_7B = shape(2048, 6144, 28, 16, 8, 151_936, tied=True, normed=True)
QWEN3_8B = shape(4096, 12288, 36, 32, 8, 151_936, tied=False, normed=True)
LLAMA_8B = shape(4096, 14336, 32, 32, 8, 128_256, tied=False, normed=False)
LLAMA_70B = shape(8192, 28672, 80, 64, 8, 128_256, tied=False, normed=False)

PLANS = (
    Plan(
        "Qwen3-8B into Qwen3-1.7B, 8 GPUs, teacher shared out over them, 100k prompts",
        QWEN3_1_7B, QWEN3_8B, 8, 0, sequences=256, prompt=512, max_new_tokens=16384, typical=6000,
    ),
    Plan(
        "Qwen3-8B into Qwen3-1.7B, 6 + 2 GPUs, teacher served, top 64",
        QWEN3_1_7B, QWEN3_8B, 6, 2, sequences=256, prompt=512, max_new_tokens=16384, typical=6000, top_k=64,
    ),
    Plan(
        "Qwen3-8B into Qwen3-1.7B, 1 + 5 + 2 GPUs: trained, sampled by a service, scored by one, rounds made ahead",
        QWEN3_1_7B, QWEN3_8B, 1, 2, sequences=256, prompt=512, max_new_tokens=16384, typical=6000, top_k=64,
        rollout_gpus=5, share=0.9,
    ),
    Plan(
        "Llama-3.3-70B into Llama-3.1-8B, 40 + 24 GPUs, teacher served on 3 x 8, top 64",
        LLAMA_8B, LLAMA_70B, 40, 24, sequences=1280, prompt=512, max_new_tokens=16384, typical=6000,
        tensor_parallel=2, top_k=64,
    ),
    Plan(
        "Llama-3.3-70B into Llama-3.1-8B, 8 + 32 + 24 GPUs: trained, sampled, scored, rounds made ahead",
        LLAMA_8B, LLAMA_70B, 8, 24, sequences=1280, prompt=512, max_new_tokens=16384, typical=6000, top_k=64,
        rollout_gpus=32, share=0.9,
    ),
    Plan(
        "Llama-3.3-70B into Llama-3.1-8B, 64 GPUs, teacher shared out over them",
        LLAMA_8B, LLAMA_70B, 64, 0, sequences=1280, prompt=512, max_new_tokens=16384, typical=6000, tensor_parallel=2,
    ),
)  # fmt: skip


def rollouts(plan: Plan) -> tuple[float, str, int]:
    """(seconds, what bounds it, sequences of an engine at one time)."""
    p, d, tp = plan.student, plan.device, plan.tensor_parallel
    mine = plan.sequences * tp / (plan.rollout_gpus or plan.training_gpus)
    a_token = 4 * p.layers * p.keys  # bytes of keys and values
    room = tp * plan.share * d.memory - 2 * p.parameters
    at_once = max(1.0, min(mine, room / (a_token * (plan.prompt + plan.mean_completion))))
    seconds, reads, weights, stride = 0.0, 0.0, 0.0, 64
    for t in range(0, plan.max_new_tokens, stride):
        active = at_once * math.exp(-t / plan.typical)
        keys = active * a_token * (plan.prompt + t)
        traffic = (2 * p.parameters + keys) / (tp * d.bandwidth * d.decodes)
        arithmetic = 2 * p.parameters * active / (tp * d.flops * d.scores)
        seconds += stride * max(traffic, arithmetic)
        reads += keys
        weights += 2 * p.parameters
    waves = max(1.0, mine / at_once)
    return seconds * waves, "keys and values" if reads > weights else "weights", round(at_once)


def scoring(plan: Plan) -> tuple[float, str]:
    """The teacher's forward pass over all tokens of a step."""
    t, d = plan.teacher, plan.device
    gpus = plan.teacher_gpus or plan.training_gpus
    context = (plan.prompt + plan.mean_completion) / 2
    arithmetic = plan.tokens * (2 * t.parameters + 2 * t.layers * t.queries * context) / (gpus * d.flops * d.scores)
    if plan.teacher_gpus:
        return arithmetic, "arithmetic"
    traffic = micro_batches(plan) * 2 * t.parameters * (gpus - 1) / gpus / between(plan, gpus)
    return max(arithmetic, traffic), "arithmetic" if arithmetic > traffic else "gathering its weights"


def training(plan: Plan) -> tuple[float, str]:
    p, d, gpus = plan.student, plan.device, plan.training_gpus
    context = (plan.prompt + plan.mean_completion) / 2
    a_token = 8 * p.parameters + 8 * p.layers * p.queries * context
    arithmetic = plan.tokens * a_token / (gpus * d.flops * d.trains)
    traffic = micro_batches(plan) * 3 * 2 * p.parameters * (gpus - 1) / gpus / between(plan, gpus)
    return max(arithmetic, traffic), "arithmetic" if arithmetic > traffic else "gathering weights"


def micro_batches(plan: Plan) -> float:
    return max(1.0, plan.tokens / plan.training_gpus / plan.micro_batch_tokens)


def between(plan: Plan, gpus: int) -> float:
    """Bytes/s into a GPU while shards are gathered."""
    return plan.device.link if gpus <= 8 else plan.device.network


def seconds(plan: Plan) -> dict[str, tuple[float, str]]:
    p, d, gpus = plan.student, plan.device, plan.training_gpus
    sampled, bound, at_once = rollouts(plan)
    push = 2 * p.parameters * (gpus - 1) / gpus / between(plan, gpus)
    listed = plan.top_k or p.columns
    wire = plan.sequences * plan.mean_completion * block_bytes(plan.top_k, p.columns) if plan.teacher_gpus else 0.0
    nodes = -(-plan.teacher_gpus // 8) if plan.teacher_gpus else 1
    return {
        "push of weights": (push, "links" if gpus <= 8 else "network"),
        "rollouts": (sampled, f"{bound}, {at_once} sequences at one time"),
        "teacher": scoring(plan),
        "wire": (wire / (nodes * d.network), f"{wire / GIB:.1f} GiB, {listed} listed" if wire else "no wire"),
        "student": training(plan),
        "optimizer": (28 * p.parameters / gpus / d.bandwidth, "memory"),
    }


def overlapped(plan: Plan) -> tuple[float, str]:
    """With rounds made ahead: the next is sampled and scored while this one trains. What shares GPUs follows one upon
    another, so only what has GPUs of its own is hidden."""
    sides = {"training GPUs": 0.0, "sampling": 0.0, "teacher": 0.0}
    for name, (taken, _) in seconds(plan).items():
        side = "training GPUs"
        if name in ("teacher", "wire") and plan.teacher_gpus:
            side = "teacher"
        if name in ("rollouts", "push of weights") and plan.rollout_gpus:
            side = "sampling"
        sides[side] += taken
    longest = max(sides, key=lambda side: sides[side])
    return sides[longest], longest


def memory(plan: Plan) -> Estimate:
    """Of a training GPU: ZeRO-3, float32 weights with bfloat16 autocast, activation checkpointing."""
    from llmdistill import OPDConfig, RolloutConfig

    rollout = RolloutConfig(
        engine="remote" if plan.rollout_gpus else "vllm",
        url="http://elsewhere" if plan.rollout_gpus else "",
        max_new_tokens=plan.max_new_tokens,
        gpu_memory_utilization=plan.share,
    )
    args = OPDConfig(
        output_dir="unused",
        use_cpu=True,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=max(1, plan.sequences // plan.training_gpus),
        gradient_checkpointing=True,
        rollouts=rollout,
        **({"estimator": "top_k", "top_k": plan.top_k} if plan.top_k else {}),
    )
    args.bf16 = True  # for the formula; a machine without a GPU would refuse it
    here = [] if plan.teacher_gpus else [(plan.teacher, 2, plan.micro_batch_tokens)]
    found = of_shapes(
        args, plan.student, here, longest_prompt=plan.prompt, processes=plan.training_gpus, zero=3,
        device_bytes=plan.device.memory, gpu=True,
    )  # fmt: skip
    elsewhere = found.items["teacher"] - found.items["teacher"] // plan.training_gpus  # the formula has all of it here
    items = {**found.items, "teacher": found.items["teacher"] - elsewhere}
    return replace(found, items=items, peak=found.peak - elsewhere)


def report(plan: Plan) -> dict[str, Any]:
    phases, found = seconds(plan), memory(plan)
    total = sum(s for s, _ in phases.values())
    step, bound = overlapped(plan)
    gpus = plan.training_gpus + plan.teacher_gpus + plan.rollout_gpus
    return {
        "plan": plan.name,
        "device": plan.device.name,
        "tokens_per_step": round(plan.tokens),
        "seconds": {name: {"seconds": round(s, 2), "bound by": b} for name, (s, b) in phases.items()},
        "step": round(total, 1),
        "overlapped": {"seconds": round(step, 1), "bound by": bound},
        "tokens_per_second_and_gpu": round(plan.tokens / step / gpus),
        "gib": {name: round(size / GIB, 2) for name, size in found.items.items()},
        "peak_gib": round(found.peak / GIB, 1),
        "peak_at": found.at,
    }


def markdown(found: dict[str, Any]) -> str:
    head = f"### {found['plan']}\n\n{found['device']}, {found['tokens_per_step'] / 1e6:.2f} M tokens a step\n"
    phases = ["| phase | seconds | bound by |", "|---|---|---|"]
    phases += [f"| {name} | {x['seconds']} | {x['bound by']} |" for name, x in found["seconds"].items()]
    phases += [f"| one after another | {found['step']} | |"]
    rate = f"{found['overlapped']['bound by']}; {found['tokens_per_second_and_gpu']} tokens/s and GPU"
    phases += [f"| **step, overlapped** | **{found['overlapped']['seconds']}** | {rate} |"]
    sizes = ["", "| of a training GPU | GiB |", "|---|---|"]
    sizes += [f"| {name} | {gib} |" for name, gib in found["gib"].items()]
    sizes += [f"| **peak**, at {found['peak_at']} | **{found['peak_gib']}** |", ""]
    return "\n".join([head, *phases, *sizes])


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(words)
    found = [report(plan) for plan in PLANS]
    print(json.dumps(found, indent=1) if options.json else "\n".join(map(markdown, found)))


if __name__ == "__main__":
    main()
