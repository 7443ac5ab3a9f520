"""Trainers of masked diffusion students: thin doors over the one loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmdistill.compat import zero3
from llmdistill.compat.models import generation_ready
from llmdistill.composition.method import Method
from llmdistill.diffusion.backbone import MaskedDiffusionLM
from llmdistill.diffusion.heldout import measure
from llmdistill.diffusion.noised_view import Denoiser
from llmdistill.diffusion.rollouts import DiffusionRollouts
from llmdistill.diffusion.stages import DiffusionConfig
from llmdistill.diffusion.suffix_judge import SuffixCorrected
from llmdistill.errors import UserError
from llmdistill.models.loading import named_student
from llmdistill.recipe.data_config import DataConfig
from llmdistill.texts import Prompt, Rollout
from llmdistill.texts.prompts import PromptEncoder
from llmdistill.texts.streams import are_examples, at_hand
from llmdistill.tokenization.special import eos_ids, pad_id
from llmdistill.training.measure import Measurement
from llmdistill.training.trainer import DistillationTrainer


class MaskedDiffusionTrainer(DistillationTrainer):
    """Trains ``model``, any causal language model, as a masked diffusion model.

    ``args`` are settings of a stage: :class:`~llmdistill.diffusion.stages.SFTConfig`, ``FromARConfig``, … The model is
    made bidirectional, and given a mask token where it has none; ``MaskedDiffusionLM.from_pretrained`` of what is saved
    is the denoiser. ``method`` goes before the one that ``args`` name.

    Example::

        trainer = MaskedDiffusionTrainer("student", SFTConfig(output_dir="run"), train_dataset=rows)
        trainer.train()

    Raises:
        UserError: a model that cannot look both ways, text that has the mask token in it, and what
            :class:`~llmdistill.training.trainer.DistillationTrainer` raises.
    """

    args: DiffusionConfig  # type: ignore[assignment]
    heldout_losses: ClassVar = ("bound/nats",)

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: DiffusionConfig,
        teacher: Any = None,
        *,
        method: Method | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data: DataConfig | None = None,
        **kwargs: Any,
    ) -> None:
        model, processing_class = named_student(model, processing_class)
        self.denoiser = as_denoiser(model, processing_class, args)
        self.written_for_heldout: tuple[list[list[int]], Rollout] | None = None  # prompts, and what the teacher wrote
        ends = eos_ids(model, processing_class)
        if method is None:
            documents = bool(data and data.text_column)
            method = args.build(self.denoiser, _fills(processing_class, ends), documents=documents)
        engine = DiffusionRollouts(
            self.denoiser,
            args.writing,
            eos_ids=ends,
            pad_id=pad_id(processing_class),
            ready=lambda student: generation_ready(student, self.accelerator),
            whole_blocks=args.whole_blocks,
            batch_tokens=args.rollouts.batch_tokens,
        )
        kwargs.setdefault("rollout_engine", engine)
        super().__init__(model, args, teacher, method=method, processing_class=processing_class, data=data, **kwargs)
        engine.eos_ids = tuple(self.eos_ids)
        datasets: list[Any] = [self.train_dataset, self.eval_dataset]
        for prompts in datasets:
            check_no_mask_token(at_hand(prompts), self.denoiser.mask_token_id)

    def measure_heldout(self, prompts: Sequence[Any]) -> dict[str, Measurement]:
        """See :func:`~llmdistill.diffusion.heldout.measure`."""
        return measure(self, prompts)

    def _sound(self, examples: list[Any]) -> list[Any]:
        check_no_mask_token(examples, self.denoiser.mask_token_id)
        return examples

    def _encoded(self, rows: Any, encode: PromptEncoder, heldout: bool = False) -> Sequence[Any]:
        """Held-out rows are measured on their own completions wherever they have some, whatever is trained on."""
        read = are_examples(rows, Prompt)
        if heldout and not read and all(encode.turns.has_answer(row) for row in rows):
            return encode.encode_all(rows, completions=True)
        return super()._encoded(rows, encode, heldout)


class ARDistillationTrainer(MaskedDiffusionTrainer):
    """Distils an autoregressive ``teacher`` into a masked diffusion student, on given text or on its own states.

    ``args`` are :class:`~llmdistill.diffusion.stages.ARDistillationConfig` or ``DiffusionOPDConfig``.

    Raises:
        UserError: no teacher, or one that cannot be asked what the settings want of it.
    """

    def __init__(self, model: Any, args: DiffusionConfig, teacher: Any = None, **kwargs: Any) -> None:
        if teacher is None:
            raise UserError(f"stage {args.stage} learns from a teacher, and there is none. Fix: --teacher.model MODEL.")
        super().__init__(model, args, teacher, **kwargs)
        if getattr(args, "targets", "") == "suffix_corrected":
            self.judges["teacher"] = SuffixCorrected(self.judges["teacher"])  # type: ignore[arg-type]


def as_denoiser(model: Any, tokenizer: PreTrainedTokenizerBase, args: DiffusionConfig) -> Denoiser:
    """Makes a model a denoiser in place, its mask token included, and says how it reads.

    Raises:
        UserError: what :class:`~llmdistill.diffusion.backbone.MaskedDiffusionLM` raises; a new mask token for a model
            that ZeRO-3 holds in shards.
    """
    sharded = any(zero3.is_sharded(p) for p in model.parameters())
    if sharded and getattr(model.config, "mask_token_id", None) is None and tokenizer.mask_token_id is None:
        raise UserError(
            "the student has no mask token, and ZeRO-3 holds it in shards: a new one cannot be put in. Fix: save a "
            "denoiser first (MaskedDiffusionLM.from_pretrained(MODEL), then save_pretrained), and train that."
        )
    made = MaskedDiffusionLM.of(
        model,
        tokenizer,
        mask_token=args.mask_token or None,
        shift=args.shift,
        block_size=args.block_size,
        probe=not sharded,
    )
    return Denoiser(made.mask_token_id, made.shift, made.block_size)


def check_no_mask_token(prompts: Sequence[Any], mask_id: int) -> None:
    """Raises:
    UserError: a row has the mask token in its clean text: a word that can never be predicted.
    """
    if hasattr(prompts, "rows_with"):
        rows = prompts.rows_with(mask_id)
    else:
        rows = [p.row for p in prompts if isinstance(p, Prompt) and mask_id in {*p.ids, *p.completion}]
    if rows:
        raise UserError(
            f"row {rows[0]} has the mask token (id {mask_id}) in its text ({len(rows)} such rows). Fix: remove it from "
            "the data, or another objective.mask_token."
        )


def _fills(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> int:
    """What completions are filled with: the tokenizer's own end, where the student stops at it."""
    own = tokenizer.eos_token_id
    return int(own if own is not None and (own in ends or not ends) else ends[0] if ends else pad_id(tokenizer))
