"""One launch of the test of denoisers in several processes: the stages' first steps, and the second half again from a
checkpoint.

    accelerate launch --config_file recipes/accelerate/two_processes.yaml -m tests.distributed.diffusion_worker FOLDER

The first rank writes ``FOLDER/out.json`` (losses by case and run) and ``FOLDER/CASE.pt`` (weights, whole).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from llmdistill import RolloutConfig
from llmdistill.diffusion import (
    DiffusionRLConfig,
    DiffusionRLTrainer,
    MaskedDiffusionLM,
    StepDistillationConfig,
    StepDistillationTrainer,
)
from llmdistill.diffusion.stages import DiffusionOPDConfig, FromARConfig, SFTConfig
from llmdistill.diffusion.trainers import ARDistillationTrainer, MaskedDiffusionTrainer
from llmdistill.models.weights import named_weights
from llmdistill.recipe.launches import leave_group, whole_models
from llmdistill.texts import Prompt, Rollout, Sampling, request_seed
from tests import tiny

STEPS, GLOBAL_BATCH = 4, 8
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
# Advantages cancel in many weights' gradients, of which rounding is then all: Adam would make a whole step of its sign.
NO_SIGNS = {"adam_epsilon": 1e-2}
# case -> (settings class, settings): what two processes must train as one.
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "full attention": (FromARConfig, {"anneal_steps": 3, "copies": 2, "norm": "sequence"}),
    "blocks, adapter": (SFTConfig, {"block_size": 3, "lora": True}),
    "own states": (DiffusionOPDConfig, {}),
    "fewer steps": (StepDistillationConfig, {"first_step": 0.25, "rounds": 2, "round_steps": 2}),
    "rewards": (DiffusionRLConfig, {"keep_low": 0.0, "keep_high": 1.0, "shrink": 2, "reference_beta": 0.05} | NO_SIGNS),
}
TRAINERS = {
    DiffusionOPDConfig: ARDistillationTrainer,
    DiffusionRLConfig: DiffusionRLTrainer,
    StepDistillationConfig: StepDistillationTrainer,
}
WRITING = ("own states", "rewards")


def made(folder: Path, case: str, processes: int) -> Any:
    """The trainer of a case."""
    config, settings = CASES[case]
    settings = dict(settings)
    peft_config = LoraConfig(**LORA) if settings.pop("lora", False) else None
    args = config(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=GLOBAL_BATCH // 2 // processes,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
        max_grad_norm=0.0,
        seed=3,
        rollouts=RolloutConfig(max_new_tokens=6, samples_per_prompt=4 if case == "rewards" else 1),
        **settings,
    )
    with whole_models():
        student, teacher = tiny.llama(1, tied=case != "rewards"), tiny.llama(2)
    tokenizer = tiny.tokenizer()
    MaskedDiffusionLM.of(student, tokenizer)  # ZeRO-3 has no place for a new mask token
    rows = tiny.rows(20)
    of_reward: dict[str, Any] = {}
    if case == "rewards":
        student.lm_head.weight.data[1] *= 1.6  # it ends now and then
        of_reward = {"reward": is_even}
    t = TRAINERS.get(config, MaskedDiffusionTrainer)(
        student,
        args,
        teacher if case == "own states" else None,
        train_dataset=rows[:16],
        eval_dataset=rows[16:19],  # two processes share three
        processing_class=tokenizer,
        peft_config=peft_config,
        preflight=False,
        **of_reward,
    )
    if case in WRITING:
        t.rollout_engine.generate = partial(by_row, t.rollout_engine)
    return t


def is_even(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(ord, text)) % 2 == 0) for text in completions]


def by_row(engine: Any, prompts: Sequence[Prompt], sampling: Sampling) -> Rollout:
    """What the engine writes with seeds of the rows and not of ranks: any number of processes writes the same."""
    every = [(p, j) for p in prompts for j in sampling.numbers]
    seeds = [request_seed(engine.policy_version, p.row, j) for p, j in every]
    found: Rollout = engine.write([p for p, _ in every], sampling, seeds)
    return found


def one_case(folder: Path, case: str, processes: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Losses undisturbed and resumed after two steps, what is measured at the end, and the weights that came of it."""
    t = made(folder, case, processes)
    t.train()
    found: dict[str, Any] = {"undisturbed": losses(t), "heldout": t.evaluate()}
    weights = {name: tensor.detach().float().cpu().clone() for name, tensor in named_weights(t.forward_model())}
    again = made(folder, case, processes)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    found["resumed"] = losses(again)
    return found, weights


def losses(t: Any) -> list[float]:
    return [line["loss"] for line in t.state.log_history if "loss" in line]


def main(folder: Path) -> None:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first, for a minute
    processes, results = int(os.environ.get("WORLD_SIZE", "1")), {}
    for case in CASES:
        results[case], weights = one_case(folder / case.replace(" ", "-"), case, processes)
        if int(os.environ.get("RANK", "0")) == 0:
            torch.save(weights, folder / f"{case}.pt")
    if int(os.environ.get("RANK", "0")) == 0:
        (folder / "out.json").write_text(json.dumps(results))
    leave_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
