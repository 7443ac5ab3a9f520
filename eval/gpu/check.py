"""What one GPU says of llmdistill, in less than eight minutes: are the kernels right, what do they cost, and does the
doctor's estimate hold.

    python eval/gpu/check.py > check.json          # torch, transformers, accelerate, peft and this checkout
    python eval/gpu/check.py --tiny                # the same on a CPU, in seconds, to see that it runs

Prints JSON:

- ``kernels``: every divergence by Triton's kernels against the PyTorch formula in float64, value and gradient, relative
  to the largest number, over odd shapes and dtypes with columns at -inf.
- ``head``: a pass through the vocabulary projection, loss and gradients, at 8,192 rows x hidden 4,096 x 128,256 columns
  in bfloat16: whole rows in PyTorch without chunks, then the engine by each road. For orientation, from an H100:
  Liger's fused JSD 60.7 ms and 11.1 GB, torch 213 ms and 68.9 GB.
- ``step``: optimizer steps of a 0.6B-shaped student (random weights) under a 1.7B-shaped teacher on texts of 4,096
  tokens; seconds, tokens a second, and peak memory beside the estimate.

What fails or does not fit is an "error" in its place, and what the time did not allow is left out and named.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import accelerate
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from llmdistill.objectives import divergences
from llmdistill.objectives.accelerated import KERNELS
from llmdistill.objectives.streaming import rows_at_once, streamed

GIB = 2**30
ROADS = ("pytorch", "compile", "triton")
LOSSES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": divergences.forward_kl,
    "reverse_kl": divergences.reverse_kl,
    "jsd": divergences.jsd,
    "skew_forward_kl": divergences.skew_forward_kl,
    "skew_reverse_kl": divergences.skew_reverse_kl,
    "total_variation": divergences.total_variation,
    "triangular": partial(divergences.f_divergence, name="triangular"),
    "jeffreys": partial(divergences.f_divergence, name="jeffreys_sum"),
    "pearson_chi2": partial(divergences.f_divergence, name="pearson_chi2"),
}


class Shapes:
    """Of a GPU, or tiny."""

    def __init__(self, tiny: bool) -> None:
        self.odd = [(3, 257), (5, 5_001)] if tiny else [(3, 257), (7, 5_001), (64, 151_936)]
        self.head = (24, 8, 300) if tiny else (8_192, 4_096, 128_256)  # rows, hidden, columns
        self.repeats = 1 if tiny else 5
        self.tokens = 48 if tiny else 4_096
        # hidden, MLP, layers, heads, key heads, columns
        self.student = (32, 64, 2, 2, 1, 264) if tiny else (1_024, 3_072, 28, 16, 8, 151_936)
        self.teacher = (48, 96, 2, 2, 1, 264) if tiny else (2_048, 6_144, 28, 16, 8, 151_936)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What one GPU says of llmdistill.")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on a CPU")
    parser.add_argument("--seconds", type=float, default=420.0, help="begin nothing new after so many")
    parser.add_argument("--roads", nargs="+", default=None, choices=ROADS, help="of the head [all; tiny: pytorch]")
    options = parser.parse_args(argv)
    if not (options.tiny or torch.cuda.is_available()):
        print("error: there is no GPU. Fix: --tiny, which only shows that this runs.", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.tiny else "cuda")
    shapes, began = Shapes(options.tiny), time.monotonic()
    roads = options.roads or (("pytorch",) if options.tiny else ROADS)
    parts: dict[str, Callable[[], Any]] = {
        "kernels": lambda: kernels(shapes, device),
        **{f"head {road}": partial(head, road, shapes, device) for road in ("whole rows", *roads)},
        "step": lambda: step(shapes, device),
    }
    result: dict[str, Any] = {"machine": machine(device), "left_out": []}
    for name, part in parts.items():
        if time.monotonic() - began > options.seconds:
            result["left_out"].append(name)
            continue
        print(f"… {name}", file=sys.stderr, flush=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result[name] = part()
            except Exception as error:
                result[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
        said = [str(w.message) for w in caught if KERNELS in str(w.message)]
        if said:
            result[name]["warned"] = said
        if device.type == "cuda":
            torch.cuda.empty_cache()
    result["seconds"] = round(time.monotonic() - began, 1)
    print(json.dumps(result, indent=1))
    return 0


def machine(device: torch.device) -> dict[str, Any]:
    found = {"torch": torch.__version__, "cuda": torch.version.cuda, "transformers": transformers.__version__}
    found |= {"accelerate": accelerate.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def kernels(shapes: Shapes, device: torch.device) -> dict[str, Any]:
    """The largest difference of every divergence, over shapes and dtypes; None where no kernel ran."""
    found: dict[str, Any] = {}
    for name, loss in LOSSES.items():
        worst = {"value": 0.0, "gradient_float32": 0.0, "gradient_bfloat16": 0.0}
        for rows, columns in shapes.odd:
            for dtype in (torch.float32, torch.bfloat16):
                torch.manual_seed(rows)
                student, teacher = (torch.randn(rows, columns, device=device).mul_(3).to(dtype) for _ in range(2))
                student[:, ::7], teacher[:, ::7] = -torch.inf, -torch.inf
                os.environ[KERNELS] = "auto"
                value, gradient = value_and_gradient(loss, student, teacher)
                os.environ[KERNELS] = "pytorch"
                exact, exact_gradient = value_and_gradient(loss, student.double(), teacher.double())
                difference = relative(gradient, exact_gradient)
                key = f"gradient_{str(dtype).removeprefix('torch.')}"
                worst["value"] = max(worst["value"], relative(value, exact))
                worst[key] = max(worst[key], difference)
        # A float32 sum, and a gradient in its dtype's last place; total variation's jumps where both sides agree.
        limits = {"value": 1e-4, "gradient_float32": 1e-3, "gradient_bfloat16": 1 / 64}
        found[name] = {**worst, "right": all(worst[key] < limit for key, limit in limits.items())}
    os.environ[KERNELS] = "auto"
    return found


def value_and_gradient(loss: Callable[..., Tensor], student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.detach().requires_grad_()
    value = loss(leaf, teacher)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def head(road: str, shapes: Shapes, device: torch.device) -> dict[str, Any]:
    """Seconds and memory of one pass, forward and backward, for the JSD and the reverse KL."""
    rows, width, columns = shapes.head
    os.environ[KERNELS] = "pytorch" if road == "whole rows" else road
    made = dict(device=device, dtype=torch.bfloat16)
    torch.manual_seed(0)
    student, teacher = (nn.Linear(width, columns, bias=False, **made) for _ in range(2))
    hidden = torch.randn(rows, width, **made).requires_grad_()
    teacher_hidden = torch.randn(rows, width, **made)
    found: dict[str, Any] = {"chunk_rows": rows if road == "whole rows" else rows_at_once(columns, device)}
    for name, loss in (("jsd", divergences.jsd), ("reverse_kl", divergences.reverse_kl)):

        def once(loss: Callable[..., Tensor] = loss) -> Tensor:
            hidden.grad = student.weight.grad = None
            if road == "whole rows":
                with torch.no_grad():
                    expected = teacher(teacher_hidden)
                total = loss(student(hidden), expected).sum()
            else:
                total, _ = streamed(loss, hidden, student, (teacher_hidden, teacher))
            total.backward()
            return total.detach()

        once()  # compiles
        peak, before = start_peak(device), now(device)
        seconds = [timed(once, device) for _ in range(shapes.repeats)]
        found[name] = {
            "ms": round(1e3 * statistics.median(seconds), 2),
            "gib": None if peak is None else round((torch.cuda.max_memory_allocated() - before) / GIB, 2),
            "loss": float(once()) / rows,
        }
    os.environ[KERNELS] = "auto"
    return found


def start_peak(device: torch.device) -> bool | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    return True


def now(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def timed(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def step(shapes: Shapes, device: torch.device) -> dict[str, Any]:
    """Three optimizer steps on texts that are there; the first, which compiles, is left out of the time."""
    from llmdistill import DataConfig, OPDConfig, OPDTrainer, RolloutConfig
    from llmdistill.preflight.estimate import Shape, of_shapes

    student, teacher = (config(shape) for shape in (shapes.student, shapes.teacher))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = [{"prompt": "Say:", "completion": "x" * (shapes.tokens - 16)} for _ in range(6)]
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        args = OPDConfig(
            output_dir=folder,
            max_steps=3,
            per_device_train_batch_size=1,
            gradient_checkpointing=True,
            learning_rate=1e-6,
            sequences="dataset",
            save_strategy="no",
            logging_steps=100,
            use_cpu=device.type == "cpu",
            rollouts=RolloutConfig(max_new_tokens=shapes.tokens - 16),
        )
        before, _ = now(device), start_peak(device)
        with device:
            models = Qwen3ForCausalLM(student), Qwen3ForCausalLM(teacher).to(dtype)
        data = DataConfig(max_prompt_tokens=16)
        parts = dict(train_dataset=rows, processing_class=tokenizer(), data=data, preflight=False)
        trainer = OPDTrainer(models[0], args, models[1], **parts)
        trainer.add_callback(clock(ends))
        trainer.train()
        there = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
        estimate = of_shapes(
            args,
            Shape.of_config(student),
            [(Shape.of_config(teacher), dtype.itemsize, 16_384)],
            longest_prompt=16,
            device_bytes=there,
            gpu=device.type == "cuda",
        )
    seconds = statistics.median(b - a for a, b in zip(ends, ends[1:], strict=False))
    return {
        "seconds": round(seconds, 3),
        "tokens_a_second": round(shapes.tokens / seconds),
        "peak_gib": round((torch.cuda.max_memory_allocated() - before) / GIB, 2) if there else None,
        "estimated_gib": round(estimate.peak / GIB, 5),
        "estimate": {name: round(size / GIB, 5) for name, size in estimate.items.items()},
    }


def config(shape: tuple[int, ...]) -> Qwen3Config:
    hidden, mlp, layers, heads, keys, columns = shape
    return Qwen3Config(
        vocab_size=columns,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=128 if hidden >= 1_024 else 16,
        max_position_embeddings=8_192,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte: the text only has to have a length."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(["<pad>", "<eos>", *letters])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def clock(ends: list[float]) -> transformers.TrainerCallback:
    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    return Clock()


if __name__ == "__main__":
    sys.exit(main())
