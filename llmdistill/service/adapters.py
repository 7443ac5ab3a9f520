"""What an adapter has to be before an engine sees it: plain LoRA, in safetensors, of this model's shapes.

Libraries inject an adapter's layers into the model before they find out that it does not fit, and some ways to start
one change the base weights. So everything is checked on the files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def check_adapter(folder: Path, shapes: Mapping[str, tuple[int, ...]], max_rank: int | None = None) -> int:
    """The adapter's rank.

    Args:
        shapes: of the model's weights, by their names in a checkpoint; [out, in] for linear layers.

    Raises:
        ValueError: it is no such adapter; says what is wrong.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"adapter_config.json cannot be read: {error}") from None
    if not isinstance(config, dict) or not (folder / "adapter_model.safetensors").is_file():
        raise ValueError("adapter_model.safetensors is missing")
    plain = {"peft_type": "LORA", "bias": "none", "modules_to_save": None, "use_dora": False}
    for key, needed in plain.items():
        if config.get(key, needed) not in (needed, needed or None):
            raise ValueError(f"{key} is {config[key]!r}; only plain LoRA is served, with {needed!r}")
    try:
        with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
            found_shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"adapter_model.safetensors cannot be read: {error}") from None
    halves: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in found_shapes.items():
        found = _NAME.fullmatch(name)
        if found is None or f"{found[1]}.weight" not in shapes:
            raise ValueError(f"tensor {name!r} belongs to no linear layer of this model")
        halves.setdefault(found[1], {})[found[2]] = shape
    if not halves:
        raise ValueError("it has no weights")
    rank = int(config.get("r", 0))
    for module, pair in halves.items():
        out, inner = shapes[f"{module}.weight"]
        if pair.get("A") != (rank, inner) or pair.get("B") != (out, rank):
            raise ValueError(
                f"{module}: A and B are {pair.get('A')} and {pair.get('B')}, not {(rank, inner)}, {(out, rank)}"
            )
    if max_rank is not None and rank > max_rank:
        raise ValueError(f"its rank is {rank}; at most {max_rank} (--max-lora-rank)")
    return rank
