"""One launch of the test of students in several processes: trains small ones of other classes and says what came of it.

accelerate launch --config_file recipes/accelerate/two_processes.yaml -m tests.distributed.students_worker OUT FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from llmdistill import OPDConfig, OPDTrainer, UserError
from llmdistill.models.heads import head_of
from llmdistill.models.loading import load_model
from llmdistill.models.weights import named_weights
from llmdistill.pipeline.run import check_saved, save_student
from llmdistill.recipe.config import StudentConfig
from llmdistill.recipe.launches import leave_group, whole_models
from llmdistill.record.run_folder import RunFolder
from tests import tiny
from tests.students.architectures import small
from tests.students.multimodal import wrapped

LORA = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
# name -> (student, settings); all train two steps, the second of which counts nothing. From disk: as a recipe loads it,
# in shards from the start under ZeRO-3. Alone: only the adapter is saved.
STUDENTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "image-text": (lambda seed: wrapped("gemma3", seed), {"gradient_checkpointing": True}),
    "image-text lora": (lambda seed: wrapped("gemma3", seed), {"gradient_checkpointing": True, "lora": True}),
    "mixture lora": (lambda seed: small("qwen3_moe", seed), {"lora": True}),
    "image-text from disk": (lambda seed: wrapped("gemma3", seed), {"from_disk": True}),
    "adapter alone": (lambda seed: tiny.llama(seed), {"from_disk": True, "lora": True, "saved_as": "adapter"}),
    "parted": (lambda seed: tiny.llama(seed, attn_implementation="sdpa"), {"sequence_parallel_size": 2}),
    "scaled head": (lambda seed: small("hyperclovax", seed, logits_scaling=3.0), {}),
}


def main(out: Path, folder: Path) -> None:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first, for a minute
    results = {name: one_run(folder / name.replace(" ", "-"), *STUDENTS[name]) for name in STUDENTS}
    if int(os.environ.get("RANK", 0)) == 0:
        out.write_text(json.dumps(results))


def one_run(folder: Path, make: Any, settings: dict[str, Any]) -> dict[str, Any]:
    settings = dict(settings)
    peft_config = LoraConfig(**LORA) if settings.pop("lora", False) else None
    from_disk, saved_as = settings.pop("from_disk", False), settings.pop("saved_as", "merged")
    args = OPDConfig(
        output_dir=str(folder),
        sequences="dataset",
        max_steps=2,
        logging_steps=1,
        learning_rate=0.01,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        per_device_train_batch_size=2,
        save_strategy="no",
        **settings,
    )
    with whole_models():
        student, teacher = make(0), make(1)
    tokenizer = tiny.tokenizer()
    if from_disk:
        stored = str(folder) + "-stored"
        with args.main_process_first():
            if args.process_index == 0:
                student.save_pretrained(stored)
                tokenizer.save_pretrained(stored)
        student, _ = load_model(stored, "float32", "student")
    trainer = OPDTrainer(
        student, args, teacher, train_dataset=tiny.rows(8), processing_class=tokenizer, peft_config=peft_config
    )
    seen: list[dict[str, torch.Tensor]] = []
    draw = type(trainer).draw

    def drawn(examples: Any) -> Any:
        seen.append({name: tensor.detach().clone() for name, tensor in named_weights(trainer.forward_model())})
        texts = draw(trainer, examples)
        if len(seen) == 2:
            texts = {name: replace(text, rollout=uncounted(text.rollout)) for name, text in texts.items()}
        return texts

    trainer.draw = drawn  # type: ignore[method-assign]
    trainer.train()
    after = dict(named_weights(trainer.forward_model()))
    save_student(trainer, RunFolder(folder), StudentConfig(saved_as=saved_as, lora_r=2 if saved_as == "adapter" else 0))
    towers = [name for name in after if "vision_tower" in name]
    return {
        "trained": any(not torch.equal(seen[0][name], seen[1][name]) for name in after),
        "still": all(torch.equal(seen[1][name], tensor) for name, tensor in after.items()),
        "towers": all(torch.equal(seen[0][name], after[name]) for name in towers) and len(towers),
        "saved": check_saved(trainer, RunFolder(folder), []),
        "scale": head_of(trainer.model).logit_scale,
        "processes": trainer.accelerator.num_processes,
        "sharded": any(hasattr(p, "ds_id") for p in trainer.model.parameters()),
    }


def uncounted(rollout: Any) -> Any:
    return replace(rollout, completion_mask=torch.zeros_like(rollout.completion_mask))


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except UserError as error:
        sys.exit(str(error))
    leave_group()
