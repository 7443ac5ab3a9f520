"""One launch of the test of texts that ranks part among them: trains each run with texts of its own ranks, and again
with every text on both, and writes what came of them.

accelerate launch --config_file recipes/accelerate/two_processes.yaml -m tests.distributed.parted_worker OUT FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from peft import LoraConfig

from llmdistill import OPDConfig, OPDTrainer, RolloutConfig, TAIDConfig, TAIDTrainer
from llmdistill.models.weights import named_weights
from llmdistill.recipe.launches import leave_group, whole_models
from llmdistill.redi import REDIConfig, REDITrainer
from tests import tiny

# name -> (trainer, config, settings)
RUNS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "opd": (OPDTrainer, OPDConfig, {}),
    "checkpointing, in passes of so many tokens": (
        OPDTrainer,
        OPDConfig,
        {"gradient_checkpointing": True, "batch_tokens": 64, "sequences": "dataset"},
    ),
    "lora, top k": (OPDTrainer, OPDConfig, {"estimator": "top_k", "top_k": 8, "lora": True}),
    "taid": (TAIDTrainer, TAIDConfig, {}),
    "redi": (REDITrainer, REDIConfig, {}),
}
LORA = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def main(out: Path, folder: Path) -> None:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first, for a minute
    results = {}
    for name, run in RUNS.items():
        (alone, losses), (together, parted_losses) = (one_run(folder, *run, size) for size in (1, 2))
        gap = max(float((together[n] - w).abs().max()) for n, w in alone.items())
        results[name] = {"losses": losses, "parted_losses": parted_losses, "gap": gap}
    if int(os.environ.get("RANK", 0)) == 0:
        out.write_text(json.dumps(results))


def one_run(folder: Path, make: Any, config: Any, settings: dict[str, Any], size: int) -> tuple[dict[str, Any], Any]:
    settings = dict(settings)
    peft_config = LoraConfig(**LORA) if settings.pop("lora", False) else None
    if config is not REDIConfig:
        settings["rollouts"] = RolloutConfig(max_new_tokens=10, temperature=0.0)
    args = config(
        output_dir=str(folder / "run"),
        sequence_parallel_size=size,
        max_steps=3,
        logging_steps=1,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        save_strategy="no",
        **settings,
    )
    with whole_models():
        student, teacher = (tiny.llama(seed, attn_implementation="sdpa") for seed in (1, 2))
    rows = tiny.rows(24)
    if config is REDIConfig:
        rows = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": f"no {i}"} for i, r in enumerate(rows)]
        trainer = make(student, args, train_dataset=rows, processing_class=tiny.tokenizer(), peft_config=peft_config)
    else:
        parts: dict[str, Any] = dict(train_dataset=rows, processing_class=tiny.tokenizer(), peft_config=peft_config)
        trainer = make(student, args, teacher, **parts)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {name: tensor.detach().clone() for name, tensor in named_weights(trainer.forward_model())}, losses


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave_group()
