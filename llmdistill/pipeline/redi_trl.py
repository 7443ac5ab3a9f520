"""The stages of ``llmdistill.redi`` that TRL trains: fine-tuning (stage 1, and ``sft``) and ``dpo``.

On the very tokens of the pairs, in a run folder like those of our trainers, and with what theirs lack: a loss that is
no number stops at its step with its rows named, and a stage that is resumed at its end trains nothing more.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from datasets import Dataset, Features, Value, concatenate_datasets
from torch import Tensor, nn
from transformers import TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from llmdistill.methods.redi_config import REDIConfig
from llmdistill.models.adapters import fitted
from llmdistill.models.saving import check_savable
from llmdistill.models.unused import freeze_unused
from llmdistill.pipeline.stage import Stage
from llmdistill.recipe.lora import changes_base, lora_config
from llmdistill.recipe.settings import require
from llmdistill.record.meters import Meters, peak_memory_gib
from llmdistill.record.run_folder import RunFolder, RunFolderCallback
from llmdistill.texts import Prompt
from llmdistill.texts.pair import Pair
from llmdistill.texts.pairs import collate_pairs
from llmdistill.tokenization.special import pad_id
from llmdistill.training.finite import FiniteTrainer
from llmdistill.training.student_trainer import freeze_embeddings

TOKENS = [Value("int64")]
PART = 1000  # pairs that are Python objects at one time


class _TRLTrainer(FiniteTrainer):
    """Before a trainer of TRL's among its bases. Its rows have their number in the dataset in ``row``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.data_collator = _with_rows(self.data_collator)  # type: ignore[assignment]

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        if self._all_steps_done():
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        rows, inputs = inputs["rows"], {k: v for k, v in inputs.items() if k != "rows"}
        found: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = found[0] if return_outputs else found
        if model.training and not torch.isfinite(loss):
            raise self._not_finite(loss.item(), rows.tolist())
        return found


class _FineTuning(_TRLTrainer, SFTTrainer):
    rate = "objective.stage1_learning_rate"


class _DirectPreference(_TRLTrainer, DPOTrainer):
    pass


def _with_rows(collate: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    def collator(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        # Last: what looks for the size of a batch reads the first tensor.
        return {**collate(rows), "rows": torch.tensor([row["row"] for row in rows])}

    return collator


def fine_tuning(stage: Stage, positives: Sequence[Pair]) -> SFTTrainer:
    """Stage 1, on the very tokens that stage 2 would see."""
    args = stage.args
    # Where a stage 2 follows, these are of that one.
    later = {} if args.method == "sft" else {"eval_strategy": "no", "load_best_model_at_end": False}
    config = SFTConfig(
        **_shared(
            args,
            stage.folder,
            learning_rate=args.stage1_learning_rate,
            num_train_epochs=args.stage1_epochs,
            max_steps=args.stage1_steps or -1,
            per_device_train_batch_size=args.stage1_batch_size,
            gradient_accumulation_steps=args.stage1_accumulation,
            **later,
        ),
        completion_only_loss=True,
        max_length=None,
    )
    trainer = _FineTuning(
        _prepared(stage),
        config,
        train_dataset=_chosen_sides(positives),
        eval_dataset=_chosen_sides(stage.heldout) if stage.heldout and not later else None,
        **_trl_extras(stage),
    )
    return _checked(trainer, stage)


def direct_preference(stage: Stage, pairs: Sequence[Pair]) -> DPOTrainer:
    """DPO against the student as it is now. TRL tokenises what it is given; the collator hands it our own tokens."""
    args = stage.args
    assert args.beta is not None
    init = stage.recipe.student.init_lora_weights
    moved = stage.recipe.student.lora_r > 0 and changes_base(init)
    needed = "true for dpo, whose reference is the model below the adapter"
    require(not moved, "student.init_lora_weights", init, needed, "leave it out")
    config = DPOConfig(
        **_shared(args, stage.folder),
        beta=args.beta,
        max_length=None,
        trust_remote_code=stage.recipe.student.trust_remote_code,
    )
    padding = pad_id(stage.tokenizer)

    def collator(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = collate_pairs([_pair(row) for row in rows], padding)
        return {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask.long(),
            "completion_mask": batch.completion_mask.long(),
        }

    trainer = _DirectPreference(
        _prepared(stage),
        args=config,
        data_collator=collator,
        train_dataset=_as_dataset(pairs),
        eval_dataset=_as_dataset(stage.heldout) if stage.heldout else None,
        **_trl_extras(stage),
    )
    return _checked(trainer, stage)


def _chosen_sides(pairs: Sequence[Pair]) -> Dataset:
    rows = (
        {
            "input_ids": [*p.prompt.ids, *p.chosen],
            "completion_mask": [0] * len(p.prompt.ids) + [int(c) for c in p.chosen_counts or [True] * len(p.chosen)],
            "row": p.row,
        }
        for p in pairs
    )
    return _in_arrow(rows, {"input_ids": TOKENS, "completion_mask": TOKENS, "row": Value("int64")})


def _as_dataset(pairs: Sequence[Pair]) -> Dataset:
    """A placeholder for TRL's own tokenisation, and beside it the tokens that are trained on."""
    words = {"prompt": "=", "chosen": "+", "rejected": "-"}
    rows = (
        {
            **{**words, "row": p.row, "ids": p.prompt.ids},
            **{"chosen_tokens": p.chosen, "rejected_tokens": p.rejected},
            **{"chosen_counts": p.chosen_counts, "rejected_counts": p.rejected_counts},
        }
        for p in pairs
    )
    kinds: dict[str, Any] = {**dict.fromkeys(words, Value("string")), "row": Value("int64")}
    kinds |= dict.fromkeys(("ids", "chosen_tokens", "rejected_tokens"), TOKENS)
    return _in_arrow(rows, kinds | dict.fromkeys(("chosen_counts", "rejected_counts"), [Value("bool")]))


def _in_arrow(rows: Iterable[dict[str, Any]], kinds: dict[str, Any]) -> Dataset:
    """The rows as a table in memory; a part of them at a time are Python objects."""
    rows, features = iter(rows), Features(kinds)
    parts = list[Dataset]()
    while part := list(islice(rows, PART)):
        parts.append(Dataset.from_list(part, features=features))
    return concatenate_datasets(parts)


def _pair(row: dict[str, Any]) -> Pair:
    chosen, rejected = (tuple(row[f"{side}_tokens"]) for side in ("chosen", "rejected"))
    counts = (tuple(row[f"{side}_counts"]) for side in ("chosen", "rejected"))
    return Pair(Prompt(row["ids"], ""), chosen, rejected, 0, *counts)


def _prepared(stage: Stage) -> Any:
    if stage.args.freeze_embeddings:
        freeze_embeddings(stage.model)
    return stage.model


def _checked(trainer: Any, stage: Stage) -> Any:
    """What :func:`~llmdistill.training.student_trainer.ready_student` looks at, where TRL puts the adapter on."""
    trainer.args.restart_optimizer = stage.args.restart_optimizer
    check_savable(trainer.model, stage.tokenizer, writes=stage.args.should_save)
    freeze_unused(trainer.model)
    return trainer


def _shared(args: REDIConfig, folder: RunFolder, **own: Any) -> dict[str, Any]:
    """The settings of ``train`` for a config of TRL's, which is a TrainingArguments too."""
    names = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    values = {k: v for k, v in args.to_dict().items() if k in names}
    return {**values, "output_dir": str(folder.path), **own}


def _trl_extras(stage: Stage) -> dict[str, Any]:
    config = lora_config(stage.recipe.student)
    return {"processing_class": stage.tokenizer, "peft_config": config and fitted(config, stage.model)}


class TRLCallback(RunFolderCallback):
    """The run folder of a trainer of TRL's, with the times and the memory that ours measure themselves."""

    def __init__(self, folder: RunFolder) -> None:
        super().__init__(folder, Meters())
        self.step_began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_began = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meters.add("time/student", time.perf_counter() - self.step_began)
        super().on_pre_optimizer_step(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            logs = {**logs, **self.meters.flush(), "memory/peak_gib": peak_memory_gib()}
        super().on_log(args, state, control, logs=logs, **kwargs)
