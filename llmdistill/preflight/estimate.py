"""The memory that a run takes on each device, and its bytes over the wire, from the recipe alone: nothing is loaded.

The formula, with h the hidden width, i the width of the MLP that a token goes through, q and k the widths of all query
and of all key heads, L layers, V columns, w the bytes of a number in the maths (2 in bfloat16, else 4):

    weights       P w_P, P the student's parameters and w_P the bytes of one; of an adapter 4 bytes each besides;
                  2 P more for the casts that autocast keeps of float32 weights                      / N under ZeRO-3
    teacher       the same of every model in this process; nothing under ZeRO takes it apart
    optimizer     8 bytes a trained parameter, AdamW's two moments                                   / N from ZeRO-1 on
    gradients     w_P a trained parameter                                                            / N from ZeRO-2 on
    activations   tokens of a micro-batch, padded (objective.batch_tokens bounds them), its part of each sequence, times
                      L (24 h [16 h where the weights are 16 bits, and 2 h of casts] + 4 w (q + i) + w T)
                      + L (w + 4) (q + k) where queries and keys are normalised;
                  with checkpointing 4 h a layer and the whole of one layer; both with 4 w (i + h) that backward holds
    logits chunk  rows of a chunk times V times (2 w + 20), five float32 copies; with the kernels for whole
                  rows on a GPU 3 w; and 4 V h for the gradient of a trained head
    caches        2 L k w a token of what is generated at one time, and 12 V bytes a sequence; vLLM's share of the GPU
    evidence      of a whole round: w h_T a token of a teacher here, else 12 bytes a listed token

Not all of it is there at one time. The peak is weights, teacher, optimizer and vLLM where it does not sleep, and the
largest of: the caches; the teacher's forward pass with the evidence; the evidence, activations and chunk, with the
gradients where they outlive a micro-batch (accumulation, several processes); the gradients. Of a round every sequence
is taken for as long as `data.max_prompt_tokens` and `rollouts.max_new_tokens` allow, so the estimate is of the fullest
step.

Simplified away: the allocator's rounding and fragments (on GPUs some 5 %), CUDA's context (about 0.5 GiB), helper
modules, offloading, FSDP. Held against measured memory by tests/test_estimate.py.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig

from llmdistill.compat.models import auto_class
from llmdistill.models.generation import BATCH_TOKENS
from llmdistill.objectives.streaming import CPU_ROWS, rows_for_memory
from llmdistill.recipe.launches import asks_for_deepspeed, whole_models
from llmdistill.wire.bodies import chosen_bytes

if TYPE_CHECKING:
    from llmdistill.recipe.command_line import Recipe

GIB = 2**30
LOWER = {  # what makes an item smaller
    "weights": "student.lora_r with student.dtype bfloat16, or --config_file recipes/accelerate/zero3.yaml",
    "teacher": "teacher.url (a service elsewhere), or teacher.dtype bfloat16",
    "optimizer": "student.lora_r 16, or --config_file recipes/accelerate/zero2.yaml on several GPUs",
    "gradients": "student.lora_r 16, or --config_file recipes/accelerate/zero2.yaml on several GPUs",
    "activations": "--gradient_checkpointing true, objective.batch_tokens, or a lower per_device_train_batch_size",
    "logits chunk": "a smaller objective.chunk_tokens",
    "caches": "a smaller rollouts.batch_tokens or rollouts.gpu_memory_utilization",
    "teacher's pass": "a smaller teacher.batch_tokens",
    "evidence": "a smaller train.gradient_accumulation_steps, or objective.estimator top_k",
}


@dataclass(frozen=True)
class Shape:
    """What the formula reads of a causal model."""

    parameters: int
    hidden: int
    mlp: int
    queries: int
    keys: int
    layers: int
    columns: int
    normed: bool = False  # queries and keys

    @classmethod
    def of(cls, model: str, revision: str = "", trust_remote_code: bool = False) -> Shape:
        """By a model's config: it is made without weights."""
        return cls.of_config(
            AutoConfig.from_pretrained(model, revision=revision or None, trust_remote_code=trust_remote_code)
        )

    @classmethod
    def of_config(cls, config: Any) -> Shape:
        with whole_models(), torch.device("meta"):  # DeepSpeed would share out what has no weights
            model = auto_class(config).from_config(config)
        text = config.get_text_config()
        heads = text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
        experts = getattr(text, "num_experts_per_tok", None)
        of_expert = getattr(text, "moe_intermediate_size", None)
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            hidden=text.hidden_size,
            mlp=experts * (of_expert or text.intermediate_size) if experts else text.intermediate_size,
            queries=heads * width,
            keys=(getattr(text, "num_key_value_heads", None) or heads) * width,
            layers=text.num_hidden_layers,
            columns=text.vocab_size,
            normed=any(name.endswith("q_norm.weight") for name, _ in model.named_parameters()),
        )

    def activations(self, tokens: int, longest: int, *, wide: bool, bf16: bool, checkpointing: bool) -> int:
        """Bytes that a forward pass over ``tokens`` keeps for its backward; ``wide``: the weights are float32."""
        w = 2 if bf16 or not wide else 4
        normed = (24 if wide else 16) * self.hidden + (2 * self.hidden if bf16 and wide else 0)
        layer = normed + 4 * w * (self.queries + self.mlp) + w * longest
        layer += (w + 4) * (self.queries + self.keys) if self.normed else 0
        kept = (4 if wide else 2) * self.hidden * self.layers + layer if checkpointing else layer * self.layers
        return tokens * (kept + 4 * w * (self.mlp + self.hidden))


@dataclass(frozen=True)
class Estimate:
    """Bytes of each item, of the peak, and of a step over the wire (up, down); 0 where no service is asked."""

    items: dict[str, int]
    peak: int
    at: str  # the part of a step that has the peak
    wire: tuple[int, int] = (0, 0)
    fixed: int = 0  # of the peak: what is there from the first step to the last

    def to_lower(self) -> str:
        """What makes the largest item smaller."""
        return LOWER[max(self.items, key=lambda name: self.items[name])]


def of_recipe(
    recipe: Recipe, *, processes: int = 1, zero: int = 0, device_bytes: int = 0, gpu: bool = False
) -> Estimate:
    """The estimate of a recipe.

    Args:
        processes: that share the student out, by ZeRO's stage ``zero`` (0: DDP).
        device_bytes: of one GPU, for vLLM's share and the size of a chunk.
        gpu: the run is on one.

    Raises:
        OSError, ValueError: a model's config cannot be had.
    """
    s = recipe.student
    student = Shape.of(s.model, s.revision, s.trust_remote_code)
    teachers = [
        (Shape.of(t.model, t.revision, t.trust_remote_code), _bytes(t.dtype), t.batch_tokens)
        for t in recipe.teachers
        if t.model and t.engine == "hf"
    ]
    return of_shapes(
        recipe.args, student, teachers, wide=s.dtype == "float32", lora_r=s.lora_r, recipe=recipe,
        processes=processes, zero=zero, device_bytes=device_bytes, gpu=gpu,
    )  # fmt: skip


def of_shapes(
    args: Any,
    student: Shape,
    teachers: Sequence[tuple[Shape, int, int]],
    *,
    wide: bool = True,
    lora_r: int = 0,
    recipe: Recipe | None = None,
    longest_prompt: int = 0,
    processes: int = 1,
    zero: int = 0,
    device_bytes: int = 0,
    gpu: bool = False,
) -> Estimate:
    """The formula. ``teachers``: shape, bytes of a weight and tokens of a pass, of those in this process."""
    r, w = args.rollouts, 2 if args.bf16 or not wide else 4
    sequences = args.per_device_train_batch_size * r.samples_per_prompt
    prompt = longest_prompt or (recipe.data.max_prompt_tokens if recipe else 0)
    longest = prompt + r.max_new_tokens
    round_sequences = sequences * args.gradient_accumulation_steps
    rows = round_sequences * r.max_new_tokens
    adapter = 2 * lora_r * student.layers * (3 * student.hidden + 2 * student.mlp + student.queries) if lora_r else 0
    trained, of_trained = (adapter, 4) if lora_r else (student.parameters, 4 if wide else 2)
    shared = [processes if zero >= stage else 1 for stage in (1, 2, 3)]
    casts = 2 * student.parameters if args.bf16 and wide else 0
    estimator = getattr(args, "estimator", "full")
    listed = getattr(args, "top_k", 0) if estimator == "top_k" else 1
    here = sum(rows * shape.hidden * of_weight for shape, of_weight, _ in teachers)
    passes = [
        min(batch_tokens, round_sequences * longest) * of_weight * (3 * shape.mlp + 4 * shape.hidden)
        for shape, of_weight, batch_tokens in teachers
    ]
    engine = _engine(args, student, device_bytes) if r.engine == "vllm" else 0
    there = 0 if gpu and r.sleep else engine  # while it sleeps its weights are on the host
    at_once = min(round_sequences, max(1, (r.batch_tokens or BATCH_TOKENS) // longest)) if r.engine == "hf" else 0
    chunk = args.chunk_tokens or _chunk(student.columns, device_bytes, gpu)
    head = 0 if lora_r or getattr(args, "freeze_embeddings", False) else 4 * student.columns * student.hidden
    pass_tokens = sequences * longest  # of one forward pass of the student
    if budget := getattr(args, "batch_tokens", 0):  # which bounds it: a round has more micro-batches then
        pass_tokens = min(pass_tokens, max(longest, budget))
    items = {
        "weights": (student.parameters * (4 if wide else 2) + adapter * 4 + casts) // shared[2],
        "teacher": sum(shape.parameters * of_weight for shape, of_weight, _ in teachers),
        "optimizer": 8 * trained // shared[0],
        "gradients": of_trained * trained // shared[1],
        "activations": student.activations(
            -(-pass_tokens // args.sequence_parallel_size),
            longest,
            wide=wide,
            bf16=bool(args.bf16),
            checkpointing=args.gradient_checkpointing,
        ),
        "logits chunk": min(chunk, pass_tokens)
        * student.columns
        * (3 * w if gpu and estimator == "full" else 2 * w + 20)
        + head,
        "caches": engine + at_once * (longest * 2 * student.layers * student.keys * w + 12 * student.columns),
        "teacher's pass": max(passes, default=0),
        "evidence": here if estimator == "full" and teachers else 12 * listed * rows,
    }
    together = pass_tokens < round_sequences * longest or processes > 1
    phases = {
        "sampling": items["caches"] - there,
        "the teacher's pass": items["teacher's pass"] + items["evidence"],
        "the student's pass": items["evidence"] + items["activations"] + items["logits chunk"]
        + (items["gradients"] if together else 0),
        "the optimizer's step": items["gradients"],
    }  # fmt: skip
    at = max(phases, key=lambda name: phases[name])
    fixed = items["weights"] + items["teacher"] + items["optimizer"] + there
    return Estimate(
        items, fixed + phases[at], at, _wire(recipe, args, rows, round_sequences * longest, student.columns)
    )


def _engine(args: Any, student: Shape, device_bytes: int) -> int:
    """vLLM's: a share of the GPU; on a CPU its copy of the weights and its cache."""
    if device_bytes:
        return int(args.rollouts.gpu_memory_utilization * device_bytes)
    return student.parameters * _bytes(args.rollouts.dtype) + int(args.rollouts.kv_cache_gib * GIB)


def _chunk(columns: int, device_bytes: int, gpu: bool) -> int:
    """As `rows_at_once` has it, of a device that need not be here."""
    return rows_for_memory(columns, device_bytes or 80 * GIB) if gpu else CPU_ROWS


def _wire(recipe: Recipe | None, args: Any, rows: int, tokens: int, columns: int) -> tuple[int, int]:
    """(up, down) of a step: ids and chosen ids to the teacher; score blocks from it."""
    if recipe is None or not any(t.url for t in recipe.teachers):
        return 0, 0
    estimator = getattr(args, "estimator", "full")
    listed = columns if estimator == "full" else args.top_k if estimator == "top_k" else 0
    up = 4 * tokens
    if estimator == "top_k" and getattr(args, "support", "teacher") != "teacher":
        up += chosen_bytes(rows, listed, columns)
    return up, round(rows * block_bytes(listed, columns))


def block_bytes(listed: int, columns: int) -> float:
    """Of a token in a score block in 16 bits (llmdistill.wire.blocks): own log-prob, ids, top, exponent, codes."""
    if listed == 0:
        return 4.0
    ids = 0.0 if listed == columns else listed * (columns - 1).bit_length() / 8
    return 4 + ids + 5 + 2 * (listed if listed == columns else listed - 1)


def _bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def launched_zero() -> int:
    """The stage of ZeRO that the launcher asked for; 0: none."""
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") or 2) if asks_for_deepspeed() else 0
