"""One launch of the table of layouts: methods, with LoRA and without, trained by however many processes.

    accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m tests.distributed.layouts_worker OUT CELLS [FROM]

Every cell trains four steps; those in ``CROSSED`` again from the checkpoint after two that each folder FROM, another
launch's OUT, has of it. The first rank writes what every step logged as ``OUT/found.json``, and the weights as
``OUT/CELL-RUN.pt``. Where a cell is one in which a rank fails, every rank writes its error as ``OUT/CELL-RANK.txt``.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import TrainerCallback

from llmdistill import OPDConfig, OPDTrainer, RolloutConfig, TAIDConfig, TAIDTrainer
from llmdistill.compat import fsdp
from llmdistill.errors import UserError
from llmdistill.models.weights import named_weights
from llmdistill.objectives.rows import HiddenRows
from llmdistill.ranks import on_every_rank
from llmdistill.recipe.config import TeacherConfig
from llmdistill.recipe.launches import leave_group
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.placement import placed
from llmdistill.texts import Rollout
from tests.distributed import methods_worker
from tests.distributed.methods_worker import ByRow, Start, lines, two_terms
from tests.distributed.worker import make_model, make_rows, make_tokenizer
from tests.trainer import pair_cases

STEPS, GLOBAL_BATCH, ACCUMULATION, SEED = 4, 8, 2, 3
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
GREEDY = RolloutConfig(engine="vllm", temperature=0, max_new_tokens=8, dtype="float32", kv_cache_gib=0.05)
UNEVEN = {"0": 2, "1": 40}  # tokens that each rank's completions have
BY_VLLM = {"rollouts": GREEDY, "head_dim": 32}  # the smallest that its CPU attention runs


@dataclass(frozen=True)
class Cell:
    make: Callable[..., Any]
    lora: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


class BadTeacher(LocalTeacher):
    """From the third step on its answers are no numbers, on the second rank."""

    step = 0

    def dense(self, rollout: Rollout) -> HiddenRows:
        rows, bad = super().dense(rollout), self.step >= 2 and os.environ.get("RANK", "0") == "1"
        return replace(rows, hidden_NH=rows.hidden_NH * float("nan")) if bad else rows


class Told(TrainerCallback):
    """Tells a teacher how many steps are done."""

    def __init__(self, teacher: Any) -> None:
        self.teacher = teacher

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.teacher.step = state.global_step


def teacher(sharded: bool = False, kind: type[LocalTeacher] = LocalTeacher) -> LocalTeacher:
    model, several = make_model(1, hidden=48, tied=False), int(os.environ.get("WORLD_SIZE", 1)) > 1
    placement = placed(model.requires_grad_(False), torch.device("cpu"), "sharded") if sharded and several else None
    return kind(model, make_tokenizer(), placement=placement)


def lost_teacher(folder: Path) -> LocalTeacher:
    """The second rank finds its file damaged, as on a disk of its own."""
    whole, mine = folder / "teacher", folder / f"teacher-{os.environ.get('RANK', '0')}"
    if os.environ.get("RANK", "0") == "0":
        make_model(1, hidden=48, tied=False).save_pretrained(whole)
        make_tokenizer().save_pretrained(whole)
    on_every_rank(lambda: None)
    shutil.copytree(whole, mine)
    if os.environ.get("RANK") == "1":
        weights = mine / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    return LocalTeacher.load(TeacherConfig(model=str(mine), dtype="float32", placement="sharded"))


def opd(
    common: dict[str, Any],
    lora: Any,
    sharded: bool = False,
    bad: bool = False,
    lost: bool = False,
    prompts: int = 16,
    head_dim: int | None = None,
    **settings: Any,
) -> Any:
    args = OPDConfig(**{"rollouts": RolloutConfig(max_new_tokens=8), **common, **settings})
    lost_or_none = lost_teacher(Path(common["output_dir"])) if lost else None
    judge = lost_or_none or teacher(sharded, BadTeacher if bad else LocalTeacher)
    rows = make_rows(prompts, 5)
    own, tokenizer = student(head_dim), make_tokenizer()
    return OPDTrainer(own, args, judge, train_dataset=rows, processing_class=tokenizer, peft_config=lora)


def taid(common: dict[str, Any], lora: Any) -> Any:
    args, rows = TAIDConfig(t_start=0.2, t_rate=0.3, t_momentum=0.5, **common), make_rows(16, 5)
    return TAIDTrainer(
        student(), args, teacher(), train_dataset=rows, processing_class=make_tokenizer(), peft_config=lora
    )


def redi(common: dict[str, Any], lora: Any) -> Any:
    trainer, tokenizer = pair_cases.REDITrainer, pair_cases.tiny.tokenizer()
    args, rows = pair_cases.REDIConfig(**common), pair_cases.pair_rows(16)
    return trainer(pair_cases.tiny.llama(1), args, train_dataset=rows, processing_class=tokenizer, peft_config=lora)


def several(common: dict[str, Any], lora: Any) -> Any:
    args = methods_worker.DistillationConfig(
        rollouts=RolloutConfig(max_new_tokens=8, samples_per_prompt=2), domain_weights={"a": 0.5, "b": 2.0}, **common
    )
    return methods_worker.DistillationTrainer(
        student(),
        args,
        teacher(),
        method=two_terms(),
        train_dataset=methods_worker.weighed(two_terms()),
        processing_class=make_tokenizer(),
        peft_config=lora,
        data=methods_worker.DATA,
    )


def student(head_dim: int | None = None) -> Any:
    return make_model(0, hidden=32, tied=True, head_dim=head_dim)


CELLS = {
    **{f"{name}{'_lora' if lora else ''}": Cell(make, lora)
       for name, make in {"opd": opd, "taid": taid, "redi": redi, "two_terms": several}.items()
       for lora in (False, True)},
    "sharded_teacher": Cell(opd, settings={"sharded": True}),
    "vllm": Cell(opd, settings=BY_VLLM),
    "vllm_lora": Cell(opd, lora=True, settings=BY_VLLM),
    "uneven": Cell(opd, settings={"rollouts": RolloutConfig(max_new_tokens=max(UNEVEN.values()), ignore_eos=True)}),
    "no_teacher": Cell(opd, settings={"lost": True}),
    "few_prompts": Cell(opd, settings={"prompts": 1}),
    "nan": Cell(opd, settings={"bad": True}),  # after which the ranks are no group any more
}  # fmt: skip
FAILING = ("no_teacher", "few_prompts", "nan")
CROSSED = ("opd", "two_terms_lora")


def trained(name: str, folder: Path, checkpoint: Path | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(what is JSON, the weights in the end) of a cell that is trained from its start, or from a checkpoint."""
    cell, world = CELLS[name], int(os.environ.get("WORLD_SIZE", 1))
    common = dict(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=STEPS // 2,
        save_strategy="no" if name in FAILING else "steps",
        logging_steps=1,
        learning_rate=1e-2,
        adam_epsilon=1e-2,  # Adam divides gradients by their size: where that is rounding, so is the update
        per_device_train_batch_size=GLOBAL_BATCH // ACCUMULATION // world,
        gradient_accumulation_steps=ACCUMULATION,
        chunk_tokens=16,
        seed=SEED,
    )
    trainer = cell.make(common, LORA if cell.lora else None, **cell.settings)
    if "rollouts" not in cell.settings and "student" in trainer.method.uses:
        trainer.rollout_engine = ByRow(eos_ids=trainer.eos_ids, pad_id=trainer.pad_id, ready=trainer._generating)
    if name == "uneven":
        _each_its_length(trainer.rollout_engine)
    begun = Start()
    trainer.add_callback(begun)
    if isinstance(judge := trainer.judges.get("teacher"), BadTeacher):
        trainer.add_callback(Told(judge))
    trainer.train(None if checkpoint is None else str(checkpoint))
    fsdp.shard_again(trainer.model)
    parts = [p.to_local() if fsdp.is_shard(p) else getattr(p, "ds_tensor", p) for p in trainer.model.parameters()]
    weights = {n: t.clone() for n, t in named_weights(trainer.model)}
    trainer.close()
    numbers = {
        "processes": trainer.accelerator.num_processes,
        "began": begun.step,
        "share": sum(p.numel() for p in parts)
        / sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters()),
        "lines": lines(trainer)[begun.step :],
    }
    return numbers, weights


def _each_its_length(engine: Any) -> None:
    """transformers' ``generate`` on ranks that make very different numbers of passes."""
    own, drawn = engine.generate, UNEVEN[os.environ["RANK"]]
    engine.generate = lambda prompts, sampling: own(prompts, replace(sampling, max_new_tokens=drawn))


def main(out: Path, chosen: list[str], others: list[Path]) -> None:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        # Its shared-memory all-reduce would be compiled first, for a minute; gloo's sums are the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    first, found = int(os.environ.get("RANK", 0)) == 0, dict[str, Any]()
    out.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        crossed = {o.name: o / name / f"checkpoint-{STEPS // 2}" for o in others if name in CROSSED}
        runs: dict[str, Path | None] = {"undisturbed": None, **crossed}
        for which, checkpoint in runs.items():
            into = out / (name if checkpoint is None else f"{name}-{which}")
            try:
                found[f"{name}/{which}"], weights = trained(name, into, checkpoint)
            except UserError as error:
                (out / f"{name}-{os.environ.get('RANK', '0')}.txt").write_text(str(error))
                if name == "nan":
                    raise
                continue
            if first:
                torch.save(weights, out / f"{name}-{which}.pt")
                (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), [Path(word) for word in sys.argv[3:]])
    leave_group()
