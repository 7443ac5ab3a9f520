"""Models of transformers: the class that makes one, checkpointing's switches, generation under every wrapper, and the
layout of checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, groupby
from typing import Any

from torch import Tensor, nn

from llmdistill.compat import fsdp
from llmdistill.compat.patching import patched

_LAYER = re.compile(r"(?:.*?\.\d+\.)?")  # what names of one layer begin with; nothing, of what is in none
_NAME = re.compile(".*")


def auto_class(config: Any) -> Any:
    """The auto class that makes a model of a checkpoint with this config: that of causal language models or, for those
    of images and sound with a decoder in them that it does not know, that of several modalities.

    Of some it makes the decoder alone, whose own config no auto class would know again (Mllama): those are whole too.
    A checkpoint that was saved as a masked language model (BERT) is one; and code of its own may name no class but that
    of any model (Dream).
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForMultimodalLM

    if any("MaskedLM" in name for name in getattr(config, "architectures", None) or ()):
        return AutoModelForMaskedLM
    own_code = getattr(config, "auto_map", None) or {}
    if "AutoModel" in own_code and "AutoModelForCausalLM" not in own_code:
        return AutoModel
    causal, several = AutoModelForCausalLM._model_mapping, AutoModelForMultimodalLM._model_mapping
    if "AutoModelForCausalLM" in own_code or type(config) not in several:
        return AutoModelForCausalLM
    made: Any = getattr(causal[type(config)], "config_class", None) if type(config) in causal else None
    return AutoModelForCausalLM if config.is_encoder_decoder or made in causal else AutoModelForMultimodalLM


def generation_settings_in(config: Any) -> dict[str, Any]:
    """What a model's config has of generation settings, as old checkpoints do; with any it is not saved."""
    found = getattr(config, "_get_generation_parameters", None)
    return dict(found()) if found is not None else {}


@contextmanager
def not_checkpointing(model: nn.Module) -> Iterator[None]:
    """Without gradient checkpointing inside; afterwards with what it was, function and arguments included."""
    on = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    for module in on:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in on:
            module.gradient_checkpointing = True  # type: ignore[assignment]


@contextmanager
def generation_ready(model: nn.Module, accelerator: Any) -> Iterator[nn.Module]:
    """The model to call ``generate`` on: unwrapped, gathered under ZeRO-3 and FSDP2, without gradient checkpointing.

    Every rank enters and leaves together, and may run as many forward passes in between as it likes: DeepSpeed's check
    that all ranks are at the same one, which TRL leaves in place, is set aside. Checkpointing is switched off here, at
    the modules' own switches: TRL would switch it on again with default arguments.
    """
    if getattr(accelerator.state.deepspeed_plugin, "zero_stage", 0) != 3:  # TRL need not be there
        with not_checkpointing(model), fsdp.whole_for_passes(model):
            yield accelerator.unwrap_model(model)
        return
    from trl.models import unwrap_model_for_generation

    with not_checkpointing(model), unwrap_model_for_generation(model, accelerator) as unwrapped:
        offload = getattr(getattr(model, "optimizer", None), "parameter_offload", None)
        check = getattr(offload, "fwd_pre_hook", None)
        hook = unwrapped._forward_pre_hooks.pop(check.id) if check else None
        try:
            yield unwrapped
        finally:
            if check:  # TRL's own hooks come back behind it, which is their order
                unwrapped._forward_pre_hooks[check.id] = hook


def as_stored(model: Any, pairs: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """A model's weights under the names and in the shapes of its checkpoint.

    transformers lays some tensors out anew in memory (fused experts), within a layer: of such models no more than a
    layer's are held here. Those of most it renames, if that.
    """
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, revert_weight_conversion

    if not isinstance(model, PreTrainedModel):
        return pairs
    known = getattr(model, "_weight_conversions", None)
    conversions = get_model_conversion_mapping(model, add_legacy=False) if known is None else known
    if not conversions:
        return pairs
    together = _LAYER if any(isinstance(entry, WeightConverter) for entry in conversions) else _NAME
    groups = groupby(pairs, lambda pair: together.match(pair[0]).group())  # type: ignore[union-attr]
    return chain.from_iterable(revert_weight_conversion(model, dict(group)).items() for _, group in groups)


def not_stored(model: Any, shared: Iterable[Sequence[str]]) -> set[str]:
    """The names of weights that a checkpoint is without: those made anew, and of tied ones all but that which loading
    looks for.

    Args:
        shared: the names of every weight that has several.
    """
    found = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    tied = [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in getattr(module, "_tied_weights_keys", None) or ()
    ]
    for names in shared:
        known = [name for name in sorted(names) if any(re.search(pattern, name) for pattern in tied)]
        found.update(known[: len(names) - 1])
    return found


@contextmanager
def without_writing_weights() -> Iterator[None]:
    """``save_pretrained`` does all it does but write tensors to the disk."""
    from transformers import modeling_utils

    with patched(modeling_utils, "safe_save_file", lambda *args, **kwargs: None):
        yield
