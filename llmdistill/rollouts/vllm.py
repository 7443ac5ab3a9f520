"""Sampling with vLLM inside the training process: faster than ``generate``, fed with the student's weights."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from llmdistill.errors import UserError
from llmdistill.models.adapter_files import adapter_rank, peft_model, write_adapter
from llmdistill.models.vllm_engine import InProcessVLLM
from llmdistill.models.weights import base_model
from llmdistill.rollouts.probe import check_engine
from llmdistill.rollouts.tensor_parallel import RanksOfAnEngine
from llmdistill.texts.rollout import Prompt, Rollout, Sampling

_SHARED_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


class VLLMRollouts:
    """A vLLM copy of the student. Implements :class:`~llmdistill.rollouts.engine.RolloutEngine`.

    Args:
        student: the student's checkpoint (folder or hub name), or the model itself, of which only the configuration is
            read: its weights come with the first :meth:`sync`.
        eos_ids, pad_id: every id that ends a completion, and the padding id.
        dtype: of the engine's weights; "auto" is the checkpoint's. In bfloat16 the engine's log-probs differ from a
            float32 student's by 0.05 on average, which ``behavior_logprobs`` shows.
        max_model_len: longest prompt and completion together.
        kv_cache_gib: key-value cache on CPU; on a GPU ``gpu_memory_utilization`` is the share of memory for everything.
        seed: of the engine itself; requests carry their own seeds.
        tokenizer: of the student, for stop strings.
        batch_tokens: tokens that may be in the engine at one time; 0: as many as its cache holds.
        tensor_parallel_size: processes that hold an engine together; every rank of the launch makes its part of one.
        as_adapter: the student's LoRA is handed over alone, over the checkpoint that the student was loaded from.
        options: of :class:`~llmdistill.models.vllm_engine.InProcessVLLM`.

    Raises:
        UserError: vLLM is missing or refuses the model.
    """

    def __init__(
        self,
        student: str | nn.Module,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        dtype: str = "bfloat16",
        max_model_len: int = 2048,
        kv_cache_gib: float = 0.5,
        gpu_memory_utilization: float = 0.3,
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_tokens: int = 0,
        tensor_parallel_size: int = 1,
        as_adapter: bool = False,
        **options: Any,
    ) -> None:
        self.tokenizer, self.batch_tokens = tokenizer, batch_tokens
        self.eos_ids, self.pad_id = tuple(eos_ids), pad_id
        self.policy_version = 0
        self._has_weights = isinstance(student, str)
        needs: dict[str, Any] = {
            "dtype": dtype,
            "longest": max_model_len,
            "kv_cache_gib": kv_cache_gib,
            "gpu_memory_utilization": gpu_memory_utilization,
            "seed": seed,
            "tensor_parallel": RanksOfAnEngine(tensor_parallel_size) if tensor_parallel_size > 1 else None,
            **options,
        }
        self._adapter_folder: tempfile.TemporaryDirectory[str] | None = None
        if as_adapter:
            assert not isinstance(student, str)
            checkpoint = _checkpoint_below(student)
            self._adapter_folder = tempfile.TemporaryDirectory(dir=_SHARED_MEMORY)
            self.engine = InProcessVLLM(checkpoint, "rollouts", adapter_rank=adapter_rank(student), **needs)
        elif isinstance(student, str):
            self.engine = InProcessVLLM(student, "rollouts", **needs)
        else:
            with tempfile.TemporaryDirectory() as folder:
                config = copy.deepcopy(base_model(student).config)
                # vLLM goes by it, and one made here has none; FSDP2 puts its name before the class's.
                config.architectures = [type(base_model(student)).__name__.removeprefix("FSDP")]
                config.save_pretrained(folder)
                self.engine = InProcessVLLM(folder, "rollouts", load_format="dummy", **needs)

    def sync(self, model: nn.Module, policy_version: int) -> None:
        """Pushes the weights of ``model``; after the first time, where the engine can, only those that are trained.

        ``model`` is always the same student, as the trainer holds it: adapters and sharding are handled.

        Raises:
            UserError: after the first push the engine's log-probs are not the student's.
        """
        first = not self.engine.pushed
        if self._adapter_folder is None:
            self.engine.push(model)
        else:
            write_adapter(model, Path(self._adapter_folder.name))
            self.engine.put_adapter(Path(self._adapter_folder.name))
        self.policy_version, self._has_weights = policy_version, True
        if first:
            check_engine(self, model, float32=self.engine.dtype == torch.float32)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollout:
        """Completions with the eos that ended them. ``behavior_logprobs`` are those of the distribution sampled from:
        softmax(logits / temperature) after everything that :class:`~llmdistill.texts.rollout.Sampling` says.

        Every sample is a request with a seed of its own, so what it draws does not depend on its company, up to
        rounding (a batch of another size adds in another order).

        Raises:
            UserError: a prompt leaves no room for ``max_new_tokens``.
        """
        assert self._has_weights, "sync() comes before generate()"
        parts = (self.eos_ids, self.pad_id, self.policy_version, self.tokenizer, self.batch_tokens)
        return self.engine.rollout(prompts, sampling, *parts)

    def close(self) -> None:
        self.engine.close()
        if self._adapter_folder is not None:
            self._adapter_folder.cleanup()


def _checkpoint_below(student: nn.Module) -> str:
    """Folder or hub name of the model that the adapter is on.

    Raises:
        UserError: there is no adapter, or the model below it is in memory alone.
    """
    if peft_model(student) is None:
        raise UserError(
            "rollouts.lora is adapter, and the student has none. Fix: student.lora_r 16, or rollouts.lora merged."
        )
    name = base_model(student).config.name_or_path
    if not name:
        raise UserError(
            "rollouts.lora is adapter, which vLLM adds to the student's checkpoint, and the student was made in "
            "memory. Fix: load it from a folder, or rollouts.lora merged."
        )
    return str(name)
