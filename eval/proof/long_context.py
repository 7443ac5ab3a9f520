"""A text parted among processes, with the streamed head: which of the roads run on gloo, and whether they are right.

    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 eval/proof/long_context.py

One sequence of 64 tokens, a Llama of two layers in float32, the reverse KL to a teacher's logits on 48 rows through
`llmdistill.objectives.streaming`. Each process holds half of the positions and the rows among them; their losses and
gradients are summed and held against those of the whole sequence in one process:

- ``torch``: `torch.distributed.tensor.experimental.context_parallel`, which accelerate's ``cp_size`` enters.
- ``ours``: `llmdistill.models.parted`, what ``objective.sequence_parallel_size`` does.
- ``deepspeed``: DeepSpeed's Ulysses attention, which accelerate's ``sp_size`` registers.
- ``accelerate cp``, ``accelerate sp``: what accelerate itself says to both on this machine.

Prints a line of each: the largest difference over the largest number, of the loss and of all gradients, or the error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llmdistill.models.heads import forward_to_head
from llmdistill.models.parted import RanksOfAText, parted
from llmdistill.objectives.divergences import reverse_kl
from llmdistill.objectives.streaming import streamed
from llmdistill.texts import Rollout
from llmdistill.texts.views import plain
from tests import tiny

TOKENS, PROMPT = 64, 16


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    ids, teacher = torch.randint(4, 260, (1, TOKENS)), torch.randn(TOKENS, 264)
    whole = measured(tiny.llama(1, attn_implementation="sdpa"), ids, teacher, slice(0, TOKENS))
    roads: dict[str, Callable[..., dict[str, Tensor]]] = {
        "torch": by_torch,
        "deepspeed": by_deepspeed,
        "ours": by_ours,
        "accelerate cp": lambda *a: by_accelerate("cp"),
        "accelerate sp": lambda *a: by_accelerate("sp"),
    }
    for name in sys.argv[1:] or roads:
        try:
            found = roads[name](tiny.llama(1, attn_implementation="sdpa"), ids, teacher)
            gaps = [float((found[key] - whole[key]).abs().max() / whole[key].abs().max()) for key in whole]
            told = f"loss {gaps[0]:.1e}, gradients {max(gaps[1:]):.1e}"
        except Exception as error:
            told = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')[:300]}"
        if dist.get_rank() == 0:
            print(f"{name}: {told}", flush=True)
        dist.barrier()


def measured(model: Any, ids: Tensor, teacher: Tensor, mine: slice) -> dict[str, Tensor]:
    """Loss and gradients of this process's positions."""
    positions = torch.arange(TOKENS)[None]
    return of_states(
        model, model.model(input_ids=ids[:, mine], position_ids=positions[:, mine]).last_hidden_state, teacher, mine
    )


def of_states(model: Any, states: Tensor, teacher: Tensor, mine: slice) -> dict[str, Tensor]:
    at = torch.arange(TOKENS)[mine]  # a state is a row where it predicts a token of the completion
    counted = (at >= PROMPT - 1) & (at < TOKENS - 1)
    loss, _ = streamed(reverse_kl, states[0][counted], model.lm_head, teacher[mine][counted])
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def summed(found: dict[str, Tensor]) -> dict[str, Tensor]:
    for value in found.values():
        dist.all_reduce(value)
    return found


def half() -> slice:
    each = TOKENS // dist.get_world_size()
    return slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)


def by_torch(model: Any, ids: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import _cp_options

    _cp_options.enable_load_balance = False  # halves in their order
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ids, positions = ids.clone(), torch.arange(TOKENS)[None].clone()
    with context_parallel(mesh, buffers=[ids, positions], buffer_seq_dims=[1, 1]):
        states = model.model(input_ids=ids, position_ids=positions, attention_mask=None).last_hidden_state
        found = of_states(model, states, teacher, half())
    return summed(found)


def by_ours(model: Any, ids: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    ranks, mask = RanksOfAText(dist.get_world_size()), torch.ones_like(ids, dtype=torch.bool)
    counted = mask & (torch.arange(TOKENS)[None] >= PROMPT)
    view, model = plain(Rollout(ids, mask, counted)), model.train()
    losses = []

    def at_the_head(states_BTH: Tensor) -> Tensor:
        losses.append(streamed(reverse_kl, view.rows(states_BTH), model.lm_head, teacher[PROMPT - 1 : -1])[0])
        return losses[0]

    with parted(model, ranks):
        output = forward_to_head(model, model.lm_head, view, at_the_head)
        (losses[0] + 0 * output.logits.sum()).backward()
    found = {"loss": losses[0].detach(), **{name: p.grad for name, p in model.named_parameters()}}
    return {name: value / dist.get_world_size() for name, value in summed(found).items()}


def by_deepspeed(model: Any, ids: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model,
        core_attn_implementation="sdpa",
        sequence_parallel_size=dist.get_world_size(),
        micro_batch_size=1,
        seq_length_is_variable=True,
    )
    return summed(measured(model.train(), ids, teacher, half()))


def by_accelerate(kind: str) -> dict[str, Tensor]:
    from accelerate import Accelerator
    from accelerate.parallelism_config import ParallelismConfig

    accelerator = Accelerator(parallelism_config=ParallelismConfig(**{f"{kind}_size": 2}), cpu=True)
    raise RuntimeError(f"takes it, as {accelerator.distributed_type}, and does nothing with it")


if __name__ == "__main__":
    main()
