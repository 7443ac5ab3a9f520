"""What an adapter has to be before an engine sees it: plain LoRA, in safetensors, of this model's shapes.

Libraries inject an adapter's layers into the model before they find out that it does not fit, and some ways to start
one change the base weights. So everything is checked on the files; and on a copy of them, which stays as long as the
adapter does: vLLM reads one again whenever it comes back into use, and dies where its folder has gone by then.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from llmdistill.service.engine import Engine
from llmdistill.service.problems import Problem, first_line
from llmdistill.service.uploads import Held, Uploads
from llmdistill.service.waiters import Waiters

FILES = ("adapter_config.json", "adapter_model.safetensors")
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
        raise ValueError(f"its rank is {rank}; at most {max_rank} (--max_lora_rank)")
    return rank


class Uses:
    """Adapters that requests under way are drawn with: one goes when its last request is answered."""

    def __init__(self) -> None:
        self._counts: Counter[object] = Counter()
        self._waiters = Waiters()

    @contextmanager
    def of(self, adapter: object) -> Iterator[None]:
        """A request uses it."""
        self._counts[adapter] += 1
        try:
            yield
        finally:
            self._counts[adapter] -= 1
            if not self._counts[adapter]:
                del self._counts[adapter]
                self._waiters.wake()

    async def ended(self, adapter: object) -> None:
        """Returns when no request uses it."""
        await self._waiters.until(lambda: adapter not in self._counts)


class Adapters:
    """The copies of those that are loaded."""

    def __init__(self, uploads: Uploads) -> None:
        self.uploads = uploads
        self._held: dict[str, Held] = {}

    def copied(self, folder: Path, engine: Engine) -> Held:
        """A copy of what an adapter is made of, if it is one for this engine.

        Raises:
            ValueError: it is not.
            Problem: 507, no room.
        """
        engine.check_adapter(folder)
        held = self.uploads.held_folder(sum((folder / name).stat().st_size for name in FILES))
        try:
            for name in FILES:
                shutil.copyfile(folder / name, held.path / name)
            engine.check_adapter(held.path)  # what was checked before may have changed since
        except OSError as error:
            held.remove()
            raise Problem(507, "storage", f"the adapter cannot be copied: {first_line(error)}") from None
        except BaseException:
            held.remove()
            raise
        return held

    def keep(self, name: str, held: Held) -> None:
        """Of an adapter that is loaded; the one before of that name goes."""
        self.drop(name)
        self._held[name] = held

    def drop(self, name: str) -> None:
        if held := self._held.pop(name, None):
            held.remove()

    def close(self) -> None:
        for name in list(self._held):
            self.drop(name)
