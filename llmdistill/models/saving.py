"""Saving a student, and looking before the first step and after the last whether it can be, and is, what was trained.

What a library refuses to write (generation settings that contradict each other) would lose a run at its first
checkpoint; what it writes under wrong names is random weights to whoever loads it, without a word. So every student is
saved once into nothing before it is trained, and what was saved at the end is loaded again and compared with the model
in memory on a few tokens.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import cached_file

from llmdistill.compat import fsdp, zero3
from llmdistill.compat.models import generation_settings_in, without_writing_weights
from llmdistill.errors import UserError
from llmdistill.models.adapters import refuse_unmergeable
from llmdistill.models.few_tokens import few_tokens
from llmdistill.models.helpers import NAME as HELPERS
from llmdistill.models.loading import load_saved
from llmdistill.models.modes import attends_in_16_bits, trying_out
from llmdistill.models.weight_files import saved_weights, write_weights
from llmdistill.models.weights import base_model, gathered, whole
from llmdistill.texts.views import plain

SKIPPED_BY = "saved-student"  # --skip-check
PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
COMPARED_TOKENS = 16
# Distance of the two models' log-probs over the spread of one's. float32 on another device differs by 1e-5; adapters
# merged in 16 bits, and experts chosen anew because of it, by some per cent. Lost weights give 0.5 and more.
ALLOWED = {torch.float32: 1e-3, torch.float64: 1e-3}
ALLOWED_16 = 0.2
logger = logging.getLogger(__name__)


def check_savable(student: Any, tokenizer: Any, *, writes: bool = True) -> None:
    """Before the first step: mends generation settings that would not be saved, and saves the student into nothing.

    Args:
        writes: whether this process will save; others only mend and look at the adapters.

    Raises:
        UserError: the student, its adapters or its tokenizer cannot be saved.
    """
    refuse_unmergeable(student)
    mend_generation_config(base_model(student))
    if not writes:
        return
    sharded = any(zero3.is_sharded(p) or hasattr(p, "full_tensor") for p in student.parameters())
    bare = sharded or quantised(student) or hasattr(student, "peft_config")
    with tempfile.TemporaryDirectory() as folder:
        try:
            with without_writing_weights():
                # Shards are gathered by all processes together, once there is an engine: only what is beside them here.
                _write(student, folder, {} if bare else dict(student.state_dict()))
                tokenizer.save_pretrained(folder)
            if bare and not (sharded or quantised(student)):
                for _ in saved_weights(student):  # adapters can be merged
                    pass
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), "")
            raise UserError(
                f"the student {base_model(student).config.name_or_path or type(base_model(student)).__name__!r} cannot "
                f"be saved: {type(error).__name__} {reason} Fix: mend that in its folder before it is trained."
            ) from error


def quantised(student: Any) -> bool:
    """Whether its weights are 4 or 8 bits each: only an adapter of it is saved."""
    return getattr(base_model(student), "quantization_method", None) is not None


def mend_generation_config(model: Any) -> None:
    """Makes a model's generation settings such that they can be saved: where they sample and say that they do not (as
    Llama-2 and much that came of it), they sample; what contradicts the rest beyond that is left out. Those that old
    checkpoints keep in the model's config are moved to where they belong.

    Raises:
        UserError: they can still not be saved.
    """
    config = getattr(model, "generation_config", None)
    for name, value in generation_settings_in(model.config).items():
        vars(model.config).pop(name, None)
        if config is not None and getattr(config, name, None) is None:
            setattr(config, name, value)
    if config is not None and (config.pad_token_id or 0) < 0:  # Llama-1's -1: none
        config.pad_token_id = None
    if config is None or (problem := _invalid(config)) is None:
        return
    config.do_sample = True
    if (rest := _invalid(config)) is not None:
        config.do_sample = False
        fresh = type(config)()
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            setattr(config, name, getattr(fresh, name, None))
        for name in ("early_stopping", "length_penalty", "num_return_sequences"):
            if getattr(config, "num_beams", None) in (None, 1):
                setattr(config, name, getattr(fresh, name, None))
        rest = _invalid(config)
    if rest is not None:
        raise UserError(
            f"the student's generation settings cannot be saved: {rest} Fix: mend generation_config.json in its folder."
        )
    logger.warning(
        "the student's generation settings could not be saved (%s): do_sample is now %s", problem, config.do_sample
    )


def save_student(model: Any, folder: Path, tokenizer: Any, *, main_process: bool = True) -> None:
    """Whole weights in ``folder``, adapters merged, as ``from_pretrained`` and vLLM load them. Every process calls it,
    for ZeRO-3 puts shards together as they come; the main one writes."""
    if main_process:
        with without_writing_weights():
            _write(model, folder, {})
        tokenizer.save_pretrained(folder)
    write_weights(model, folder, main_process=main_process)


def save_in_parts(model: Any, folder: Path, tokenizer: Any, *, main_process: bool = True) -> None:
    """What ``save_model`` writes of a model that ZeRO-3 or FSDP2 shards: whole weights, or the adapter alone. Every
    process calls it; the main one writes."""
    if not hasattr(model, "peft_config"):
        save_student(model, folder, tokenizer, main_process=main_process)
        return
    fsdp.shard_again(model)
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and f"{HELPERS}." not in name:
            with gathered([parameter]):
                state[name] = whole(parameter).cpu()
    if main_process:
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)


def keep_processor(model: Any, source: str, revision: str, folder: Path) -> None:
    """Of a model of several modalities, what images and sounds are read with: engines ask for it, though all is text.

    Args:
        source: folder or hub name of the model that was trained.
    """
    config = base_model(model).config
    for name in PROCESSOR if config.get_text_config() is not config else ():
        try:
            found = cached_file(source, name, revision=revision or None)
        except OSError:  # none has all of them
            continue
        if found is not None and not (folder / name).exists():
            shutil.copyfile(found, folder / name)


def logits_on_few_tokens(model: nn.Module, forward_model: nn.Module) -> Tensor:
    """Logits of the model on a few tokens, [T, V] float32 on the CPU. Every process calls it.

    Args:
        forward_model: the model as it is run in training.
    """
    view = plain(few_tokens(model, COMPARED_TOKENS))
    with trying_out(model):
        return forward_model(**view.inputs(), use_cache=False).logits[0].float().cpu()  # type: ignore[no-any-return]


def differs_from(logits_TV: Tensor, folder: Path, model: Any) -> str | None:
    """What is wrong with the student in a folder, loaded again: its distance from the trained one; None: nothing.

    Args:
        logits_TV: of the trained one, of :func:`logits_on_few_tokens`.
    """
    model = base_model(model)
    lost: list[str] = []
    try:
        saved, lost = load_saved(folder, model)
        found_TV = logits_on_few_tokens(saved, saved)
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        return _problem(folder, f"cannot be loaded again: {type(error).__name__} {reason}", lost)
    if found_TV.shape != logits_TV.shape:
        return _problem(folder, f"has {found_TV.shape[-1]} logit columns, trained were {logits_TV.shape[-1]}", lost)
    distance = relative_distance(found_TV, logits_TV)
    allowed = ALLOWED_16 if attends_in_16_bits(model) else ALLOWED.get(model.dtype, ALLOWED_16)
    if lost or not distance <= allowed:
        return _problem(
            folder, f"is another model than was trained: its log-probs are {distance:.2g} (relative) off", lost
        )
    return None


def relative_distance(found_TV: Tensor, logits_TV: Tensor) -> float:
    """Distance of two models' log-probs over the spread of the second's."""
    found, expected = found_TV.log_softmax(-1), logits_TV.log_softmax(-1)
    spread = (expected - expected.mean(-1, keepdim=True)).norm()
    return float((found - expected).norm() / spread.clamp(min=1e-12))


def _problem(folder: Path, what: str, lost: list[str]) -> str:
    names = f" ({len(lost)} weights were not found, such as {lost[0]})" if lost else ""
    return (
        f"{folder} {what}{names}. The newest checkpoint, or adapter/, beside it still has what was trained. "
        f"Fix: report it with the student's architecture; --skip-check {SKIPPED_BY} leaves this comparison out."
    )


def _write(model: Any, folder: str | Path, weights: dict[str, Tensor]) -> None:
    base_model(model).save_pretrained(folder, state_dict=weights)


def _invalid(config: Any) -> str | None:
    """Why generation settings cannot be saved; None where they can."""
    try:
        config.validate(strict=True)
    except ValueError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return next((line for line in lines if line.startswith(("-", "`"))), lines[0] if lines else "")
    return None
