"""Settings of the stages of ``llmdistill.diffusion``, and the method that each names.

``from_ar`` and ``sft`` train a denoiser on the dataset's text; ``distill_ar`` and ``opd`` learn from an autoregressive
teacher. A method is built for a :class:`~llmdistill.diffusion.noised_view.Denoiser`, so a stage's ``build`` takes one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from llmdistill.composition.method import Method
from llmdistill.diffusion import terms
from llmdistill.diffusion.noised_view import Denoiser
from llmdistill.diffusion.noising import Noised, NoiseSettings, Norm, Weighting
from llmdistill.diffusion.own_states import OwnStates
from llmdistill.diffusion.schedules import EPS
from llmdistill.recipe.config import DistillationConfig
from llmdistill.recipe.settings import Conflict, setting
from llmdistill.texts.sources import Only

STAGE_HELP = "from_ar, sft, distill_ar, opd, rl or distill_steps: which settings these are"
ScheduleName = Literal["linear", "log_linear", "cosine", "cosine_mdlm", "cosine_squared", "square", "sqrt", "log"]


@dataclass
class DiffusionConfig(DistillationConfig):
    """Settings that all stages have: what the student is as a denoiser, and how it is sampled and measured."""

    stage: str = setting("sft", STAGE_HELP)
    mask_token: str = setting("", "the mask token; empty: the checkpoint's own, or a new <|mask|>")
    shift: bool | None = setting(
        None, "logits at t - 1 are the token's at t; unset: as the checkpoint was saved, or true of a causal one"
    )
    block_size: int | None = setting(
        None, "attend in blocks of so many tokens; unset: as the checkpoint was saved, or full attention", at_least=1
    )
    writing: dict[str, Any] = setting({}, "of the student's own writing: keys of DiffusionGenerationConfig")
    heldout_masks: int = setting(4, "masks drawn of a held-out sequence for its bound", at_least=1)

    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict(
            lambda s: s.rollouts.engine != "hf",
            "rollouts.engine is {rollout_engine}; a masked diffusion student writes in this process",
            "--rollouts.engine hf",
        ),
    )

    @property
    def rollout_engine(self) -> str:
        return self.rollouts.engine

    @property
    def whole_blocks(self) -> bool:
        """Whether rollouts keep what stands behind an end in its block."""
        return False

    def build(self, denoiser: Denoiser, eos_id: int, *, documents: bool = False) -> Method:
        """The composition these settings name.

        Args:
            eos_id: fills completions.
            documents: the rows are documents, whose end is no end of turn.
        """
        raise NotImplementedError


@dataclass
class NoiseConfig(DiffusionConfig):
    """Settings of masks that are drawn on given text."""

    schedule: ScheduleName = setting("linear", "masked share over time: a schedule of diffusion.schedules")
    weighting: Weighting = setting("elbo", "elbo (-alpha' / (1 - alpha)), uniform, or cart (Dream's)")
    norm: Norm = setting("token", "token, sequence or batch: means over maskable tokens, sequences' means, their sums;")
    low: float = setting(EPS, "least time; low and high are BD3-LM's clipped schedule", above=0, below=1)
    high: float = setting(1.0, "largest time", above=0, at_most=1)
    stratified: bool = setting(True, "times of a batch, and of a sequence's blocks and copies, cover the interval")
    copies: int = setting(1, "noised copies of every sequence in a step", at_least=1)
    anneal_steps: int = setting(0, "steps in which attention turns from causal to full; 0: full at once", at_least=0)
    fill: int | None = setting(
        None, "completions are filled with trained ends to a multiple of so many tokens; unset: block_size", at_least=0
    )

    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict(lambda s: s.low >= s.high, "objective.low is {low} and objective.high {high}", "--low 0.001 --high 1"),
        Conflict(
            lambda s: s.anneal_steps and s.block_size,
            "objective.anneal_steps is {anneal_steps} and objective.block_size {block_size}: attention in blocks has "
            "no way from causal to full",
            "leave one out",
        ),
    )

    def noise(self, denoiser: Denoiser, documents: bool) -> NoiseSettings:
        """As the source of a text takes them."""
        fill = (denoiser.block_size or 0) if self.fill is None else self.fill
        return NoiseSettings(
            self.schedule,
            self.weighting,
            self.norm,
            self.low,
            self.high,
            self.stratified,
            self.copies,
            self.anneal_steps,
            0 if documents else fill,
        )


@dataclass
class SFTConfig(NoiseConfig):
    """Settings of ``stage: sft``: a denoiser is trained on completions; prompts are never masked."""

    unread: ClassVar = ("teacher", "teachers")

    norm: Norm = setting("sequence", "sequence (LLaDA's), token, batch, or masked: what the weighted sum is divided by")

    def build(self, denoiser: Denoiser, eos_id: int, *, documents: bool = False) -> Method:
        source = Noised(Only("dataset"), denoiser, self.noise(denoiser, documents), eos_id)
        return Method((terms.denoising(denoiser.mask_token_id, self.norm),), {"main": source})


@dataclass
class FromARConfig(SFTConfig):
    """Settings of ``stage: from_ar``: a causal model becomes a denoiser on text; its head stays shifted."""

    stage: str = setting("from_ar", STAGE_HELP)
    norm: Norm = setting("token", "token (MDLM's), sequence, batch, or masked: what the weighted sum is divided by")


@dataclass
class ARDistillationConfig(NoiseConfig):
    """Settings of ``stage: distill_ar``: what an autoregressive teacher says of given text, in a form without bias."""

    stage: str = setting("distill_ar", STAGE_HELP)
    targets: Literal["no_suffix", "suffix_corrected", "sequence"] = setting(
        "no_suffix",
        "no_suffix: its distribution where nothing to the right is read, else the text; suffix_corrected: by Bayes, "
        "everywhere; sequence: its text alone",
    )
    sequences: Literal["teacher", "dataset"] = setting("teacher", "whose text: the teacher's, or the dataset's")
    top_k: int = setting(0, "tokens that the teacher lists; 0: its whole distribution", at_least=0)

    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict(
            lambda s: s.targets == "suffix_corrected" and not s.top_k,
            "objective.targets is suffix_corrected, which asks about the likeliest tokens, and objective.top_k is 0",
            "--top_k 16",
        ),
        Conflict(
            lambda s: s.targets == "sequence" and (s.top_k or s.sequences != "teacher"),
            "objective.targets sequence is training on the teacher's text, with objective.sequences {sequences} and "
            "objective.top_k {top_k}",
            "--sequences teacher --top_k 0",
        ),
    )

    def build(self, denoiser: Denoiser, eos_id: int, *, documents: bool = False) -> Method:
        source = Noised(Only(self.sequences), denoiser, self.noise(denoiser, documents), eos_id)
        mask_id = denoiser.mask_token_id
        if self.targets == "sequence":
            return Method((terms.denoising(mask_id, self.norm),), {"main": source})
        term = terms.towards_ar(mask_id, self.targets, top_k=self.top_k, norm=self.norm, labels=True)
        return Method((term,), {"main": source})


@dataclass
class DiffusionOPDConfig(DiffusionConfig):
    """Settings of ``stage: opd``: an autoregressive teacher, on the states that the student itself writes through.

    Written from left to right (the default) all targets are right. In other orders only ``suffix_corrected`` has the
    teacher's law for its fixed point: ``all`` teaches to ignore what stands to the right, and ``no_suffix`` teaches
    nothing where something does. On an exact toy of one block of four tokens in random order ``all`` ends .33 in total
    variation away and .47 nats a block over the bound.
    """

    stage: str = setting("opd", STAGE_HELP)
    block_size: int | None = setting(4, "attend in blocks of so many tokens", at_least=1)
    writing: dict[str, Any] = setting(
        {"order": "sequential"}, "of the student's own writing: keys of DiffusionGenerationConfig"
    )
    targets: terms.Targets = setting(
        "all",
        "all masked tokens (OPDLM's); no_suffix: those behind which nothing is read; suffix_corrected: by Bayes",
    )
    divergence: terms.Divergence = setting("forward_kl", "what is minimised, per token")
    top_k: int = setting(0, "tokens that the teacher lists; 0: its whole distribution", at_least=0)

    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict(
            lambda s: s.block_size is None,
            "objective.block_size is {block_size}; the states of one text are one of each block",
            "--block_size 4",
        ),
        Conflict(
            lambda s: s.targets == "suffix_corrected" and not s.top_k,
            "objective.targets is suffix_corrected, which asks about the likeliest tokens, and objective.top_k is 0",
            "--top_k 16",
        ),
    )

    @property
    def whole_blocks(self) -> bool:
        return True

    def build(self, denoiser: Denoiser, eos_id: int, *, documents: bool = False) -> Method:
        term = terms.towards_ar(
            denoiser.mask_token_id, self.targets, divergence=self.divergence, top_k=self.top_k, norm="token"
        )
        return Method((term,), {"main": OwnStates(Only("student"), denoiser, NoiseSettings(), eos_id)})
