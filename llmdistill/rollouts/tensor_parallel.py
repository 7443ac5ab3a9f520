"""Ranks that hold one engine together, each a part of every layer (vLLM's tensor parallelism by its external launcher).

Neighbours make a group: ranks 0 to k - 1, k to 2 k - 1, and so on. Every rank runs the engine's schedule by itself, so
each has to be told the same: all of a group ask for what any of them does, and keep their own of what is drawn. A
request's seed is its own, so a rank draws what it would have drawn from an engine to itself, up to rounding.
"""

from __future__ import annotations

import torch

from llmdistill.errors import UserError
from llmdistill.texts import Sampling


class RanksOfAnEngine:
    """The group of this rank. Every rank of the launch makes one at the same time.

    Args:
        size: ranks of an engine, at least 2.

    Raises:
        UserError: the processes of the launch do not make up whole engines.
    """

    def __init__(self, size: int) -> None:
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if world % size:
            raise UserError(
                f"rollouts.tensor_parallel_size is {size}, and {world} processes train; an engine takes that many of "
                "them. Fix: a number that divides the processes of the launch, or 1."
            )
        self.size = size
        rank = torch.distributed.get_rank()
        groups = [list(range(first, first + size)) for first in range(0, world, size)]
        made = [torch.distributed.new_group(ranks, backend="gloo") for ranks in groups]
        self._group = made[rank // size]
        self._place = rank % size

    def asked(self, prompts: list[list[int]], sampling: Sampling) -> tuple[list[tuple[list[list[int]], Sampling]], int]:
        """What each rank of the group asks for, in their order, and the place of this one's. All of them call this."""
        found: list[tuple[list[list[int]], Sampling]] = [([], sampling)] * self.size
        torch.distributed.all_gather_object(found, (prompts, sampling), group=self._group)
        return found, self._place
