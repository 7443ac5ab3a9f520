"""PairTrainer: training on pairs of completions, without a teacher. The two sides of a pair share a micro-batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from llmdistill.errors import UserError
from llmdistill.models.heads import forward_to_head, head_of
from llmdistill.recipe.config import DataConfig, DistillationConfig, require
from llmdistill.texts import Rollout
from llmdistill.texts.pairs import BadPairs, Pair, collate_pairs, pair_encoder
from llmdistill.tokenization.special import context_length, pad_id
from llmdistill.training.guard import Guard
from llmdistill.training.pair_losses import PairLoss, PairMeasurement, measure_pairs, pair_loss_at_the_head
from llmdistill.training.student_trainer import StudentTrainer, gathered_count, ready_student, split_evenly

GUARD_STATE = "Guard"  # its place in a checkpoint's trainer_state.json


def setting(default: Any, help: str) -> Any:
    """A field of a recipe's section ``objective``."""
    return field(default=default, metadata={"help": help, "section": "objective"})


@dataclass
class PairConfig(DistillationConfig):
    """Settings of training on pairs. ``per_device_train_batch_size`` counts pairs: twice as many sequences."""

    unread: ClassVar = ("teacher", "teachers", "rollouts")  # sections of a recipe that mean nothing to pairs

    chosen_column: str = setting("chosen", "column with the correct completion: a string or a list of chat messages")
    rejected_column: str = setting("rejected", "column with the wrong completion, likewise")
    max_completion_tokens: int = setting(0, "cut completions after so many tokens; 0: never")
    bad_pairs: BadPairs = setting("error", "skip leaves out rows with an empty side or two sides alike")
    guard_drop: float = setting(0.5, "nats per token log p(chosen) may fall before a warning; 0: not watched")
    guard_rejected_drop: float = setting(2.0, "the same for log p(rejected), which is meant to fall somewhat")
    guard_stop: bool = setting(False, "stop training there")
    guard_window: int = setting(10, "last steps whose mean the guard compares with the first step")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_completion_tokens", "guard_drop", "guard_rejected_drop"):
            require(getattr(self, name) >= 0, f"objective.{name}", getattr(self, name), ">= 0", "use 0")
        require(self.guard_window >= 1, "objective.guard_window", self.guard_window, ">= 1", "use 10")
        if self.guard_stop and not self.guard_drop and not self.guard_rejected_drop:
            raise UserError(
                "objective.guard_stop is true, and objective.guard_drop and guard_rejected_drop 0 watch nothing. "
                "Fix: use 0.5 and 2."
            )


@dataclass
class PairBatch:
    """What one backward pass needs."""

    pairs: list[Pair]
    rollout: Rollout  # [2P, T]: the chosen sequences, then the rejected ones


class PairTrainer(StudentTrainer):
    """Trains ``model`` with a loss over pairs.

    Args:
        model: the student, or a folder or hub name.
        args: a :class:`PairConfig`.
        loss: mean log-probs per token of the chosen and of the rejected sides, [P] each -> scalar mean over pairs.
        train_dataset, eval_dataset: rows with a prompt and two completions, or encoded pairs.
        processing_class: the student's tokenizer; loaded from the model's folder when absent.
        peft_config: trains an adapter instead of the weights.
        data: names of the columns and the limits.
    """

    args: PairConfig
    eval_dataset: list[Pair] | None

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: PairConfig,
        *,
        loss: PairLoss,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[Any] | None = None,
        peft_config: Any = None,
        data: DataConfig | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        model, tokenizer = ready_student(model, processing_class, args, peft_config)
        self.pair_loss, self.pad_id = loss, pad_id(tokenizer)
        self.encoder = pair_encoder(
            tokenizer,
            data or DataConfig(),
            chosen_column=args.chosen_column,
            rejected_column=args.rejected_column,
            max_completion_tokens=args.max_completion_tokens,
            context=context_length(model.config),
            bad_pairs=args.bad_pairs,
        )
        self.guard = Guard(args.guard_drop or math.inf, args.guard_window, args.guard_rejected_drop or math.inf)
        self.step_sums = [0.0, 0.0, 0.0]  # chosen, rejected, pairs of this process since the last optimizer step
        super().__init__(
            model,
            args,
            encode=self.encoder.prompts,
            train_dataset=None if train_dataset is None else self._encoded(train_dataset, "data.train"),
            eval_dataset=None if eval_dataset is None else self._encoded(eval_dataset, "data.heldout"),
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.add_callback(_GuardCallback(self))

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Pair]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """The micro-batches of the next optimizer step, and the global number of its pairs."""
        groups = self._groups(epoch_iterator, num_batches)
        if not groups or self.control.should_training_stop:  # resumed where the guard had stopped: nothing is trained
            return [], None
        # Neighbours in length share a micro-batch: less padding. Ties keep their order, so a step is reproducible.
        pairs = sorted((pair for group in groups for pair in group), key=lambda pair: pair.num_tokens)
        total = gathered_count(self, len(pairs), device)
        return [self._micro_batch(pairs[a:b]) for a, b in split_evenly(len(pairs), len(groups))], total

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum of the pairs' losses over the global number of pairs, times the ranks gradients are averaged over."""
        batch: PairBatch = inputs["micro_batch"]
        head = head_of(self.model)
        found: dict[str, Tensor] = {}

        def at_the_head(hidden_BTH: Tensor) -> Tensor:
            found["loss"], found["means"] = pair_loss_at_the_head(
                hidden_BTH, batch.rollout, head, self.pair_loss, self.args.chunk_tokens
            )
            return found["loss"]

        output = forward_to_head(model, head.linear, batch.rollout, at_the_head)
        total = int(num_items_in_batch if num_items_in_batch is not None else len(batch.pairs))
        loss = self._of_global_batch(found["loss"], output, total)
        chosen, rejected = found["means"].chunk(2)
        if not torch.isfinite(loss):
            known = (chosen - rejected).isfinite().tolist()
            bad = [p.row for p, ok in zip(batch.pairs, known, strict=True) if not ok]
            raise self._not_finite(loss.item(), bad or [p.row for p in batch.pairs])
        if model.training:
            self._note(batch.pairs, chosen.tolist(), rejected.tolist())
        return (loss, None) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The metrics of training on held-out pairs, as ``{prefix}_redi/…`` with ``…_low`` and ``…_high``, the bounds
        of the 95 % interval over pairs; and ``{prefix}_loss``."""
        pairs = self.eval_dataset if eval_dataset is None else self._encoded(eval_dataset, "eval_dataset")
        if not pairs:
            raise UserError("evaluate() needs held-out pairs. Fix: --data.heldout FILE, or pass eval_dataset.")
        measured = self.measure_heldout(pairs[: self.args.heldout_sequences])
        loss = self.pair_loss(torch.tensor(measured.chosen), torch.tensor(measured.rejected)).item()
        results = {f"{metric_key_prefix}_redi/{k}": v for k, v in measured.flat().items()}
        results[f"{metric_key_prefix}_loss"] = loss
        self.log(dict(results))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, results)
        return results

    def measure_heldout(self, pairs: Sequence[Pair]) -> PairMeasurement:
        """See :func:`~llmdistill.texts.pairs.measure_pairs`."""
        return measure_pairs(self, pairs, pad_id=self.pad_id, chunk_tokens=self.args.chunk_tokens)

    def _micro_batch(self, pairs: list[Pair]) -> dict[str, Any]:
        rollout = collate_pairs(pairs, self.pad_id).to(self.args.device)
        # input_ids beside the micro-batch: transformers counts tokens and FLOPs by that key.
        return {"micro_batch": PairBatch(pairs, rollout), "input_ids": rollout.input_ids}

    def _note(self, pairs: list[Pair], chosen: list[float], rejected: list[float]) -> None:
        won = sum(a > b for a, b in zip(chosen, rejected, strict=True))
        for name, total in {
            "chosen_logp": sum(chosen),
            "rejected_logp": sum(rejected),
            "margin": sum(chosen) - sum(rejected),
            "accuracy": won,
            "chosen_length": sum(len(p.chosen) for p in pairs),
            "rejected_length": sum(len(p.rejected) for p in pairs),
        }.items():
            self.meters.add(f"redi/{name}", total, len(pairs))
        for i, value in enumerate((sum(chosen), sum(rejected), len(pairs))):
            self.step_sums[i] += value

    def _encoded(self, rows: Any, source: str) -> list[Pair]:
        if isinstance(rows, list) and rows and isinstance(rows[0], Pair):
            return rows
        return self.encoder.encode_all(rows, source)


class _GuardCallback(TrainerCallback):
    """Feeds the guard once per optimizer step, and keeps its state in ``trainer_state.json``: the last file of a
    checkpoint to be written, so that there is no checkpoint with one and without the other."""

    def __init__(self, trainer: PairTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.guard.load_state_dict(state.stateful_callbacks.get(GUARD_STATE))
        self.trainer.step_sums = [0.0, 0.0, 0.0]
        if self.trainer.guard.fired_at is not None and args.guard_stop:
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        t, guard = self.trainer, self.trainer.guard
        sums = torch.tensor(t.step_sums, dtype=torch.float32, device=args.device)
        chosen, rejected, pairs = t.accelerator.reduce(sums, "sum").tolist()
        t.step_sums = [0.0, 0.0, 0.0]
        if fallen := guard.observe(chosen / pairs, rejected / pairs, state.global_step):
            for side in fallen if state.is_world_process_zero else ():
                guard.warn(side, args.guard_stop)
            if args.guard_stop:
                control.should_training_stop = control.should_log = True
                control.should_save = args.save_strategy != "no"
        state.stateful_callbacks[GUARD_STATE] = guard.state_dict()
        t.meters.add("redi/chosen_fall", guard.fall)
        t.meters.add("redi/rejected_fall", guard.rejected_fall)
