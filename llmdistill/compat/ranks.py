"""The key-value store of a launch, which torch.distributed keeps private. Ranks can wait on it for any time."""

from __future__ import annotations

from typing import Any

import torch


def launch_store() -> Any | None:
    """The store of the default process group; None without a group of several ranks."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    if torch.distributed.get_world_size() == 1:
        return None
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()
