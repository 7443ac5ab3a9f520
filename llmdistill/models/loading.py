"""Models and tokenizers as recipes name them: folders and hub names, of weights or of an adapter."""

from __future__ import annotations

import json
import logging
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from llmdistill.compat.models import auto_class
from llmdistill.errors import UserError
from llmdistill.models.missing import why_not_loaded
from llmdistill.models.own_code import called_as_it_takes, is_adapted
from llmdistill.models.weights import refuse_adapted_ties
from llmdistill.recipe.config import DType, StudentConfig, TeacherConfig, torch_dtype
from llmdistill.recipe.launches import whole_models

# from_pretrained swaps PreTrainedModel.tie_weights out while it loads. Two threads that load at a time can put each
# other's stand-in back, and no weights are tied in this process ever after.
_one_load_at_a_time = threading.Lock()
logger = logging.getLogger(__name__)


def load_configured(
    config: StudentConfig | TeacherConfig, section: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer that a section of a recipe names; see :func:`load_model`, also for what it raises."""
    return load_model(
        config.model,
        config.dtype,
        section,
        config.trust_remote_code,
        config.attn_implementation,
        revision=config.revision,
        tokenizer=config.tokenizer,
        trained_on=getattr(config, "adapter", "merge") == "continue",
        quantised=getattr(config, "quantised", ""),
    )


def load_model(
    path: str,
    dtype: DType,
    section: str,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    *,
    revision: str = "",
    tokenizer: str = "",
    trained_on: bool = False,
    quantised: Literal["", "4bit", "8bit"] = "",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder or hub name. The adapter of an adapter's folder is merged into its base, and that
    is said.

    Args:
        section: of the recipe, for messages.
        revision: branch, tag or commit of a hub model; empty: its main branch.
        tokenizer: folder or hub name of another tokenizer than the model's; empty: the model's, or its adapter's.
        trained_on: an adapter is not merged but what will be trained.
        quantised: its linear layers but the head in 4 bits (NF4, the scales quantised too; QLoRA) or in 8.

    Raises:
        UserError: nothing loadable there, an adapter that cannot be merged, or none where one is to be trained on; the
            message names the setting.
    """
    if not path:
        raise UserError(f"{section}.model is empty; it must be a folder or a hub name. Fix: --{section}.model PATH.")
    hub: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision or None}
    options = {**hub, "dtype": torch_dtype(dtype), "attn_implementation": attn_implementation}
    if quantised:
        options |= {"quantization_config": _quantisation(quantised, options["dtype"])}
    base = adapter_base(path, section, revision)
    if base and quantised:
        raise UserError(
            f"{section}.model {path!r} is an adapter, which is not merged into quantised weights. Fix: its base "
            f"{base!r} as {section}.model, or leave {section}.load_in_{quantised} out."
        )
    if trained_on and not base:
        raise UserError(
            f"{section}.adapter is continue, and {section}.model {path!r} is no adapter. "
            f"Fix: --{section}.adapter merge, or --{section}.lora_r for a new one."
        )
    of = f", an adapter of {base!r}," if base else ""
    source = tokenizer or tokenizer_source(path, base)
    try:
        found = AutoTokenizer.from_pretrained(source, **({} if tokenizer else hub))
    except (OSError, ValueError, ImportError) as error:
        setting = f"{section}.tokenizer {tokenizer!r}" if tokenizer else f"{section}.model {path!r}{of}"
        raise UserError(f"{setting} cannot be loaded: {why_not_loaded(source, error)}") from error
    try:
        with _one_load_at_a_time, whole_models() if base else nullcontext():
            hub = {**hub, **({"revision": None} if base else {})}
            cls = auto_class(AutoConfig.from_pretrained(base or path, **hub))
            loaded: Any = cls.from_pretrained(base or path, **{**options, **hub}, output_loading_info=True)
            model, lost = loaded[0], sorted(loaded[1]["missing_keys"])
            if lost:  # transformers fills them with random numbers
                raise UserError(
                    f"{section}.model {base or path!r} lacks {len(lost)} weights of {type(model).__name__}, such as "
                    f"{lost[0]}: they would be random. Fix: a whole checkpoint of that class."
                )
            return (_adapted(model, path, base, revision, section, trained_on) if base else model), found
    except UserError:
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as error:  # of an attention, of code of the model's own
        raise UserError(
            f"{section}.model {path!r}{of} cannot be loaded: {why_not_loaded(base or path, error)}"
        ) from error


def _quantisation(bits: str, dtype: Any) -> Any:
    """In the dtype that the layers compute in: that of the other weights."""
    from transformers import BitsAndBytesConfig

    if bits == "8bit":
        # Columns of outliers are found over all tokens, and computed apart: an earlier token would see the later ones.
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    compute = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def named_student(
    model: str | PreTrainedModel, processing_class: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What a trainer is given: a model, or a folder or hub name to load in float32 with its tokenizer.

    Raises:
        UserError: a model without a tokenizer; and as :func:`load_model`.
    """
    if isinstance(model, str):
        model, tokenizer = load_model(model, "float32", "student")
        processing_class = processing_class or tokenizer
    if processing_class is None:
        raise UserError("processing_class is None; with a model object give its tokenizer too")
    return model, processing_class


def load_saved(folder: Path, like: Any) -> tuple[PreTrainedModel, list[str]]:
    """A student from the folder it was saved to, on the CPU, in the dtype and with the attention of the model it was
    saved from; and the weights of its that were not found there or did not fit. A folder may hold an adapter."""
    remote = type(like).__module__.startswith("transformers_modules")
    options: dict[str, Any] = {"dtype": like.dtype, "attn_implementation": like.config._attn_implementation}
    if (quantisation := getattr(like.config, "quantization_config", None)) is not None:
        options["quantization_config"] = quantisation  # what an adapter was trained upon
    with _one_load_at_a_time, whole_models():
        loaded: Any = auto_class(like.config).from_pretrained(
            folder, trust_remote_code=remote, output_loading_info=True, **options
        )
    saved, found = loaded
    if is_adapted(like):
        called_as_it_takes(saved)
    return saved.eval(), sorted({*found["missing_keys"], *(str(key[0]) for key in found["mismatched_keys"])})


def adapter_base(path: str, section: str, revision: str = "") -> str:
    """The model that an adapter's folder or hub name adapts; empty where there are weights.

    Raises:
        UserError: the adapter does not name it.
    """
    try:
        file = find_adapter_config_file(path, revision=revision or None)
    except (OSError, ValueError):  # nothing of that name: loading says so
        return ""
    if file is None or (Path(path) / "config.json").is_file() and _has_weights(Path(path)):
        return ""
    base = str(json.loads(Path(file).read_text()).get("base_model_name_or_path") or "")
    if not base or (Path(base) / "adapter_config.json").is_file():
        found = f"{base!r}, an adapter itself," if base else "no model"
        raise UserError(
            f"{section}.model {path!r}: adapter_config.json names {found} as its base_model_name_or_path. "
            "Fix: write the model there, or merge by hand and give the merged model."
        )
    return base


def _adapted(
    model: Any, path: str, base: str, revision: str, section: str, trained_on: bool = False
) -> PreTrainedModel:
    """``model`` with the adapter in ``path`` merged in, or on it to be trained.

    Raises:
        UserError: it does not fit the model, or trains no weights of it.
    """
    from peft import PeftModel

    fix = f"Fix: merge it by hand, and give the merged model as {section}.model"
    try:
        wrapped: Any = PeftModel.from_pretrained(model, path, revision=revision or None, is_trainable=trained_on)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"{section}.model {path!r}, an adapter, does not fit {base!r}: {_first_line(error)} {fix}."
        ) from error
    if any(getattr(config, "is_prompt_learning", False) for config in wrapped.peft_config.values()):
        raise UserError(
            f"{section}.model {path!r} is a trained prompt, and no weights that could be merged. Fix: {base!r}."
        )
    refuse_adapted_ties(wrapped.get_base_model())
    if trained_on:
        logger.warning("%s.model %s is an adapter of %s: it is trained on", section, path, base)
        return wrapped  # type: ignore[no-any-return]
    merged: PreTrainedModel = wrapped.merge_and_unload()
    merged.requires_grad_(True)  # an adapter's base is frozen
    vars(merged).pop("peft_config", None)
    merged.config._name_or_path = path
    logger.warning("%s.model %s is an adapter of %s: merged into it, and trained from there", section, path, base)
    return merged


def tokenizer_source(path: str, base: str) -> str:
    """Where the tokenizer of a model is: an adapter's folder may have one of its own, or leave it to its base."""
    return base if base and Path(path).is_dir() and not any(Path(path).glob("tokenizer*")) else path


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("model*.safetensors")) or any(folder.glob("pytorch_model*.bin"))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
