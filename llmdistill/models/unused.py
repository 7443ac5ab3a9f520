"""Weights that text never reaches: towers for images and sound, layers whose weights are read and never run.

They get no gradient, and DeepSpeed would decay them all the same. DistributedDataParallel waits for the gradient of
every parameter that wants one, and under gradient checkpointing transformers does not have it look for those that are
not used. So they are frozen, which changes nothing that is trained.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from llmdistill.compat import zero3
from llmdistill.compat.models import not_checkpointing
from llmdistill.compat.patching import random_state_kept
from llmdistill.models.few_tokens import few_tokens
from llmdistill.models.modes import evaluating
from llmdistill.models.weights import base_model
from llmdistill.texts.views import plain

logger = logging.getLogger(__name__)


def freeze_unused(student: Any) -> list[str]:
    """Freezes what a forward pass on a few tokens of text does not run; returns the names of those modules.

    Experts that no token was routed to are not among them: only whole branches of a model of several modalities, blocks
    of a kind of which none ran (layers that look at images), and adapted layers beside which everything else of their
    block ran.
    """
    model = base_model(student)
    several = model.config.get_text_config() is not model.config
    adapters = hasattr(student, "peft_config")
    if not (several or adapters):
        return []
    ran = _modules_that_run(model)
    kinds = {type(module) for module in ran} | {nn.ModuleList, nn.ModuleDict}
    frozen = list[str]()
    for name, module in model.named_modules():
        if module in ran or any(name.startswith(f"{above}.") for above in frozen):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        unused = several and not any(m in ran for m in module.modules())
        branch = unused and (parent in ran and name.count(".") <= 1 or type(module) not in kinds)
        bypassed = parent in ran and hasattr(module, "base_layer") and module.base_layer not in ran
        if (branch or bypassed) and any(p.requires_grad for p in module.parameters()):
            module.requires_grad_(False)
            frozen.append(name)
    if frozen:
        logger.warning("text does not run %s of the student: not trained", ", ".join(frozen))
    return frozen


@torch.no_grad()
def _modules_that_run(model: nn.Module) -> set[nn.Module]:
    ran: set[nn.Module] = set()
    handles = [m.register_forward_pre_hook(lambda module, _: ran.add(module)) for m in model.modules()]
    try:
        with evaluating(model), random_state_kept(), not_checkpointing(model), zero3.gathered_as_run(model):
            model(**plain(few_tokens(model, 16)).inputs(), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return ran
