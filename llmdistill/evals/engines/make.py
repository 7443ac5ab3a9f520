"""From the settings of an evaluation to its engine: first what prompts need, the model only when it is needed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from llmdistill.errors import UserError
from llmdistill.evals.config import EvalConfig
from llmdistill.evals.engines.base import Engine
from llmdistill.evals.engines.http import OpenAIEngine, RemoteEngine
from llmdistill.models.loading import adapter_base, load_model, tokenizer_source
from llmdistill.models.missing import is_a_path, why_not_loaded
from llmdistill.recipe.config import bearer_token
from llmdistill.teachers.fingerprint import stored_dtype, weights_fingerprint
from llmdistill.tokenization.special import context_length


@dataclass(frozen=True)
class Source:
    """A model that can be asked, not yet loaded.

    Attributes:
        name: how results name it.
        fingerprint: of its weights; None where they are out of sight.
        dtype: of its weights once they are loaded, as "bfloat16", never "auto"; None likewise.
        tokenizer: None where an endpoint applies its own.
        context: tokens that prompt and completion may have together.
        engine: loads it, for sequences up to a length.
    """

    name: str
    fingerprint: str | None
    dtype: str | None
    tokenizer: PreTrainedTokenizerBase | None
    context: int
    engine: Callable[[int], Engine]


def open_source(config: EvalConfig) -> Source:
    """Tokenizer, context and fingerprint of what ``config`` names. Endpoints are asked here, models are not loaded.

    Raises:
        UserError: nothing there, or an engine that cannot be.
    """
    kind = config.resolved_engine
    if kind in ("openai", "remote"):
        return _behind_url(config, kind)
    base = adapter_base(config.model, "eval")  # whose weights are the adapter's too
    tokenizer = _tokenizer_of(config, base)
    try:
        settings = AutoConfig.from_pretrained(base or config.model, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise _unreadable("model", base or config.model, error) from error

    def load(longest: int) -> Engine:
        # here, not above: both take seconds to import
        from llmdistill.evals.engines.local import HFEngine, VLLMSampler

        if kind == "vllm":
            from llmdistill.models.merged import whole_checkpoint

            with whole_checkpoint(config.model, config.dtype, "eval", config.trust_remote_code) as folder:
                return VLLMSampler.load(
                    folder,
                    tokenizer,
                    dtype=config.dtype,
                    max_model_len=longest,
                    kv_cache_gib=config.kv_cache_gib,
                    gpu_memory_utilization=config.gpu_memory_utilization,
                    trust_remote_code=config.trust_remote_code,
                )
        import torch

        if kind == "diffusion":
            return _diffusion(config, tokenizer)
        model, _ = load_model(config.model, config.dtype, "eval", config.trust_remote_code)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return HFEngine(model.to(device).eval(), tokenizer, batch_size=config.batch_size)  # type: ignore[arg-type]

    return Source(
        config.model,
        _fingerprint(config.model, base),
        resolved_dtype(config.dtype, kind, settings, base or config.model),
        tokenizer,
        context_length(settings),
        load,
    )


def resolved_dtype(dtype: str, engine: str, settings: Any, model: str) -> str | None:
    """What "auto" comes to: the dtype that the checkpoint's config names. Where it names none, our vLLM wrapper takes
    float32, and transformers that of the first stored weight."""
    if dtype != "auto":
        return dtype
    named = getattr(settings, "dtype", None) or getattr(settings.get_text_config(), "dtype", None)
    if named is not None:
        return str(named).removeprefix("torch.")
    return "float32" if engine == "vllm" else stored_dtype(model)


def _diffusion(config: EvalConfig, tokenizer: PreTrainedTokenizerBase) -> Engine:
    import torch

    from llmdistill.diffusion.backbone import MaskedDiffusionLM
    from llmdistill.diffusion.generation_config import generation_config
    from llmdistill.evals.engines.diffusion import DiffusionEngine, without_repulsion
    from llmdistill.recipe.config import torch_dtype
    from llmdistill.texts.rollout import Sampling

    settings, _ = without_repulsion(config.diffusion)
    generation_config(settings, Sampling(1), 1)  # a wrong setting is said before the model is loaded
    model, _ = MaskedDiffusionLM.from_pretrained(
        config.model, trust_remote_code=config.trust_remote_code, dtype=torch_dtype(config.dtype)
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return DiffusionEngine(model.to(device).eval(), tokenizer, config.diffusion, batch_size=config.batch_size)


def load_tokenizer(path: str, trust_remote_code: bool = False, setting: str = "tokenizer") -> PreTrainedTokenizerBase:
    """Raises :class:`UserError` where there is none; ``setting`` is what named it."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise _unreadable(setting, path, error) from error


def _tokenizer_of(config: EvalConfig, base: str = "") -> PreTrainedTokenizerBase:
    setting = "tokenizer" if config.tokenizer else "the tokenizer of model"
    source = config.tokenizer or tokenizer_source(config.model, base)
    return load_tokenizer(source, config.trust_remote_code, setting)


def _fingerprint(model: str, base: str) -> str:
    """Of the weights; of an adapter those of its base are a part."""
    own = weights_fingerprint(model)
    if not base:
        return own
    return hashlib.blake2b(f"{own} on {weights_fingerprint(base)}".encode(), digest_size=8).hexdigest()


def _behind_url(config: EvalConfig, kind: str) -> Source:
    token = bearer_token(config.token_env, "token_env")
    options = {"token": token, "timeout_s": config.timeout_s, "max_outage_s": config.max_outage_s}
    ours = kind == "remote" or config.api == "completions"
    tokenizer = None
    if ours:
        if not (config.tokenizer or config.model):
            raise UserError(
                f"tokenizer is '' and engine {kind} takes token ids; it must be the tokenizer of the model served. "
                "Fix: --tokenizer PATH_OR_NAME."
            )
        tokenizer = _tokenizer_of(config)
    if kind == "remote":
        assert tokenizer is not None
        service = RemoteEngine(config.url, tokenizer, concurrency=config.concurrency, **options)
        info = service.teacher.info()
        return Source(info.name, info.fingerprint, None, tokenizer, info.context_length, lambda longest: service)
    endpoint = OpenAIEngine(
        config.url,
        config.model,
        api=config.api,
        concurrency=config.concurrency,
        thinking=config.enable_thinking,
        chat_template_kwargs=config.template_kwargs,
        **options,
    )
    context = endpoint.context or 1 << 30
    return Source(endpoint.model, None, None, tokenizer, context, lambda longest: endpoint)


def _unreadable(setting: str, path: str, error: Exception) -> UserError:
    fix = "a folder that holds it" if is_a_path(path) else "a folder or a hub name"
    return UserError(f"{setting} {path!r} cannot be loaded: {why_not_loaded(path, error)} Fix: {fix}.")
