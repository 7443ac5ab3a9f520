"""PairTrainer: the one loop on pairs of completions, without a teacher; its guard, and its held-out measurement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from llmdistill.composition.loss import Result
from llmdistill.composition.method import Method
from llmdistill.composition.term import Term
from llmdistill.models.loading import named_student
from llmdistill.recipe.config import DistillationConfig
from llmdistill.recipe.data_config import DataConfig
from llmdistill.recipe.settings import Conflict, setting
from llmdistill.texts.pair import Pair, RejectedTokens
from llmdistill.texts.pairs import BadPairs, PairEncoder, Side, pair_encoder
from llmdistill.texts.streams import ExampleStream, are_examples, at_hand, has_length, spans_of, to_measure
from llmdistill.tokenization.special import also_end_at, context_length, pad_id
from llmdistill.training.guard import Guard
from llmdistill.training.pair_losses import PairLoss, PairMeans, PairMeasurement, measure_pairs
from llmdistill.training.trainer import DistillationTrainer

GUARD_STATE = "Guard"  # its place in a checkpoint's trainer_state.json


@dataclass
class PairConfig(DistillationConfig):
    """Settings of training on pairs. ``per_device_train_batch_size`` counts pairs: twice as many sequences."""

    unread: ClassVar = ("teacher", "teachers", "rollouts")  # sections of a recipe that mean nothing to pairs

    chosen_column: str = setting("chosen", "column with the correct completion: a string or a list of chat messages")
    rejected_column: str = setting("rejected", "column with the wrong completion, likewise")
    max_completion_tokens: int = setting(0, "cut completions after so many tokens; 0: never", at_least=0)
    bad_pairs: BadPairs = setting("error", "skip leaves out rows with an empty side or two sides alike")
    rejected_tokens: RejectedTokens = setting(
        "all",
        "of the rejected side the loss pushes down: all, after_divergence (from where it parts from the chosen one), "
        "or first_divergent (that token alone); divided by the whole side's length",
    )
    guard_drop: float = setting(
        0.5, "nats per token log p(chosen) may fall before a warning; 0: not watched", at_least=0
    )
    guard_rejected_drop: float = setting(
        2.0, "the same for log p(rejected), which is meant to fall somewhat", at_least=0
    )
    guard_stop: bool = setting(False, "stop training there")
    guard_window: int = setting(10, "last steps whose mean the guard compares with the first step", at_least=1)

    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict(
            lambda s: s.guard_stop and not s.guard_drop and not s.guard_rejected_drop,
            "objective.guard_stop is true, and objective.guard_drop and guard_rejected_drop 0 watch nothing",
            "use 0.5 and 2",
        ),
        Conflict(
            lambda s: s.mixture_every,
            "objective.mixture_every is {mixture_every}, and pairs have no teacher that a student could be behind",
            "leave it out",
        ),
        Conflict(
            lambda s: s.domain_weights,
            "objective.domain_weights is {domain_weights}, and a loss of pairs, and what is fine-tuned before it, is a "
            "mean that reads no weights",
            "leave it out",
        ),
    )

    def encoder(self, tokenizer: PreTrainedTokenizerBase, data: DataConfig, context: int) -> PairEncoder:
        """What reads rows as these settings say."""
        names = ("chosen_column", "rejected_column", "max_completion_tokens", "bad_pairs", "rejected_tokens")
        return pair_encoder(tokenizer, data, context=context, **{name: getattr(self, name) for name in names})


def pair_method(loss: PairLoss, pad: int, rejected_tokens: RejectedTokens = "all") -> Method:
    """One term over the texts ``chosen`` and ``rejected``."""
    texts = {name: Side(name, pad, rejected_tokens) for name in ("chosen", "rejected")}
    return Method((Term("pairs", group=PairMeans(loss), reads=("tokens",), text=("chosen", "rejected")),), texts)


class PairTrainer(DistillationTrainer):
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

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: PairConfig,
        *,
        loss: PairLoss,
        processing_class: PreTrainedTokenizerBase | None = None,
        data: DataConfig | None = None,
        **kwargs: Any,
    ) -> None:
        model, processing_class = named_student(model, processing_class)
        self.encoder = args.encoder(processing_class, data or DataConfig(), context_length(model.config))
        self.guard = Guard(args.guard_drop or math.inf, args.guard_window, args.guard_rejected_drop or math.inf)
        self.step_sums = [0.0, 0.0, 0.0]  # chosen, rejected, pairs of this process since the last optimizer step
        method = pair_method(loss, pad_id(processing_class), args.rejected_tokens)
        super().__init__(model, args, method=method, processing_class=processing_class, data=data, **kwargs)
        self.encode = self.encoder.prompts  # which has read the rows
        self.eos_ids = also_end_at(self.model, processing_class, self.encode.ends)
        self.pair_loss = loss
        self.add_callback(_GuardCallback(self))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The metrics of training on held-out pairs, as ``{prefix}_redi/…`` with ``…_low`` and ``…_high``, the bounds
        of the 95 % interval over pairs; and ``{prefix}_loss``."""
        pairs = self._to_evaluate(eval_dataset, "pairs")
        results = self._measured(to_measure(pairs, self.args.heldout_sequences), metric_key_prefix)
        for name, span in spans_of(pairs).items():  # beside what all of them come to
            results.update(self._measured(pairs[span], f"{metric_key_prefix}_{name}"))
        self.log(dict(results))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, results)
        return results

    def _measured(self, pairs: Sequence[Pair], prefix: str) -> dict[str, float]:
        found = self.measure_heldout_pairs(pairs)
        loss = self.pair_loss(torch.tensor(found.chosen), torch.tensor(found.penalised)).item()
        return {**{f"{prefix}_redi/{k}": v for k, v in found.flat().items()}, f"{prefix}_loss": loss}

    def measure_heldout_pairs(self, pairs: Sequence[Pair]) -> PairMeasurement:
        """See :func:`~llmdistill.training.pair_losses.measure_pairs`."""
        args = self.args
        return measure_pairs(
            self, pairs, pad_id=self.pad_id, chunk_tokens=args.chunk_tokens, rejected_tokens=args.rejected_tokens
        )

    def _log_groups(self, result: Result) -> None:
        super()._log_groups(result)
        (term,) = result.terms.values()
        chosen, pairs = term.group_sums["redi/chosen_logp"]
        rejected, _ = term.group_sums["redi/rejected_logp"]
        for i, value in enumerate((chosen, rejected, pairs)):
            self.step_sums[i] += value

    def _encoded(self, rows: Any, encode: Any, heldout: bool = False) -> Sequence[Any]:
        if are_examples(rows, Pair):
            return rows  # type: ignore[no-any-return]
        if not has_length(rows) and not heldout:
            return self._streamed(rows, encode)  # type: ignore[return-value]
        return self.encoder.encode_all(rows, "data.heldout" if heldout else "data.train")

    def _streamed(self, rows: Any, encode: Any) -> ExampleStream:
        skipped, where = dict[str, list[int]](), getattr(rows, "where", None)
        of_row = partial(self.encoder.of_row, source="data.train", skipped=skipped, where=where)
        return ExampleStream(rows, of_row)

    def _preflight(self) -> None:
        pairs = at_hand(self.train_dataset)
        if pairs and isinstance(pairs[0], Pair):
            self._examine_once((type(self.model).__name__, "pairs"))


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
