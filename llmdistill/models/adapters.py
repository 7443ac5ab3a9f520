"""Adapters of peft on a student: put on where they can be trained, refused where what they train cannot be merged into
the weights that ``student/`` holds.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llmdistill.compat import zero3
from llmdistill.errors import UserError
from llmdistill.models.heads import plain_head
from llmdistill.models.modes import evaluating
from llmdistill.models.weights import base_model, refuse_adapted_ties
from llmdistill.recipe.lora import ALL_LINEAR, changes_base

# peft refuses these of a Mamba block, whose kernel reads their weights and never runs them as layers.
_READ_BY_KERNELS = {"mamba": ("out_proj", "conv1d")}
logger = logging.getLogger(__name__)


def adapted(student: PreTrainedModel, peft_config: Any) -> PreTrainedModel:
    """``student`` under a new adapter, as :func:`fitted` has it.

    Raises:
        UserError: there is an adapter already, peft refuses the config, or the outcome could not be merged.
    """
    from peft import get_peft_model

    if adapters_of(student):
        raise UserError(
            f"the student has the adapter {', '.join(adapters_of(student))} already, and peft_config (student.lora_r) "
            "puts another on top. Fix: model.merge_and_unload() first, or leave peft_config out to train on with the "
            "one that is there."
        )
    peft_config = fitted(peft_config, student)
    try:
        model: Any = get_peft_model(student, peft_config)
    except (ValueError, NotImplementedError) as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        raise UserError(
            f"peft cannot adapt {type(student).__name__}: {reason.rstrip('.')}. Fix: student.lora_target_modules or "
            "another setting of the adapter, or student.lora_r 0 to train the weights themselves."
        ) from error
    refuse_unmergeable(model)
    return model  # type: ignore[no-any-return]


def fitted(peft_config: Any, student: PreTrainedModel) -> Any:
    """A copy of the config in which ``all-linear`` leaves out what is no linear layer after all, or is never run.

    Raises:
        UserError: a target of it is nothing of the student's: peft is content if one of several is something.
    """
    peft_config = copy.deepcopy(peft_config)
    modules = [name for name, _ in student.named_modules() if name]
    targets = getattr(peft_config, "target_modules", None)
    if isinstance(targets, str) and targets != ALL_LINEAR:
        if not any(re.fullmatch(targets, name) for name in modules):
            raise _matches_nothing("lora_target_modules", targets, student, f"'.*\\.({targets})', for a whole name")
    elif targets != ALL_LINEAR:
        _check_names("lora_target_modules", targets, modules, student)
    _check_names("lora_modules_to_save", getattr(peft_config, "modules_to_save", None), modules, student)
    parameters = [name for name, _ in student.named_parameters()]
    _check_names("lora_target_parameters", getattr(peft_config, "target_parameters", None), parameters, student)
    if targets == ALL_LINEAR:
        _leave_out(peft_config, list(_not_to_adapt(student)))
    return peft_config


def refuse_changed_base(student: Any, reader: str) -> None:
    """Refuses a judge that is the model below the adapter, where the adapter's start has changed that.

    Args:
        reader: the setting of the judge.

    Raises:
        UserError: the adapter started as PiSSA or OLoRA.
    """
    for config in (getattr(student, "peft_config", None) or {}).values():
        if changes_base(getattr(config, "init_lora_weights", True)):
            raise UserError(
                f"{reader} is the student without its adapter, and student.init_lora_weights "
                f"{config.init_lora_weights} has changed what is below it. Fix: --student.init_lora_weights true, or "
                "the student's folder as the judge's model."
            )


def refuse_unmergeable(student: Any) -> None:
    """Refuses a student whose adapters cannot become weights of its checkpoint.

    Raises:
        UserError: prompts or prefixes that are trained, adapters of a kind that peft cannot merge, an adapted output
            head, an adapter on one of two tied matrices, or adapters that ``from_pretrained`` put into a bare model.
    """
    if getattr(student, "_hf_peft_config_loaded", False):
        raise UserError(
            f"the student, {type(student).__name__}, was loaded from an adapter's folder into a model that is no "
            "peft model: it would be saved without its weights. Fix: give the folder's name, whose adapter is merged, "
            "or PeftModel.from_pretrained(model, folder, is_trainable=True) to train on with it."
        )
    if not hasattr(student, "peft_config"):
        return
    for name, config in student.peft_config.items():
        if getattr(config, "is_prompt_learning", False) or not hasattr(student, "merge_and_unload"):
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise UserError(
                f"the student's adapter {name!r} is of the kind {kind}, which trains no weights of the model that "
                "could be merged: student/ would be the model as it was. Fix: a LoraConfig."
            )
        if not hasattr(student.base_model, "merge_and_unload"):
            raise UserError(f"the student's adapter {name!r} cannot be merged by peft. Fix: a LoraConfig.")
    refuse_adapted_ties(base_model(student))
    plain_head(student)


def adapters_of(model: Any) -> list[str]:
    """Names of the adapters of a peft model, or that ``from_pretrained`` put into a model; none of a bare one."""
    return list(getattr(model, "peft_config", None) or {})


def _check_names(setting: str, targets: Any, names: list[str], student: PreTrainedModel) -> None:
    """That each is the end of a whole name."""
    for target in targets or ():
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise _matches_nothing(setting, target, student)


def _matches_nothing(setting: str, target: str, student: PreTrainedModel, also: str = "") -> UserError:
    if setting == "lora_target_parameters":
        ends = {".".join(name.split(".")[-3:]) for name, p in student.named_parameters() if p.dim() > 2}
    else:
        linear = setting == "lora_target_modules"
        modules = (name for name, m in student.named_modules() if name and (isinstance(m, nn.Linear) or not linear))
        ends = {end for name in modules if not (end := name.rpartition(".")[2]).isdecimal()}
    of = f"of {', '.join(sorted(ends)[:12])}" if ends else "leave it out"
    return UserError(
        f"peft cannot adapt {type(student).__name__}: student.{setting} has {target!r}, which is nothing of it. "
        f"Fix: {also or of}."
    )


def _leave_out(peft_config: Any, names: list[str]) -> None:
    """Adds to what a config excludes."""
    if not names:
        return
    given = peft_config.exclude_modules
    if isinstance(given, str):  # a regular expression over whole names
        peft_config.exclude_modules = "|".join([f"(?:{given})", *map(re.escape, names)])
    else:
        peft_config.exclude_modules = [*(given or ()), *names]


def _not_to_adapt(model: PreTrainedModel) -> Iterator[str]:
    """Layers that ``all-linear`` names and that an adapter cannot stand in for."""
    mamba = "mamba" in str(model.config.model_type) or model.config.model_type in ("falcon_h1", "nemotron_h")
    for name, module in model.named_modules():
        if mamba and name.rpartition(".")[2] in _READ_BY_KERNELS["mamba"]:
            yield name
        elif isinstance(module, nn.Linear) and not _is_plain(module):
            logger.warning("%s, a %s, is no plain linear layer: it is not adapted", name, type(module).__name__)
            yield name


@torch.no_grad()
def _is_plain(module: nn.Linear) -> bool:
    """Whether a layer computes x W^T + b: routers, for one, are subclasses that hand out the chosen experts."""
    if type(module).forward is nn.Linear.forward or type(module).__module__.startswith("bitsandbytes."):
        return True  # the latter computes it with a rounded W
    if zero3.is_sharded(module.weight) or module.weight.device.type == "meta":
        return False
    x = torch.linspace(-1, 1, 3 * module.in_features, device=module.weight.device, dtype=module.weight.dtype)
    x = x.view(3, -1)
    try:
        with evaluating(module):
            found = module(x)
    except Exception:  # it wants other arguments
        return False
    expected = nn.functional.linear(x, module.weight, module.bias)
    return isinstance(found, torch.Tensor) and found.shape == expected.shape and torch.allclose(found, expected)
