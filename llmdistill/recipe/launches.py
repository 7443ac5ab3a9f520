"""Several processes: what a launch must not get wrong in silence, and models that stay whole under ZeRO-3."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from llmdistill.errors import UserError

_kept_alive: list[object] = []  # transformers holds its DeepSpeed config by a weak reference only


def launched_processes(env: Mapping[str, str] = os.environ) -> int:
    """How many processes the launcher (accelerate, torchrun, mpirun) says there are."""
    names = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    return max([int(env.get(name) or 1) for name in names])


def check_cpu_launch(env: Mapping[str, str] = os.environ) -> None:
    """Refuses launches on a machine without a GPU that would run, and do something else than was asked for.

    Raises:
        UserError: FSDP, which accelerate leaves out on CPU: every process would hold and train a whole model.
    """
    if env.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise UserError(
            "accelerate's FSDP does not shard on CPU: every process would hold the whole student. "
            "Fix: --config_file recipes/accelerate/zero3.yaml."
        )
    # `accelerate launch --num_processes 2` without a GPU, or with --cpu, prepares for two processes and starts one.
    if "ACCELERATE_DYNAMO_BACKEND" in env and "MASTER_ADDR" in env and launched_processes(env) == 1:
        warnings.warn(
            "accelerate launch was asked for several processes and started one: without a GPU it needs --multi_gpu "
            "(also on CPU), as in recipes/accelerate/two_processes.yaml",
            stacklevel=2,
        )


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
