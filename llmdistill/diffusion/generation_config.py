"""Settings of sampling from a masked diffusion model, with their ranges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from llmdistill.diffusion import orders, schedules, selections
from llmdistill.diffusion.names import named
from llmdistill.errors import UserError
from llmdistill.recipe.settings import Conflict, check_settings, setting
from llmdistill.texts.rollout import Sampling


@dataclass(frozen=True)
class DiffusionGenerationConfig:
    """Settings of :func:`~llmdistill.diffusion.sampling.generate`."""

    max_new_tokens: int = setting(128, "length of the completion; 0 only fills the prompt's masks", at_least=0)
    block_length: int | None = setting(None, "tokens written together, block after block; all", at_least=1)
    denoising_steps: int | None = setting(None, "steps for each block; as many as it has tokens", at_least=1)
    temperature: float = setting(1.0, "divides logits; 0 is greedy", at_least=0)
    top_k: int = setting(0, "only the k likeliest tokens; 0: all", at_least=0)
    top_p: float = setting(1.0, "only the likeliest tokens that have this mass", above=0, at_most=1)
    min_p: float = setting(0.0, "only tokens with this share of the likeliest one's probability", at_least=0, at_most=1)
    cfg_scale: float = setting(0.0, "classifier-free guidance: l_u + (s + 1)(l_c - l_u)", at_least=0)
    order: str = setting("entropy", "which masked token is next: a function of diffusion.orders")
    select: str = setting("quota", "how many a step reveals: a function of diffusion.selections")
    quotas: str = setting("even", "even, or a schedule of diffusion.schedules")
    schedule: str = setting("linear", "of select ancestral")
    threshold: float = setting(0.9, "of select threshold", above=0, at_most=1)
    factor: float = setting(1.0, "of select factor", above=0)
    entropy_bound: float = setting(0.1, "nats, of select entropy_bound", at_least=0)
    cache: str = setting("none", "none; prefix or dual (approximate); block (exact, of block-causal models)")
    stop_at_eos: bool = setting(True, "a sequence whose finished block has an end goes no further")

    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict(
            lambda s: s.cfg_scale > 0 and s.cache != "none", "cfg_scale is {cfg_scale} with a cache", "cache none"
        ),
    )

    def check(self, block_size: int | None) -> None:
        """Raises:
        UserError: a value out of its range, an unknown name, or a cache or block length that does not fit the model.
        """
        check_settings(self, "diffusion")
        named(orders, self.order, "diffusion.order")
        named(selections, self.select, "diffusion.select")
        named(schedules, self.schedule, "diffusion.schedule")
        if self.quotas != "even":
            named(schedules, self.quotas, "diffusion.quotas")
        if self.cache not in ("none", "prefix", "dual", "block"):
            raise UserError(
                f"diffusion.cache is {self.cache!r}; there are none, prefix, dual, block. Fix: --diffusion.cache none."
            )
        if (self.cache == "block") != (block_size is not None) and self.cache != "none":
            kind = "full attention" if block_size is None else f"blocks of {block_size}"
            fix = "prefix, dual or none" if block_size is None else "block or none"
            raise UserError(f"diffusion.cache is {self.cache}, the model has {kind}. Fix: --diffusion.cache {fix}.")
        if block_size is not None and self.block_length not in (None, block_size):
            raise UserError(
                f"diffusion.block_length is {self.block_length}, the model attends in blocks of {block_size}: a block "
                f"would read tokens it never saw in training. Fix: --diffusion.block_length {block_size}."
            )


SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p")  # what a Sampling says


def generation_config(settings: Mapping[str, Any], sampling: Sampling, room: int) -> DiffusionGenerationConfig:
    """Of one batch: sampling as any model has it, and beside it what only diffusion models have.

    Args:
        room: new tokens.

    Raises:
        UserError: a setting that there is not, one that ``sampling`` has, or one of ``sampling`` that means something
            only where tokens are written from left to right.
    """
    for name, value in (("repetition_penalty", sampling.repetition_penalty), ("stop", sampling.stop)):
        if value not in (1, ()):
            shown = list(value) if isinstance(value, tuple) else value
            raise UserError(
                f"rollouts.{name} is {shown}, and a masked diffusion model writes in any order: there is no text "
                "before a token. Fix: leave it out."
            )
    known = [name for name in DiffusionGenerationConfig.__dataclass_fields__ if name not in SAMPLING]
    wrong = sorted(set(settings) - set(known))
    if wrong:
        raise UserError(f"diffusion has {wrong[0]!r}; there are {', '.join(known)}. Fix: leave it out.")
    said: dict[str, Any] = {"max_new_tokens": room, "temperature": sampling.temperature, "top_p": sampling.top_p}
    return DiffusionGenerationConfig(**said, top_k=sampling.top_k, min_p=sampling.min_p, **settings)
