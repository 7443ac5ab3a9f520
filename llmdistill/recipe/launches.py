"""Several processes: what a launch must not get wrong in silence, and models that stay whole under ZeRO-3."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from llmdistill.errors import UserError

_kept_alive: list[object] = []  # transformers holds its DeepSpeed config by a weak reference only


def launched_processes(env: Mapping[str, str] = os.environ) -> int:
    """How many processes the launcher (accelerate, torchrun, mpirun) says there are."""
    names = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    return max([int(env.get(name) or 1) for name in names])


def asks_for_deepspeed(env: Mapping[str, str] = os.environ) -> bool:
    """Whether accelerate's launcher does."""
    return env.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def asks_for_fsdp(env: Mapping[str, str] = os.environ) -> bool:
    """Whether accelerate's launcher does."""
    return env.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def check_parallelism(env: Mapping[str, str] = os.environ) -> None:
    """Refuses what accelerate's launcher was asked for beyond shards and copies.

    Raises:
        UserError: a sequence, or a layer, is to be parted among processes.
    """
    if env.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() != "true":
        return
    for name, what in (("CP", "context"), ("SP", "sequence"), ("TP", "tensor")):
        size = int(env.get(f"PARALLELISM_CONFIG_{name}_SIZE") or 1)
        if size > 1:
            raise UserError(
                f"the launcher's parallelism_config_{name.lower()}_size is {size}: {what} parallelism would part the "
                "rows of a text among processes that each sample and score texts of their own. docs/training.md says "
                "what was tried. Fix: leave it out; recipes/accelerate/zero3.yaml, --gradient_checkpointing true and "
                "objective.batch_tokens are what long texts fit by."
            )


def check_cpu_launch(env: Mapping[str, str] = os.environ) -> None:
    """Says where a launch on a machine without a GPU does something else than was asked for."""
    # `accelerate launch --num_processes 2` without a GPU, or with --cpu, prepares for two processes and starts one.
    if "ACCELERATE_DYNAMO_BACKEND" in env and "MASTER_ADDR" in env and launched_processes(env) == 1:
        warnings.warn(
            "accelerate launch was asked for several processes and started one: without a GPU it needs --multi_gpu "
            "(also on CPU), as in recipes/accelerate/two_processes.yaml",
            stacklevel=2,
        )


def check_fsdp_launch(env: Mapping[str, str] = os.environ) -> None:
    """Refuses settings of accelerate's FSDP that a student cannot be trained with here.

    Raises:
        UserError: FSDP1; or weights that only the first process reads, while every one looks at its student first.
    """
    if not asks_for_fsdp(env):
        return
    if (version := env.get("FSDP_VERSION", "1")) != "2":
        raise UserError(
            f"fsdp_version is {version} in the launch file: FSDP1 puts weights together by whole units, and is not "
            "tried here. Fix: fsdp_version: 2, as in recipes/accelerate/fsdp2.yaml."
        )
    if env.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
        raise UserError(
            "fsdp_cpu_ram_efficient_loading is true in the launch file: the other processes would begin with empty "
            "weights, and every one looks at its student before it is trained. Fix: false, as in "
            "recipes/accelerate/fsdp2.yaml."
        )


def check_gpu_launch(gpus: int, env: Mapping[str, str] = os.environ) -> None:
    """Refuses launches that do not fit the GPUs of this machine.

    Args:
        gpus: that this process sees.

    Raises:
        UserError: one process that nobody launched sees several, which transformers would give a copy of the model
            each (``nn.DataParallel``), and a head that is put aside in one copy is missing in the others; or more
            processes on this machine than there are GPUs.
    """
    here = int(env.get("LOCAL_WORLD_SIZE") or 1)
    alone = "LOCAL_RANK" not in env and not asks_for_deepspeed(env)
    if gpus > 1 and alone:
        raise UserError(
            f"one process sees {gpus} GPUs, and every GPU needs a process of its own. Fix: accelerate launch "
            f"--num_processes {gpus} -m llmdistill.opd --config RECIPE, or CUDA_VISIBLE_DEVICES=0 for one of them."
        )
    if here > gpus:
        steps = f", and train.gradient_accumulation_steps {here // gpus} times as large" if here % gpus == 0 else ""
        raise UserError(
            f"{here} processes were launched on a machine with {gpus} GPU{'s' * (gpus > 1)}, one for each. Fix: "
            f"accelerate launch --num_processes {gpus}{steps}."
        )


def bf16_here(asked: bool | None, fp16: bool, *, on_gpu: bool) -> bool:
    """Whether the maths is bfloat16: what was asked for; else on a GPU that has it, where float16 was not.

    Raises:
        UserError: it was asked for, and the GPU does not have it.
    """
    if asked is False or asked is None and (fp16 or not on_gpu):
        return False
    has_it = not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    if asked and not has_it:
        major, minor = torch.cuda.get_device_capability()
        raise UserError(
            f"train.bf16 is True, and {torch.cuda.get_device_name()} (compute capability {major}.{minor}) has no "
            "bfloat16, which begins with 8.0. Fix: --bf16 false, with --fp16 true where float32 is too slow."
        )
    return has_it


def check_outages(outages: Mapping[str, float], ddp_timeout: float, processes: int) -> None:
    """Refuses patience with a service that outlives the ranks' patience with each other: while one rank waits for its
    teacher the others wait for it in a collective, and would be timed out first.

    Args:
        outages: ``max_outage_s`` of each service, by the name of the setting.

    Raises:
        UserError: names both settings.
    """
    for setting, seconds in outages.items():
        if processes > 1 and seconds >= ddp_timeout:
            raise UserError(
                f"{setting} is {seconds:g} and train.ddp_timeout {ddp_timeout:g}: with {processes} processes the ranks "
                f"would give each other up before the service. Fix: --ddp_timeout {seconds + 600:.0f}, or a shorter "
                f"--{setting}."
            )


@contextmanager
def whole_models() -> Iterator[None]:
    """``from_pretrained`` within this context loads whole weights also under ZeRO-3.

    There it would shard every model it loads, and only the student gets the engine that puts shards together again.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig, deepspeed_config, unset_hf_deepspeed_config

    config = deepspeed_config()
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        _kept_alive[:] = [HfDeepSpeedConfig(config)]


def leave_group() -> None:
    """Ends the process group of a launch, together. What is left of gloo's threads at exit would abort the process
    now and then ("terminate called without an active exception"), after all the work was done."""
    import torch

    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
