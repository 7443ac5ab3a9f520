"""One launch of the test of vLLM beside training in several processes: trains from an engine a rank, and from one that
the ranks hold together.

accelerate launch --config_file recipes/accelerate/two_processes.yaml -m tests.distributed.engine_worker OUT FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from llmdistill import OPDConfig, OPDTrainer, RolloutConfig
from llmdistill.recipe.launches import leave_group, whole_models
from tests import tiny

# name -> settings of the rollouts; all train two steps
RUNS: dict[str, dict[str, Any]] = {
    "an engine a rank": {},
    "one engine": {"tensor_parallel_size": 2},
    "one engine, adapter merged": {"tensor_parallel_size": 2, "lora": "merged"},
    "one engine, adapter alone": {"tensor_parallel_size": 2, "lora": "adapter"},
}
LORA = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def main(out: Path, folder: Path) -> None:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first, for a minute
    results = {name: one_run(folder / name.replace(" ", "-"), settings) for name, settings in RUNS.items()}
    if int(os.environ.get("RANK", 0)) == 0:
        out.write_text(json.dumps(results))


def one_run(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    adapted = "lora" in settings
    args = OPDConfig(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        ddp_backend="gloo",
        rollouts=RolloutConfig(engine="vllm", dtype="float32", max_new_tokens=12, kv_cache_gib=0.05, **settings),
    )
    base = folder.with_name("base")
    with args.main_process_first(), whole_models():
        if args.process_index == 0:
            tiny.llama(1, hidden=64).save_pretrained(base)
        teacher = tiny.llama(2, hidden=64)
    peft_config = LoraConfig(**LORA) if adapted else None
    trainer = OPDTrainer(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args,
        teacher,
        train_dataset=tiny.rows(16, completion=False),
        processing_class=tiny.tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    trainer.rollout_engine.close()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return {
        "processes": trainer.accelerator.num_processes,
        "losses": [line["loss"] for line in lines],
        "lengths": [line["rollout/mean_length"] for line in lines],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave_group()
