"""LoRA in a vLLM engine of this process: one adapter, replaced where it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

_NAME, _ID = "student", 1


def adapter_options(rank: int) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` for an engine that takes one adapter of that rank, or a lower one.

    Raises:
        ValueError: no engine takes so high a rank.
    """
    from vllm.config.lora import MaxLoRARanks

    allowed = sorted(get_args(MaxLoRARanks))
    if rank > allowed[-1]:
        raise ValueError(f"the adapter's rank is {rank}, and vLLM takes at most {allowed[-1]}")
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": next(r for r in allowed if r >= rank)}


def put_adapter(llm: Any, folder: Path) -> Any:
    """Loads the adapter in a folder over the one before; returns what requests that want it carry.

    Raises:
        ValueError: it is no adapter that vLLM runs.
    """
    from vllm.lora.request import LoRARequest

    llm.llm_engine.add_lora(LoRARequest(_NAME, _ID, str(folder), load_inplace=True))
    return LoRARequest(_NAME, _ID, str(folder))  # a request that says load_inplace would read it again every time
