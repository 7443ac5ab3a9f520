"""StudentTrainer: what training a student needs whatever it learns from. transformers.Trainer underneath.

Subclasses make the micro-batches of an optimizer step in ``get_batch_samples``, all at once: so the count that a loss
is divided by, of the *global* batch, is known before the first backward pass, and gradients do not depend on how the
batch was split over micro-batches and processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback, set_seed

from llmdistill.compat import trainers
from llmdistill.composition.batch import MicroBatch
from llmdistill.models.adapters import adapted
from llmdistill.models.causality import check_causal
from llmdistill.models.heads import check_head
from llmdistill.models.loading import named_student
from llmdistill.models.packing import can_be_packed, layout_of
from llmdistill.models.parted import RanksOfAText, parted
from llmdistill.models.saving import check_savable, save_in_parts
from llmdistill.models.unused import freeze_unused
from llmdistill.ranks import on_every_rank
from llmdistill.recipe.config import DistillationConfig
from llmdistill.record.meters import Meters, peak_memory_gib
from llmdistill.record.run_folder import RunFolder, RunFolderCallback
from llmdistill.teachers.local import embedded
from llmdistill.texts import Rollout
from llmdistill.texts.batches import Passes, split_evenly
from llmdistill.texts.prompts import PromptEncoder
from llmdistill.training.finite import FiniteTrainer

KEEPS_WHOLE = "zero_optimization.stage3_gather_16bit_weights_on_model_save"  # what zero3_save_16bit_model becomes


def ready_student(
    model: str | PreTrainedModel,
    processing_class: PreTrainedTokenizerBase | None,
    args: DistillationConfig,
    peft_config: Any = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The student as it is trained (loaded, frozen in part, with its adapter), and its tokenizer. It has been saved
    once, into nothing.

    Raises:
        UserError: for a model object without a tokenizer, and for a student that cannot be saved.
    """
    student, processing_class = named_student(model, processing_class)
    if args.freeze_embeddings:
        freeze_embeddings(student)
    if peft_config is not None:
        set_seed(args.seed)  # the adapter's start is random
        student = adapted(student, peft_config)
    check_savable(student, processing_class, writes=args.should_save)
    freeze_unused(student)
    if args.gradient_checkpointing and hasattr(student, "enable_input_require_grads"):
        student.enable_input_require_grads()
    return student, processing_class


def freeze_embeddings(model: PreTrainedModel) -> None:
    """Trains neither the input embeddings nor the output head."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.requires_grad_(False)  # type: ignore[union-attr]


class StudentTrainer(FiniteTrainer):
    """Trains ``model``, records the run, and says where a loss stopped being a number.

    Args:
        model, processing_class: of :func:`ready_student`.
        encode: how prompts became tokens.
        train_dataset, eval_dataset: encoded examples; they stay examples until a whole round of them is there.
    """

    loss_is_scaled_for_ga = True  # what compute_loss returns is already divided by the global count
    ranks_of_a_text: RanksOfAText | None = None  # that train on every sequence together
    # Narrower than transformers declares them.
    args: DistillationConfig
    model: PreTrainedModel

    def __init__(
        self,
        model: PreTrainedModel,
        args: DistillationConfig,
        *,
        encode: PromptEncoder,
        train_dataset: Sequence[Any] | None,
        eval_dataset: Sequence[Any] | None,
        processing_class: PreTrainedTokenizerBase,
        callbacks: list[Any] | None,
        optimizers: tuple[Any, Any],
    ) -> None:
        self.encode, self.step_counts = encode, True
        self.run_folder, self.meters = RunFolder(args.output_dir or "runs/default"), Meters()
        super().__init__(
            model=model,  # type: ignore[arg-type]
            args=args,
            data_collator=list,  # type: ignore[arg-type]
            train_dataset=train_dataset,  # type: ignore[arg-type]
            eval_dataset=eval_dataset,  # type: ignore[arg-type]
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.remove_callback(PrinterCallback)  # RunFolderCallback shows the same, readably
        size = args.per_device_train_batch_size * args.rollouts.samples_per_prompt
        self.passes = Passes(size, args.batch_tokens, self._most, args.packing)
        self._run_folder_callback = RunFolderCallback(self.run_folder, self.meters)
        self.add_callback(self._run_folder_callback)
        self.add_callback(_AroundSteps(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            self._run_folder_callback.stop()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers' own; of a student that FSDP2 or ZeRO-3 shards, whole weights, file by file. A checkpoint has
        the parts: under FSDP2, and under ZeRO-3 where ``zero3_save_16bit_model`` is false, nothing else."""
        plugin = self.args.deepspeed_plugin
        zero3 = plugin is not None and plugin.zero_stage == 3
        if not (zero3 or self.is_fsdp_enabled and not _internal_call):
            super().save_model(output_dir, _internal_call)
        elif not _internal_call or plugin.hf_ds_config.get_value(KEEPS_WHOLE, False):
            folder = Path(output_dir or self.args.output_dir or ".")
            save_in_parts(self.model, folder, self.processing_class, main_process=self.is_world_process_zero())

    def as_inputs(self, batches: Sequence[MicroBatch], parts: int) -> list[dict[str, Any]]:
        """What transformers' loop takes for a micro-batch, ``parts`` times; each may be several of ours in a row."""
        found = []
        for a, b in split_evenly(len(batches), parts):
            first, *others = batches[a:b]
            read = [_tokens_read(batch.rollout) for batch in batches[a:b]]
            tokens = torch.cat([ids.flatten() for ids in read]) if others else read[0]
            # transformers counts tokens and FLOPs by the key "input_ids"
            found.append({"micro_batch": first, "others": others, "input_ids": tokens})
        return found

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        batches = [inputs["micro_batch"], *inputs.get("others", ())]
        # Weight decay and momentum would move the weights of a step that says nothing.
        self.step_counts = batches[0].counts
        # DeepSpeed takes the step itself, with the last backward pass.
        still = _at_rate_zero(self.optimizer) if self.is_deepspeed_enabled and not self.step_counts else nullcontext()
        losses = list[Tensor]()
        with still, self.meters.timed("time/student", 1 / self.current_gradient_accumulation_steps):
            for k, batch in enumerate(batches):
                more = trainers.more_passes(self.accelerator, model) if k + 1 < len(batches) else nullcontext()
                with more, parted(self.model, self.ranks_of_a_text):
                    losses.append(super().training_step(model, {"micro_batch": batch}, *args, **kwargs))
        return torch.stack(losses).sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what was measured since the last line."""
        if "loss" in logs:
            logs.update(self.meters.flush(self.accelerator))
            logs["memory/peak_gib"] = peak_memory_gib()
        super().log(logs, start_time)

    def forward_model(self) -> nn.Module:
        """The student to run: DeepSpeed's engine puts sharded parameters together, everything else is the model."""
        return self.model_wrapped if self.is_deepspeed_enabled else self.model

    def _most(self, count: Callable[[], int]) -> int:
        """The most that ``count()`` is on any rank; an error on one of them is everybody's."""
        own = on_every_rank(count)
        if self.accelerator.num_processes == 1:
            return own
        return int(self.accelerator.gather(torch.tensor([own], device=self.args.device)).max())  # type: ignore[union-attr]

    def _groups(self, epoch_iterator: Iterator[list[Any]], num_batches: int) -> list[list[Any]]:
        """The examples of the next optimizer step, a list for each micro-batch. None: there is no such step."""
        if self._all_steps_done():
            return []
        return list(islice(epoch_iterator, num_batches))


def _tokens_read(rollout: Rollout) -> Tensor:
    """Ids that go through the model: [B, T] with their padding, or where they are packed [T]."""
    return rollout.input_ids[rollout.attention_mask] if rollout.packed else rollout.input_ids


@contextmanager
def _at_rate_zero(optimizer: Any) -> Iterator[None]:
    """An optimizer at whose steps no weight moves."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


class _AroundSteps(TrainerCallback):
    """Looks at what can only be looked at when the student is ready to run: where ZeRO-3 shards it, its head and
    the way it reads. Takes the gradients of a step in which nothing counted away."""

    def __init__(self, trainer: StudentTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        check_head(self.trainer.model, self.trainer.forward_model())
        both_ways = getattr(self.trainer, "denoiser", None) is not None
        if self.trainer.passes.packed:
            layout_of(self.trainer.model, self.trainer.forward_model(), both_ways=both_ways)
        if not both_ways:
            check_causal(self.trainer.model, self.trainer.forward_model())
            for judge in getattr(self.trainer, "judges", {}).values():
                if isinstance(judged := getattr(judge, "model", None), PreTrainedModel):
                    with getattr(judge, "present", nullcontext)():
                        check_causal(judged, judged)
                for teacher in embedded(judge) if self.trainer.passes.packed else ():
                    with teacher.present():
                        teacher.packs = can_be_packed(teacher.model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.step_counts and not self.trainer.is_deepspeed_enabled:
            for parameter in self.trainer.model.parameters():
                parameter.grad = None


def gathered_sums(trainer: Trainer, numbers: list[float], device: torch.device) -> list[float]:
    """Each of ``numbers`` summed over the processes."""
    if trainer.accelerator.num_processes == 1:
        return numbers
    local = torch.tensor(numbers, device=device, dtype=torch.float64)
    return trainer.accelerator.reduce(local, "sum").tolist()  # type: ignore[union-attr,no-any-return]
