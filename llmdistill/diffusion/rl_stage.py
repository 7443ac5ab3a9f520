"""Settings of ``stage: rl``, and the method they name: rewards of what the student wrote, on the states it wrote it in.

With one update a text, the default, the ratio of TraceRL's surrogate is 1 and its clip is never reached: what is left
of it is minus the advantage times the log-prob, whose gradient this is.

Two policies may hold the student back, each by k3 at the tokens it drew: the one that wrote the text (``beta``, of
TraceRL's, with several updates), and the student as it began (``reference_beta``, of diffu-GRPO's).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from llmdistill.composition.method import Method
from llmdistill.composition.term import Ask, Hidden, Mean, Term
from llmdistill.diffusion.losses import without_mask_token
from llmdistill.diffusion.noised_view import Denoiser
from llmdistill.diffusion.orders import entropies
from llmdistill.diffusion.policy import clipped_surrogate, kl_estimate
from llmdistill.diffusion.reinforced import Reinforced, ReturnsOf, RewardSettings
from llmdistill.diffusion.repeated import Repeated
from llmdistill.diffusion.slicers import SliceSettings
from llmdistill.diffusion.stages import DiffusionConfig
from llmdistill.diffusion.value import ValueHead
from llmdistill.recipe.settings import PENALISED, Conflict, setting
from llmdistill.texts.sources import Only

LAST = -1  # the student's layer that values are read off


@dataclass
class DiffusionRLConfig(DiffusionConfig):
    """Settings of ``stage: rl``: TraceRL (arXiv 2509.06949), and its baselines by another slicer."""

    unread: ClassVar = ("teacher", "teachers")

    stage: str = setting("rl", "from_ar, sft, rl, distill_ar, opd or distill_steps: which settings these are")
    reward: str = setting("", "math, choice, or a function as package.module:name with TRL's signature")
    process_reward: str = setting("", "a function likewise, that returns a number for each token of a completion")
    slicing: Literal["trace", "random", "coupled", "full"] = setting(
        "trace", "states that log-probs are taken in: those of the sampler, or drawn anew: see diffusion.slicers"
    )
    shrink: int = setting(1, "steps of the sampler that become one slice", at_least=1, read_by={"slicing": ("trace",)})
    prompt_share: float = setting(
        0.0, "share of a prompt that is masked too", at_least=0, below=1, read_by={"slicing": ("full",)}
    )
    keep_low: float = setting(0.2, "groups are left out whose mean reward is below", at_least=0)
    keep_high: float = setting(0.8, "or above")
    scale_rewards: bool = setting(True, "rewards of a group are divided by their deviation, not only centred")
    updates: int = setting(1, "optimizer steps on one text; the prompts of those between are passed over", at_least=1)
    clip: float = setting(0.2, "bound on the ratio's distance from 1, of several updates", above=0)
    beta: float = setting(0.0, "weight of the KL to the policy that wrote the text, of several updates", at_least=0)
    reference_beta: float = setting(
        0.0,
        "weight of the KL to the student as training began (0.04 in diffu-GRPO); 0: none, as in TraceRL",
        at_least=0,
    )
    mean: Mean = setting("token", "the loss is a mean over tokens, over slices of theirs (sequence), or their sums'")
    value: bool = setting(False, "a value head is trained, and its values are subtracted step by step")
    value_learning_rate: float = setting(1e-3, "of the value head", above=0, read_by={"value": (True,)})
    gamma: float = setting(1.0, "discount of a step", above=0, at_most=1)
    lam: float = setting(1.0, "lambda of the advantages by steps", at_least=0, at_most=1)

    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict(
            lambda s: s.rollouts.samples_per_prompt < 2,
            "rollouts.samples_per_prompt is {samples}; rewards are compared within the samples of a prompt",
            "--rollouts.samples_per_prompt 8",
        ),
        Conflict(
            lambda s: s.keep_low > s.keep_high,
            "objective.keep_low is {keep_low} and objective.keep_high {keep_high}: no group is kept",
            "--keep_low 0.2 --keep_high 0.8",
        ),
        Conflict(
            lambda s: (s.value or s.process_reward) and s.slicing != "trace",
            "objective.slicing is {slicing}; values and rewards of steps are of the steps that the sampler took",
            "--slicing trace",
        ),
        Conflict(
            lambda s: s.value and s.updates > 1,
            "objective.value is true and objective.updates {updates}: values are of fresh text",
            "--updates 1",
        ),
        Conflict(
            lambda s: s.beta and s.updates == 1,
            "objective.beta is {beta}, and with one update a text the student is who wrote it: the KL is 0",
            "--updates 4, or leave beta out",
        ),
        Conflict(
            lambda s: s.process_reward and not s.value,
            "objective.process_reward is {process_reward!r} without objective.value: nothing is subtracted from it",
            "--value true",
        ),
        Conflict(
            lambda s: s.rollouts.temperature == 0,
            "rollouts.temperature is 0; the samples of a prompt would all be the same",
            "--rollouts.temperature 1",
        ),
        PENALISED,
    )

    @property
    def samples(self) -> int:
        return self.rollouts.samples_per_prompt

    @property
    def whole_blocks(self) -> bool:
        return True

    def build(self, denoiser: Denoiser, eos_id: int, *, documents: bool = False) -> Method:
        slices = SliceSettings(self.shrink, self.prompt_share)
        settings = RewardSettings(
            self.slicing, slices, self.keep_low, self.keep_high, self.scale_rewards, self.gamma, self.lam
        )
        source = Reinforced(Only("student"), denoiser, settings, self.rollouts.max_new_tokens)
        if self.updates > 1:
            weights = (self.clip, self.beta, self.reference_beta)
            term = surrogate(denoiser.mask_token_id, self.mean, *weights, recorded=True)
            return Method((term,), {"main": Repeated(source, self.updates)})
        term = surrogate(denoiser.mask_token_id, self.mean, reference_beta=self.reference_beta)
        if not self.value:
            return Method((term,), {"main": source})
        value = Term("value", None, (), ("noise_weight",), "values", hidden=Hidden(value_loss, (LAST,), ()))
        return Method(
            (term, value),
            {"main": source, "values": ReturnsOf(source)},
            helpers={"value": lambda hidden, _: ValueHead(hidden)},
            helper_learning_rate=self.value_learning_rate,
        )


def surrogate(
    mask_id: int,
    mean: Mean = "token",
    clip: float = 0.2,
    beta: float = 0.0,
    reference_beta: float = 0.0,
    *,
    recorded: bool = False,
) -> Term:
    """Minus the clipped ratio times the advantage, a row's weight, and the KLs to who wrote the text and to the
    reference, per row.

    Both are k3 at sampled tokens, in the slice's own state, as TraceRL's and diffu-GRPO's are (arXiv 2504.12216,
    equation 3): their value is in expectation KL(student || other), their gradient that of KL(other || student).

    ``recorded``: log-probs of the text's first update are there; else this is that update.
    """

    def loss(student_logits: Tensor, *evidence: Tensor) -> Tensor:
        heard, (tokens, advantages, *recorded_logps) = evidence[:asked], evidence[asked:]
        logps = _logps(student_logits, tokens, mask_id)
        before = recorded_logps[0] if recorded_logps else logps.detach()
        value = -clipped_surrogate(logps, before, advantages, eps=clip)
        if beta:
            value = value + beta * kl_estimate(logps, before)
        if heard:
            value = value + reference_beta * kl_estimate(logps, _logps(heard[0], tokens, mask_id))
        return value

    def entropy(student_logits: Tensor, *_: Tensor) -> Tensor:
        return entropies(without_mask_token(student_logits, mask_id).float().log_softmax(-1))

    asks = (Ask("reference"),) if reference_beta else ()
    asked, reads = len(asks), ("tokens", "noise_weight", *(("behavior",) if recorded else ()))
    return Term("policy", loss, asks, reads, mean=mean, measures={"entropy": entropy}, vanishes=False, on_student=True)


def _logps(logits: Tensor, tokens: Tensor, mask_id: int) -> Tensor:
    """Of the tokens [n], from logits [n, V] without the mask token's column."""
    return without_mask_token(logits, mask_id).float().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def value_loss(states: Sequence[Tensor], *evidence: Tensor, helpers: Mapping[str, nn.Module]) -> Tensor:
    """(V - R)^2 / 2 of every row, [n]; the student's states are read, not trained."""
    (returns,) = evidence
    values: Any = helpers["value"](states[0].detach())
    return 0.5 * torch.square(values - returns)
