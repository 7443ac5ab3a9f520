"""The settings of an evaluation. What a suite says is the default; what is set here goes before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from llmdistill.evals.engines.base import EngineName
from llmdistill.evals.engines.http import Api
from llmdistill.recipe.config import TOKEN_ENV, DType, require
from llmdistill.recipe.data_config import TEMPLATE_ARGUMENTS
from llmdistill.recipe.settings import option


@dataclass
class EvalConfig:
    """Of ``llmdistill eval`` and :func:`llmdistill.evals.evaluate`."""

    model: str = option("", "folder or hub name; behind --url: the name the endpoint knows it by")
    engine: Literal["auto", "vllm", "hf", "diffusion", "openai", "remote"] = option(
        "auto",
        "vllm, hf, diffusion (a masked diffusion model): in this process; openai: an endpoint; remote: our service; "
        "auto: vllm where installed",
    )
    diffusion: dict[str, Any] = option({}, "of engine diffusion: order, select, denoising_steps, …, as JSON")
    n: int | None = option(None, "samples of every problem")
    temperature: float | None = option(None, "sampling temperature; 0: greedy")
    top_p: float | None = option(None, "nucleus sampling")
    top_k: int | None = option(None, "sample among so many tokens; 0: all")
    max_new_tokens: int | None = option(None, "longest completion")
    template: str | None = option(None, "prompt template by name, instead of the suite's")
    few_shot: str = option("", "JSONL file of solved examples (question, answer) before every question: base models")
    thinking: Literal["default", "on", "off"] = option("default", "enable_thinking of chat templates that know it")
    system_prompt: str = option("", "system message of chat templates, where the suite's template has none")
    chat_template_kwargs: dict[str, Any] = option({}, "what chat templates read beside the messages, as JSON")
    seed: int = option(0, "of samples, subsample and intervals")
    limit: int = option(0, "only so many problems, drawn at random with the seed; 0: all")
    output_dir: str = option("", "folder of results, one below it for each suite; empty: runs/eval/MODEL")
    data_dir: str = option("", "folder with the benchmarks' files; empty: $LLMDISTILL_DATA, else the hub")
    dtype: DType = option("auto", "of the weights; auto: the checkpoint's")
    tokenizer: str = option("", "folder or hub name of the tokenizer, where the model itself is behind a url")
    url: str = option("", "of an endpoint or service; replicas with commas")
    api: Api = option("chat", "of an OpenAI endpoint: chat (its own template) or completions (ours)")
    token_env: str = option(TOKEN_ENV, "environment variable that holds the bearer token")
    concurrency: int = option(32, "requests to an endpoint at one time")
    timeout_s: float = option(3600.0, "seconds until a request to an endpoint is tried again")
    max_outage_s: float = option(600.0, "seconds without any answer until the evaluation gives up")
    kv_cache_gib: float = option(2.0, "memory for vllm's key-value cache on CPU")
    gpu_memory_utilization: float = option(0.85, "share of the GPU given to vllm")
    batch_size: int = option(16, "sequences of one batch of the hf and the diffusion engine")
    workers: int = option(0, "verdicts at one time; 0: one for each core")
    allow_unsafe_exec: bool = option(False, "run model-written programs where nothing confines them")
    trust_remote_code: bool = option(False, "run model code that comes with the checkpoint")

    def __post_init__(self) -> None:
        require(self.n is None or self.n >= 1, "n", self.n, ">= 1", "use 1")
        require(self.temperature is None or self.temperature >= 0, "temperature", self.temperature, ">= 0", "use 0")
        require(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]", "use 1")
        require(self.top_k is None or self.top_k >= 0, "top_k", self.top_k, ">= 0", "use 0")
        tokens = self.max_new_tokens
        require(tokens is None or tokens >= 1, "max_new_tokens", tokens, ">= 1", "raise it")
        require(self.limit >= 0, "limit", self.limit, ">= 0", "use 0 for all")
        require(self.concurrency >= 1, "concurrency", self.concurrency, ">= 1", "use 32")
        require(self.batch_size >= 1, "batch_size", self.batch_size, ">= 1", "use 16")
        require(self.workers >= 0, "workers", self.workers, ">= 0", "use 0 for one each core")
        for name in ("timeout_s", "max_outage_s", "kv_cache_gib"):
            require(getattr(self, name) > 0, name, getattr(self, name), "> 0", "leave it out")
        share = self.gpu_memory_utilization
        require(0 < share <= 1, "gpu_memory_utilization", share, "in (0, 1]", "use 0.85")
        local = self.engine in ("vllm", "hf", "diffusion")
        require(not (self.url and local), "url", self.url, f"empty for engine {self.engine}", "engine openai or remote")
        is_read = not self.diffusion or self.engine == "diffusion"
        require(is_read, "diffusion", self.diffusion, "empty for other engines", "--engine diffusion")
        told = self.thinking == "default" or "enable_thinking" not in self.chat_template_kwargs
        needed = "default beside chat_template_kwargs with enable_thinking"
        require(told, "thinking", self.thinking, needed, "leave one out")
        ours = [name for name in self.chat_template_kwargs if name in TEMPLATE_ARGUMENTS]
        require(not ours, "chat_template_kwargs", ours, "names that only the template reads", "leave them out")
        behind = self.engine in ("openai", "remote")
        require(bool(self.url) or not behind, "url", self.url, f"set for engine {self.engine}", "--url URL")
        require(bool(self.model or self.url), "model", self.model, "a folder or hub name", "--model PATH_OR_NAME")

    @property
    def enable_thinking(self) -> bool | None:
        """What chat templates are told; None: nothing."""
        if self.thinking == "default":
            return self.chat_template_kwargs.get("enable_thinking")
        return self.thinking == "on"

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """What chat templates are told besides."""
        return {k: v for k, v in self.chat_template_kwargs.items() if k != "enable_thinking"}

    @property
    def resolved_engine(self) -> EngineName:
        """The engine, where it was left open."""
        if self.engine != "auto":
            return self.engine
        if self.url:
            return "openai"
        from importlib.util import find_spec

        return "vllm" if find_spec("vllm") else "hf"
