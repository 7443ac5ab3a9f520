"""Several updates on one text: slices are kept, with the log-probs they had when they were made.

From the second update on the student is not who wrote the text, so the surrogate's ratio leaves 1 and is clipped
(TraceRL, arXiv 2509.06949, section 3.2; diffu-GRPO takes 12 updates, arXiv 2504.12216). Masks that were drawn stay too:
log-probs before and after are of the same states.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from llmdistill.diffusion.reinforced import Reinforced
from llmdistill.texts.noise import Noise
from llmdistill.texts.rollout import Prompt, Rollout
from llmdistill.texts.sources import Around, Drawn, Round

_ROLLOUT = ("input_ids", "attention_mask", "completion_mask", "behavior_logprobs")
_NOISE = tuple(f.name for f in fields(Noise) if f.name != "view")


class Repeated(Around):
    """What ``source`` draws, for ``updates`` optimizer steps. The prompts of the steps between are passed over."""

    optional = False

    def __init__(self, source: Reinforced, updates: int) -> None:
        super().__init__(source)
        self.updates, self.denoiser = updates, source.denoiser
        self.scored: Callable[[Rollout], Tensor] | None = None  # the trainer: log-probs of a noised text's rows, [N]
        self.held: Drawn | None = None

    def draw(self, round_: Round) -> Drawn:
        if round_.step % self.updates and self.held is not None:
            round_.drawn.append("student")
            return self.held
        rollout, prompts = self.source.draw(round_)
        assert self.scored is not None
        logps = torch.zeros(rollout.input_ids.shape)
        logps[rollout.completion_mask] = self.scored(rollout).float().cpu()
        self.held = replace(rollout, behavior_logprobs=logps), prompts
        return self.held

    def state_dict(self) -> dict[str, Any]:
        """What is held, as tensors and plain data."""
        if self.held is None:
            return {}
        rollout, prompts = self.held
        assert rollout.noise is not None
        return {
            "rollout": {name: getattr(rollout, name) for name in _ROLLOUT},
            "noise": {name: getattr(rollout.noise, name) for name in _NOISE},
            "policy_version": rollout.policy_version,
            "finish": list(rollout.finish),
            "prompts": [[list(p.ids), p.text, p.domain, p.row] for p in prompts],
        }

    def shared(self, states: Sequence[dict[str, Any]], rank: int, world: int) -> dict[str, Any]:
        """Nothing: resumed by another number of ranks, the next step draws a text of its own."""
        warnings.warn("the text that was trained on is drawn anew: another number of processes resumed", stacklevel=2)
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state:
            self.held = None
            return
        prompts = [Prompt(ids, text, domain, row) for ids, text, domain, row in state["prompts"]]
        rollout = Rollout(
            **state["rollout"],
            policy_version=state["policy_version"],
            finish=tuple(state["finish"]),
            domain=tuple(p.domain for p in prompts),
            noise=Noise(**state["noise"], view=self.denoiser),
        )
        self.held = rollout, prompts
