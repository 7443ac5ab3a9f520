"""Who is asked: the models behind the roles of a writer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from transformers import AutoConfig, PreTrainedTokenizerBase

from llmdistill.datagen.engines.base import Engine, Reader
from llmdistill.datagen.engines.probe import NAMED, Probe
from llmdistill.datagen.spending import Price
from llmdistill.errors import UserError
from llmdistill.models.missing import why_not_loaded
from llmdistill.recipe.config import TOKEN_ENV, DType, bearer_token
from llmdistill.recipe.settings import option, require
from llmdistill.teachers.fingerprint import template_hash, tokenizer_fingerprint, weights_fingerprint
from llmdistill.tokenization.special import context_length

LOCAL = ("vllm", "hf", "diffusion")  # engines in this process


@dataclass
class RoleConfig:
    """A model that writes: loaded here (``model``) or asked over HTTP (``url``)."""

    model: str = option("", "folder or hub name; behind a url: the name the endpoint knows it by")
    engine: Literal["auto", "vllm", "hf", "diffusion", "openai", "remote"] = option(
        "auto",
        "vllm, hf, diffusion (a denoiser): in this process; openai: an endpoint; remote: our service; auto: vllm where "
        "installed",
    )
    diffusion: dict[str, Any] = option({}, "engine diffusion: how it denoises, as JSON: select, threshold, order, ...")
    url: str = option("", "of an endpoint or service; replicas with commas")
    tokenizer: str = option("", "of the model behind our service, where it is not the model's own")
    dtype: DType = option("auto", "of the weights; auto: the checkpoint's")
    chat_template_kwargs: dict[str, Any] = option({}, "what the chat template reads beside the messages, as JSON")
    token_env: str = option(TOKEN_ENV, "environment variable that holds the bearer token")
    concurrency: int = option(32, "calls at one time to an endpoint or service")
    timeout_s: float = option(3600.0, "seconds until a call to an endpoint is tried again")
    max_outage_s: float = option(600.0, "seconds without any answer until generation gives up")
    logprobs: Literal["auto", "on", "off"] = option("auto", "ask an endpoint for log-probs; auto: where it is vLLM")
    batch_size: int = option(16, "sequences of one batch of engine hf; 1: nothing depends on the company")
    max_model_len: int = option(0, "engine vllm: longest prompt and completion; 0: the model's own")
    kv_cache_gib: float = option(2.0, "memory for vllm's key-value cache on CPU")
    gpu_memory_utilization: float = option(0.85, "share of the GPU given to vllm")
    prompt_price: float = option(0.0, "of a million prompt tokens")
    completion_price: float = option(0.0, "of a million completion tokens")
    trust_remote_code: bool = option(False, "run model code that comes with the checkpoint")

    def __post_init__(self) -> None:
        require(bool(self.model or self.url), "model", self.model, "a folder or hub name, or a url", "name one")
        local = self.engine in LOCAL
        denoises = self.engine == "diffusion"
        needed = "empty for other engines than diffusion"
        require(denoises or not self.diffusion, "diffusion", self.diffusion, needed, "--engine diffusion")
        require(not (self.url and local), "url", self.url, f"empty for engine {self.engine}", "engine openai or remote")
        behind = self.engine in ("openai", "remote")
        require(bool(self.url) or not behind, "url", self.url, f"set for engine {self.engine}", "--url URL")
        for name in ("concurrency", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1", "use 16")
        for name in ("prompt_price", "completion_price", "max_model_len"):
            require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0", "use 0")

    @property
    def resolved_engine(self) -> Literal["vllm", "hf", "diffusion", "openai", "remote"]:
        """The engine, where it was left open."""
        if self.engine != "auto":
            return self.engine
        if self.url:
            return "openai"
        from importlib.util import find_spec

        return "vllm" if find_spec("vllm") else "hf"


@dataclass(frozen=True)
class Role:
    """A model that can be asked.

    Attributes:
        model: its name.
        fingerprint: of its weights, or "name:NAME" of an endpoint, which does not tell.
        template: hash of the chat template it reads messages with, None where an endpoint applies its own.
        tokenizer: fingerprint of its vocabulary, None where its answers come without ids.
        about: what else decides what it says: dtype, settings of the template.
        price: of its tokens.
        engine: loads it, or gives the open connection; a model is not loaded before it is asked.
        close: the connection, where one is open whether it was asked or not.
        probe: what else stands for the weights of an endpoint, None where it does not say.
        check_weights: raises UserError where the endpoint has been given others since.
    """

    model: str
    fingerprint: str
    template: str | None
    tokenizer: str | None
    about: Mapping[str, Any]
    price: Price
    engine: Callable[[], Engine]
    close: Callable[[], None] = lambda: None
    probe: Probe | None = None
    check_weights: Callable[[], None] = lambda: None

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides what it says."""
        return {"model": self.model, "fingerprint": self.fingerprint, "template": self.template, **self.about}

    @property
    def known_by_name(self) -> bool:
        """Nothing but a name stands for its weights."""
        return self.fingerprint.startswith(NAMED) and self.probe is None


def open_role(config: RoleConfig | Mapping[str, Any] | str, name: str = "teacher") -> Role:
    """A role from its settings, or from a model's folder, hub name or url. Endpoints are asked who they are.

    Raises:
        UserError: unknown settings, nothing there, or a model that cannot be read.
    """
    config = role_config(config, name)
    kind = config.resolved_engine
    price = Price(config.prompt_price, config.completion_price)
    settings_told = {"chat_template_kwargs": config.chat_template_kwargs, "diffusion": config.diffusion}
    told: dict[str, Any] = {key: value for key, value in settings_told.items() if value}
    if kind == "openai":
        from llmdistill.datagen.engines.endpoint import EndpointEngine

        endpoint = EndpointEngine(config.url, config.model, logprobs=config.logprobs, **_connection(config, name))
        return Role(
            endpoint.model,
            endpoint.identity,
            None,
            None,
            told,
            price,
            lambda: endpoint,
            close=endpoint.close,
            probe=endpoint.probe,
            check_weights=endpoint.check_weights,
        )
    tokenizer = _tokenizer(config, name)
    names = template_hash(tokenizer), tokenizer_fingerprint(tokenizer)
    if kind == "remote":
        from llmdistill.datagen.engines.service import ServiceEngine

        service = ServiceEngine(config.url, tokenizer, **_connection(config, name))
        info = service.teacher.info()
        if info.tokenizer != names[1]:
            service.close()
            raise UserError(
                f"{name}.tokenizer {config.tokenizer or config.model!r} is not the tokenizer of the service's model "
                f"{info.name!r}. Fix: --{name}.tokenizer with that model's."
            )
        return Role(info.name, info.fingerprint, *names, told, price, lambda: service, service.close)
    try:
        settings = AutoConfig.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}.model {config.model!r}: {why_not_loaded(config.model, error)}") from error
    fingerprint = _fingerprint(config)
    about = {"engine": kind, "dtype": config.dtype, **told}
    context = context_length(settings)
    load = {"vllm": _load_vllm, "hf": _load_hf, "diffusion": _load_diffusion}[kind]
    return Role(config.model, fingerprint, *names, about, price, lambda: load(config, tokenizer, context))


def role_config(config: RoleConfig | Mapping[str, Any] | str, name: str = "teacher") -> RoleConfig:
    """Settings from whatever names a model. Raises UserError for settings that there are not."""
    if isinstance(config, RoleConfig):
        return config
    if isinstance(config, str):
        return RoleConfig(url=config) if config.startswith(("http://", "https://")) else RoleConfig(model=config)
    known = [f.name for f in fields(RoleConfig)]
    if unknown := [key for key in config if key not in known]:
        raise UserError(f"{name} has the unknown setting {unknown[0]!r}. Fix: one of {', '.join(known)}.")
    return RoleConfig(**config)


def described(config: RoleConfig) -> dict[str, Any]:
    """What of a role is said and not the default, without what changes nothing of what it writes; and the fingerprint
    of weights that are here."""
    plain = asdict(RoleConfig(model="-"))
    ours = ("concurrency", "timeout_s", "max_outage_s", "token_env", "batch_size", "kv_cache_gib")
    passing = (*ours, "gpu_memory_utilization", "prompt_price", "completion_price", "url")
    said = {k: v for k, v in asdict(config).items() if v != plain[k] and k not in passing}
    if config.resolved_engine in LOCAL:
        said["fingerprint"] = _fingerprint(config)
    return said


def _fingerprint(config: RoleConfig) -> str:
    try:
        return weights_fingerprint(config.model)
    except (OSError, ValueError) as error:
        raise UserError(f"model {config.model!r} cannot be read: {why_not_loaded(config.model, error)}") from error


def _connection(config: RoleConfig, name: str) -> dict[str, Any]:
    return {
        "section": name,
        "in_flight": config.concurrency,
        "token": bearer_token(config.token_env, f"{name}.token_env"),
        "timeout_s": config.timeout_s,
        "max_outage_s": config.max_outage_s,
        "chat_template_kwargs": config.chat_template_kwargs,
    }


def _tokenizer(config: RoleConfig, name: str) -> PreTrainedTokenizerBase:
    from llmdistill.evals.engines.make import load_tokenizer

    if not (config.tokenizer or config.model):
        raise UserError(f"{name}.tokenizer is '' and the service takes token ids. Fix: --{name}.tokenizer NAME.")
    return load_tokenizer(config.tokenizer or config.model, config.trust_remote_code, f"{name}.tokenizer")


def _load_vllm(config: RoleConfig, tokenizer: PreTrainedTokenizerBase, context: int) -> Engine:
    from llmdistill.datagen.engines.local import VLLMEngine
    from llmdistill.evals.engines.local import checkpoint_eos_ids
    from llmdistill.models.vllm_engine import InProcessVLLM

    longest = min(config.max_model_len or context, context)
    engine = InProcessVLLM(
        config.model,
        "teacher",  # log-probs of what it draws from
        dtype=config.dtype,
        longest=longest,
        kv_cache_gib=config.kv_cache_gib,
        gpu_memory_utilization=config.gpu_memory_utilization,
        trust_remote_code=config.trust_remote_code,
    )
    reader = Reader(tokenizer, longest, config.chat_template_kwargs)
    return VLLMEngine(engine, reader, checkpoint_eos_ids(config.model, tokenizer))


def _load_hf(config: RoleConfig, tokenizer: PreTrainedTokenizerBase, context: int) -> Engine:
    import torch

    from llmdistill.datagen.engines.local import HFEngine
    from llmdistill.models.loading import load_model

    model, _ = load_model(config.model, config.dtype, "teacher", config.trust_remote_code)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reader = Reader(tokenizer, context, config.chat_template_kwargs)
    return HFEngine(model.to(device).eval(), reader, config.batch_size)  # type: ignore[arg-type]


def _load_diffusion(config: RoleConfig, tokenizer: PreTrainedTokenizerBase, context: int) -> Engine:
    import torch

    from llmdistill.datagen.engines.diffusion import DiffusionEngine
    from llmdistill.diffusion.backbone import MaskedDiffusionLM
    from llmdistill.recipe.config import torch_dtype

    model, own = MaskedDiffusionLM.from_pretrained(
        config.model, trust_remote_code=config.trust_remote_code, dtype=torch_dtype(config.dtype)
    )
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    reader = Reader(own, context, config.chat_template_kwargs)  # which has the mask token
    return DiffusionEngine(model, config.diffusion, reader, config.batch_size)
