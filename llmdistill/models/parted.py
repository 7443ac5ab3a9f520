"""A text parted among the ranks of a group: each computes a stretch of its positions (Ulysses, arXiv:2309.14509).

Layers see a stretch, [B, T / S] of a group of S ranks. In attention the ranks exchange heads for positions: each has
all positions of its share of the heads, and a stretch of all heads again afterwards. What the last layer wrote is
gathered at the head, where every rank of the group computes the same loss on the same rows; on the way back each keeps
the gradient of its stretch, S times, for the loss is divided by the rows of all ranks.

Simplified away: packed rows, masks other than causal attention over texts padded on the right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llmdistill.errors import UserError
from llmdistill.models.weights import base_model
from llmdistill.texts.views import View

_IMPLEMENTATION, _CORE = "llmdistill_parted", "sdpa"
_groups = list[Any]()  # entered and not left


class RanksOfAText:
    """The group of this rank: neighbours, ``size`` of them. Every rank of the launch makes one at the same time.

    Raises:
        UserError: the processes of the launch do not make up whole groups.
    """

    def __init__(self, size: int) -> None:
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world % size:
            raise UserError(
                f"objective.sequence_parallel_size is {size}, and {world} processes train; a text is parted among that "
                "many of them. Fix: a number that divides the processes of the launch, or 1."
            )
        groups = [list(range(first, first + size)) for first in range(0, world, size)]
        self.size, self.place = size, dist.get_rank() % size
        self.group = [dist.new_group(ranks) for ranks in groups][dist.get_rank() // size]

    def everyones(self, mine: Any) -> list[Any]:
        """What each rank of the group has, in their order. All of them call this."""
        found = [None] * self.size
        dist.all_gather_object(found, mine, group=self.group)
        return found

    def exchanged(self, x: Tensor) -> Tensor:
        """[S, ...]: the i-th goes to rank i, and comes from it."""
        return _Exchange.apply(x, self.group)  # type: ignore[no-any-return]

    def inputs(self, view: View) -> dict[str, Tensor]:
        """This rank's stretch of what the model reads, widened to a multiple of S."""
        width = view.input_ids.shape[1]
        more = -width % self.size
        ids = nn.functional.pad(view.input_ids, (0, more))
        positions = torch.cat([view.position_ids, view.position_ids[:, -1:].expand(-1, more)], 1)
        stretch = (width + more) // self.size
        mine = slice(self.place * stretch, (self.place + 1) * stretch)
        return {"input_ids": ids[:, mine].contiguous(), "position_ids": positions[:, mine].contiguous()}

    def gathering(self, compute: Callable[[Tensor], Tensor], width: int) -> Callable[[Tensor], Tensor]:
        """``compute`` of the states [B, T, H] of all stretches, for a head that is given its own."""
        return lambda states: compute(_Gather.apply(states, self)[:, :width])


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out = torch.empty_like(grad, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, grad.contiguous(), group=ctx.group)
        return out, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, ranks: RanksOfAText) -> Tensor:
        ctx.ranks, ctx.stretch = ranks, states.shape[1]
        found = [torch.empty_like(states, memory_format=torch.contiguous_format) for _ in range(ranks.size)]
        dist.all_gather(found, states.contiguous(), group=ranks.group)
        return torch.cat(found, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        a = ctx.ranks.place * ctx.stretch
        return grad[:, a : a + ctx.stretch] * ctx.ranks.size, None


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """[B, heads, T / S, D] each -> [B, T / S, heads, D]."""
    from transformers import AttentionInterface

    ranks: RanksOfAText = _groups[-1]
    size, heads = ranks.size, query.shape[1]
    if key.shape[1] % size:  # fewer key heads than ranks: each has those of its queries
        key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    q, k, v = (_to_heads(x, ranks) for x in (query, key, value))
    options = {name: options[name] for name in ("dropout", "scaling") if name in options}
    shim = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], is_causal=True, training=module.training)
    out, _ = AttentionInterface()[_CORE](shim, q, k, v, None, **options)  # [B, T, heads / S, D]
    batch, width, own, depth = out.shape
    parts = out.view(batch, size, width // size, own, depth).transpose(0, 1)
    back = ranks.exchanged(parts)  # [S, B, T / S, heads / S, D]
    return back.permute(1, 2, 0, 3, 4).reshape(batch, width // size, heads, depth), None


def _to_heads(x: Tensor, ranks: RanksOfAText) -> Tensor:
    """[B, heads, T / S, D] -> [B, heads / S, T, D]."""
    batch, heads, stretch, depth = x.shape
    size = ranks.size
    found = ranks.exchanged(x.view(batch, size, heads // size, stretch, depth).transpose(0, 1))
    return found.permute(1, 2, 0, 3, 4).reshape(batch, heads // size, size * stretch, depth)


@contextmanager
def parted(model: Any, ranks: RanksOfAText | None) -> Iterator[None]:
    """Within it forward passes by `forward_to_head`, and their backward passes, are parted. None: as always."""
    if ranks is None:
        yield
        return
    from transformers import AttentionInterface

    AttentionInterface.register(_IMPLEMENTATION, _attention)  # without a mask of its own: transformers then makes none
    config = base_model(model).config
    before, config._attn_implementation = config._attn_implementation, _IMPLEMENTATION
    _groups.append(ranks)
    try:
        yield
    finally:
        _groups.pop()
        config._attn_implementation = before


def parting() -> RanksOfAText | None:
    """The group of a pass that is made now."""
    return _groups[-1] if _groups else None


def check_parted(model: Any, size: int) -> None:
    """Refuses students whose layers need all of a text, or more of it than attention exchanges.

    Raises:
        UserError: heads that are not shared out evenly, another attention than full and causal by sdpa, experts, or
            parts that are no text.
    """
    student = base_model(model)
    whole = student.config
    config = whole.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if kinds == {"full_attention"} else None
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    reasons = {
        f"it has {config.num_attention_heads} attention heads": config.num_attention_heads % size > 0,
        f"its attention is {whole._attn_implementation}, not {_CORE}": whole._attn_implementation != _CORE,
        f"it has layers of {', '.join(sorted(kinds))}": kinds != {"full_attention"},
        f"its attention has a window of {window}": bool(window) and not hasattr(config, "layer_types"),
        "its attention caps its logits": bool(getattr(config, "attn_logit_softcapping", None)),
        "it is a mixture of experts, whose balance is over a text": bool(experts),
        "it reads more than text": config is not whole,
        "its attention is its own": not getattr(student, "_supports_attention_backend", False),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(
                f"objective.sequence_parallel_size is {size}, and {type(student).__name__} cannot be parted: {reason}. "
                "Fix: 1, with --gradient_checkpointing true and objective.batch_tokens."
            )
