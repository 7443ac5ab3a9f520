"""Views: how one model reads a text, and which of its states are rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llmdistill.texts.noise import Noise
from llmdistill.texts.rollout import Prompt, Rollout, collate, position_ids, predicting


@dataclass(frozen=True, eq=False)
class View:
    """What a model is given, and which of its states are rows. B sequences, T tokens, N rows."""

    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor | None  # [B, T] bool; or [B, 1, T, T] float, added to attention's logits; None: causal
    position_ids: Tensor  # [B, T] int64
    at: Tensor  # [B, T] bool: a state here is a row
    targets: Tensor  # [N] int64: what every row should predict
    extras: Mapping[str, Any] = field(default_factory=dict)  # what else the model reads: images, token types
    order: Tensor | None = None  # [N] int64: which state, in the order of ``at``, is a row's; None: the same order
    there: Tensor | None = None  # [B, T] bool: what is no padding, where attention_mask does not say it
    lengths: Sequence[int] | None = None  # of the sequences that stand one behind another in the only row

    def rows(self, states_BTX: Tensor) -> Tensor:
        """[B, T, X] -> [N, X], sequence by sequence, position by position."""
        states = states_BTX[self.at]
        return states if self.order is None else states[self.order]

    def inputs(self) -> dict[str, Any]:
        """The arguments of the model's forward."""
        mask = {} if self.attention_mask is None else {"attention_mask": self.attention_mask}
        return {"input_ids": self.input_ids, **mask, "position_ids": self.position_ids, **self.extras}


def plain(rollout: Rollout) -> View:
    """The text under its prompt."""
    mask_BT = rollout.completion_mask
    return View(
        rollout.input_ids,
        rollout.attention_mask,
        position_ids(rollout.attention_mask),
        predicting(mask_BT),
        rollout.token_rows(),
    )


def student_view(rollout: Rollout) -> View:
    """How the student reads a text: noised, where a denoiser is trained; else plain."""
    return plain(rollout) if rollout.noise is None else rollout.noise.view(rollout)  # type: ignore[no-any-return]


def in_context(rollout: Rollout, prompts: Sequence[Prompt], context: str, pad_id: int) -> tuple[Rollout, Tensor]:
    """The same completions, each under another context of its row; and which sequences have one, [B] bool.

    The rows are the same tokens in the same order: completions are carried over as ids, never as text. A sequence
    without that context keeps its prompt, so that the rows stay aligned; what is said about it must not count.
    """
    left_padding = rollout.attention_mask.long().argmax(1).tolist()
    ends = [a + n for a, n in zip(left_padding, rollout.attention_mask.sum(1).tolist(), strict=True)]
    has = torch.tensor([context in p.contexts for p in prompts], dtype=torch.bool)
    contexts_ids = [list(p.contexts.get(context, p.ids)) for p in prompts]
    starts = [a + len(p.ids) for a, p in zip(left_padding, prompts, strict=True)]
    completions = [ids[a:b].tolist() for ids, a, b in zip(rollout.input_ids.cpu(), starts, ends, strict=True)]
    in_contexts = collate(contexts_ids, completions, pad_id=pad_id, finish=rollout.finish, domain=rollout.domain)
    mask = torch.zeros_like(in_contexts.completion_mask)  # what the text leaves out of the loss is left out here too
    for b, (context_ids, a, end) in enumerate(zip(contexts_ids, starts, ends, strict=True)):
        mask[b, len(context_ids) : len(context_ids) + end - a] = rollout.completion_mask[b, a:end].cpu()
    return replace(in_contexts, completion_mask=mask, policy_version=rollout.policy_version), has


def stacked(rollouts: Sequence[Rollout], pad_id: int) -> Rollout:
    """The sequences of several texts as one batch, in that order, right-padded to the longest."""
    if len(rollouts) == 1:
        return rollouts[0]
    width = max(r.input_ids.shape[1] for r in rollouts)
    noises = [r.noise.padded(width) for r in rollouts if r.noise is not None]
    if noises and len(noises) < len(rollouts):
        raise ValueError("one text of a round is noised and another is not; a student reads all in one way")

    def padded(tensor_BT: Tensor, value: int | bool) -> Tensor:
        return torch.nn.functional.pad(tensor_BT, (0, width - tensor_BT.shape[1]), value=value)

    return Rollout(
        torch.cat([padded(r.input_ids, pad_id) for r in rollouts]),
        torch.cat([padded(r.attention_mask, False) for r in rollouts]),
        torch.cat([padded(r.completion_mask, False) for r in rollouts]),
        noise=Noise.stacked(noises) if noises else None,
    )
