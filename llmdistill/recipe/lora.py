"""The LoRA settings of a student, in the forms that people write them, as peft's ``LoraConfig``."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

from llmdistill.errors import UserError
from llmdistill.recipe.settings import Conflict, check_conflicts, require

ALL_LINEAR = "all-linear"
_REGEX = re.compile(r"[\\*+?()|^$\[\]{}]")  # what a module's name has none of
# Starts of an adapter that need nothing but the model. The others of peft read data or quantised weights first.
INITS = ("true", "false", "gaussian", "orthogonal", "pissa", "olora")
_READ_FIRST = ("eva", "corda", "loftq", "lora_ga", "mica")
# They take a part of the weights out of the layers below the adapter.
_CHANGE_THE_BASE = ("pissa", "olora")

CONFLICTS: tuple[Conflict, ...] = (
    Conflict(
        lambda s: s.lora_r == 0 and (s.lora_modules_to_save or s.lora_target_parameters or s.use_dora or s.use_rslora),
        "student.lora_r is 0, and lora_modules_to_save, lora_target_parameters, use_dora, use_rslora are of an adapter",
        "--student.lora_r 16, or leave them out",
    ),
    Conflict(
        lambda s: s.lora_r == 0 and s.init_lora_weights != "true",
        "student.lora_r is 0, and student.init_lora_weights {init_lora_weights} is how an adapter starts",
        "--student.lora_r 16, or leave it out",
    ),
    Conflict(
        lambda s: s.saved_as == "adapter" and changes_base(s.init_lora_weights),
        "student.saved_as is adapter, and student.init_lora_weights {init_lora_weights} changes the weights below the "
        "adapter, to which engines would add it as they were",
        "--student.saved_as merged, or --student.init_lora_weights true",
    ),
    Conflict(
        lambda s: s.load_in_4bit and s.load_in_8bit,
        "student.load_in_4bit and student.load_in_8bit are both true",
        "one of them",
    ),
    Conflict(
        lambda s: _quantised(s) and s.lora_r == 0,
        "student.load_in_4bit or load_in_8bit is true, and quantised weights are not trained but an adapter on them",
        "--student.lora_r 16",
    ),
    Conflict(
        lambda s: _quantised(s) and s.saved_as == "merged",
        "student.load_in_4bit or load_in_8bit is true, and student.saved_as merged: an adapter is not merged into "
        "weights that were rounded",
        "--student.saved_as adapter, whose folder transformers and vLLM load upon the model as it was",
    ),
    Conflict(
        lambda s: _quantised(s) and changes_base(s.init_lora_weights),
        "student.init_lora_weights is {init_lora_weights}, which changes the weights below the adapter, and those are "
        "quantised (student.load_in_4bit, load_in_8bit)",
        "--student.init_lora_weights true",
    ),
    Conflict(
        lambda s: _quantised(s) and not importlib.util.find_spec("bitsandbytes"),
        "student.load_in_4bit or load_in_8bit is true, and bitsandbytes, which quantises, is not installed",
        "pip install bitsandbytes, or --student.dtype bfloat16 with --student.lora_r 16",
    ),
)


def _quantised(student: Any) -> bool:
    return bool(student.load_in_4bit or student.load_in_8bit)


def check_lora(student: Any) -> None:
    """Brings the LoRA settings of a ``StudentConfig`` into one form, and refuses what they cannot be.

    Raises:
        UserError: names the setting, the value and what is needed.
    """
    for name in ("lora_target_modules", "lora_modules_to_save", "lora_target_parameters"):
        setattr(student, name, names_of(getattr(student, name), f"student.{name}"))
    student.init_lora_weights = str(student.init_lora_weights).lower()
    require(student.lora_r >= 0, "student.lora_r", student.lora_r, ">= 0", "use 16, or 0 for no adapter")
    require(student.lora_alpha > 0, "student.lora_alpha", student.lora_alpha, "> 0", "use 32")
    require(0 <= student.lora_dropout < 1, "student.lora_dropout", student.lora_dropout, "in [0, 1)", "use 0")
    for name in ("lora_modules_to_save", "lora_target_parameters"):
        patterns = [n for n in getattr(student, name) if _REGEX.search(n) or n == ALL_LINEAR]
        require(not patterns, f"student.{name}", patterns, "names, no pattern", "the names one by one")
    init = student.init_lora_weights
    if init in _READ_FIRST:
        raise UserError(
            f"student.init_lora_weights is {init!r}, which peft prepares from data or other weights. Fix: true, or "
            "from Python a model with an adapter that was prepared so."
        )
    known = init in INITS or re.fullmatch(r"pissa_niter_\d+", init)
    require(bool(known), "student.init_lora_weights", init, f"one of {', '.join(INITS)}, pissa_niter_N", "use true")
    check_conflicts(student, CONFLICTS)


def names_of(given: Any, setting: str) -> list[str]:
    """A list of names, or of one regular expression, or ``all-linear``: of a text with commas or spaces, or a list.

    Raises:
        UserError: a regular expression that is none, or is beside others.
    """
    words = [given] if isinstance(given, str) else list(given or [])
    require(all(isinstance(w, str) for w in words), setting, given, "names of modules", "'[q_proj, v_proj]'")
    names: list[str] = []
    for word in words:
        names += [word.strip()] if _REGEX.search(word) else [w for w in re.split(r"[,\s]+", word) if w]
    patterns = [name for name in names if _REGEX.search(name)]
    if len(names) > 1 and (patterns or ALL_LINEAR in names):
        alone = patterns[0] if patterns else ALL_LINEAR
        raise UserError(
            f"{setting} has {alone!r} and {len(names) - 1} more; peft takes names, or one regular expression, or "
            f"{ALL_LINEAR}. Fix: one regular expression for all, as '.*\\.(q_proj|v_proj)'."
        )
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"{setting} is {pattern!r}, no regular expression: {error}. Fix: names, or mend it."
            ) from None
    return names


def lora_config(student: Any) -> Any:
    """peft's LoraConfig of a ``StudentConfig``, or None when the weights themselves are trained."""
    if student.lora_r == 0:
        return None
    from peft import LoraConfig

    modules: list[str] = student.lora_target_modules
    init = {"true": True, "false": False}.get(student.init_lora_weights, student.init_lora_weights)
    return LoraConfig(
        r=student.lora_r,
        lora_alpha=student.lora_alpha,
        lora_dropout=student.lora_dropout,
        target_modules=_target(modules, bool(student.lora_target_parameters)),
        target_parameters=student.lora_target_parameters or None,
        modules_to_save=student.lora_modules_to_save or None,
        use_dora=student.use_dora,
        use_rslora=student.use_rslora,
        init_lora_weights=init,  # type: ignore[arg-type]
        task_type="CAUSAL_LM",
    )


def changes_base(init: Any) -> bool:
    """Whether an adapter that starts so is not on top of the model as it was."""
    return str(init).startswith(_CHANGE_THE_BASE)


def is_pattern(name: str) -> bool:
    """Whether a target is a regular expression over whole names."""
    return bool(_REGEX.search(name))


def _target(modules: list[str], others: bool) -> list[str] | str:
    """As peft takes it; nothing beside parameters that are named, else every linear layer."""
    if not modules:
        return [] if others else ALL_LINEAR
    alone = modules[0] == ALL_LINEAR or is_pattern(modules[0])
    return modules[0] if alone else modules
