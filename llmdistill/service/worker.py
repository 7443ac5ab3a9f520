"""The service's part of a vLLM worker process. vLLM imports it there by name, before it loads the model.

Importing it ties the worker to the life of the process that started it, and, where the service says that weights will
be pushed, makes layers keep the plain weights they are loaded into (see :mod:`llmdistill.compat.vllm_weights`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from llmdistill.compat.vllm_plain import keep_plain_weights
from llmdistill.compat.vllm_prompts import bound_prompt_scores, gives_hidden
from llmdistill.compat.vllm_receiving import join, receive, register_for
from llmdistill.compat.vllm_scores import mend_first_runner
from llmdistill.compat.vllm_weights import load_into_worker, worker_is_plain
from llmdistill.service.orphan import die_with_parent
from llmdistill.teachers.fingerprint import Fingerprint

UPDATABLE = "LLMDISTILL_UPDATABLE"  # set by the service for the processes it starts
TRANSFER = "LLMDISTILL_TRANSFER"


class Worker:
    """Methods added to vLLM's worker, called by name; their arguments are text and numbers only."""

    def llmdistill_load(self, folder: str, partial: bool) -> None:
        """Loads the safetensors files of ``folder`` into the running model."""
        load_into_worker(self, _tensors(Path(folder)), partial)

    def llmdistill_takes_part(self) -> bool:
        """Whether a push may hold only the weights that changed."""
        return worker_is_plain(self)

    def llmdistill_join(self, init: str, replica: int) -> None:
        """Joins the trainer that sends weights: to vLLM's backends replicas are data-parallel copies of the engine."""
        join(self, json.loads(init), replica)

    def llmdistill_receive(self, update: str) -> str:
        """Loads what the trainer sends meanwhile; the fingerprint of what came, as of a checkpoint."""
        config: Any = self.model_config  # type: ignore[attr-defined]
        found = Fingerprint(bool(getattr(config.hf_config, "tie_word_embeddings", False)))
        receive(self, json.loads(update), found.add)
        return found.name()

    def llmdistill_mend(self, first_runner: bool) -> None:
        bound_prompt_scores(self)
        if first_runner:
            mend_first_runner(self)

    def llmdistill_gives_hidden(self) -> bool:
        """Whether a request may have hidden states."""
        return gives_hidden(self)


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (it is no dictionary)
                yield name, tensors.get_tensor(name)


def _prepare() -> Any:
    die_with_parent()
    if os.environ.get(UPDATABLE) == "1":
        keep_plain_weights()
    register_for(os.environ.get(TRANSFER, ""))


_prepare()
