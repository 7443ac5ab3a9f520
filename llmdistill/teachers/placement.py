"""Where an embedded teacher's weights are: whole on every device, in parts over all, or with the host between uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmdistill.compat import fsdp
from llmdistill.errors import UserError
from llmdistill.models.heads import plain_head


class Whole:
    """On every device, always."""

    writes = True

    def __init__(self, model: Any, device: torch.device) -> None:
        model.to(device)

    @contextmanager
    def present(self) -> Iterator[None]:
        """The model can run inside."""
        yield

    def passes(self, batches: list[list[int]]) -> list[list[int]]:
        """The forward passes that are to be made: those of ``batches``, and empty ones."""
        return batches


class Sharded(Whole):
    """In parts over all processes, each layer put together for its forward pass. All but the output head, which the
    student's loss reads: that is whole. Every process makes as many passes as the one with the most of them."""

    writes = False  # processes end their texts at different lengths, and would wait for each other

    def __init__(self, model: Any, device: torch.device) -> None:
        self.device = device
        fsdp.shard_frozen(model, device, list(plain_head(model).parameters()))

    def passes(self, batches: list[list[int]]) -> list[list[int]]:
        count = torch.tensor(len(batches), device=self.device)
        torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MAX)
        return batches + [[] for _ in range(int(count) - len(batches))]


class Offloaded(Whole):
    """With the host between uses, in pinned memory; all but the output head, which the student's loss reads."""

    def __init__(self, model: Any, device: torch.device) -> None:
        head = {id(p) for p in plain_head(model).parameters()}
        plain_head(model).to(device)
        self.device = device
        self.away = [p for p in (*model.parameters(), *model.buffers()) if id(p) not in head]
        self.host = [self.to_host(p.data) for p in self.away]
        for parameter, values in zip(self.away, self.host, strict=True):
            parameter.data = values
        self.inside = 0

    def to_host(self, values: Tensor) -> Tensor:
        return values.cpu().pin_memory() if self.device.type == "cuda" else values

    def to_device(self, values: Tensor) -> Tensor:
        return values.to(self.device, non_blocking=True)

    @contextmanager
    def present(self) -> Iterator[None]:
        self.inside += 1
        if self.inside == 1:
            for parameter, values in zip(self.away, self.host, strict=True):
                parameter.data = self.to_device(values)
        try:
            yield
        finally:
            self.inside -= 1
            if not self.inside:  # nobody writes to them: what the host has is still right
                for parameter, values in zip(self.away, self.host, strict=True):
                    parameter.data = values


def placed(model: nn.Module, device: torch.device, placement: str) -> Whole:
    """Puts a frozen model where ``teacher.placement`` says.

    Raises:
        UserError: there is nobody to share it with, or no host beside the device.
    """
    if placement == "sharded" and not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        raise UserError(
            "teacher.placement is sharded, and there is one process. Fix: accelerate launch with several, or leave it "
            "out."
        )
    if placement == "offload" and device.type == "cpu":
        raise UserError(
            "teacher.placement is offload, and without a GPU the teacher is in the host's memory anyway. Fix: leave it "
            "out."
        )
    kinds = {"whole": Whole, "sharded": Sharded, "offload": Offloaded}
    return kinds[placement](model, device)
