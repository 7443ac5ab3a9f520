"""Why a folder or a hub name could not be loaded, said of what was meant: a path that is not there is no hub name."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError

from llmdistill.errors import in_this_folder


def why_not_loaded(path: str | Path, error: Exception) -> str:
    """The reason in a line that ends with a full stop. What can only be a path is not spoken of as a name on the hub,
    whose rules for names are what transformers would cite."""
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if "instantiate the backend tokenizer" in reason:
        reason = "it has no tokenizer: neither tokenizer.json nor a vocabulary that one is made from"
    elif isinstance(error, json.JSONDecodeError):
        reason = f"one of its JSON files is damaged ({reason})"
    elif isinstance(error, SafetensorError):
        reason = f"one of its files of weights is damaged ({reason}). Fix: copy it anew"
    if Path(path).expanduser().exists():
        reason = reason.partition(" Checkout '")[0]  # the address of a page of the hub that cannot exist
    elif is_a_path(str(path)):
        reason = f"there is no such folder{in_this_folder(path)}"
    elif "/" in str(path) and Path(path).parent.is_dir():
        reason = f"there is no such folder{in_this_folder(path)}; taken for a hub name: {reason}"
    if "trust_remote_code" in str(error):
        return "it comes with code of its own, which runs only when that is asked for. Fix: trust_remote_code true."
    return reason if reason.endswith(".") else f"{reason}."


def is_a_path(name: str) -> bool:
    """Whether it can be no hub name, which is NAME or OWNER/NAME."""
    return name.startswith(("/", ".", "~")) or name.endswith("/") or name.count("/") > 1 or "\\" in name
