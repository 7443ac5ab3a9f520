"""The settings the front doors share: one dataclass per section of a recipe.

A recipe has the sections ``student``, ``teacher``, ``data``, ``rollouts``, ``evals``, ``objective`` and ``train``. The
first five are dataclasses, ``data``'s in :mod:`llmdistill.recipe.data_config` and the others below; ``objective`` and
``train`` together fill a :class:`DistillationConfig` (or a front door's subclass), which is a
``transformers.TrainingArguments`` and can be built in Python like one.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from transformers import TrainingArguments

from llmdistill.errors import UserError
from llmdistill.recipe import train_fields
from llmdistill.recipe.launches import (
    asks_for_deepspeed,
    bf16_here,
    check_cpu_launch,
    check_fsdp_launch,
    check_gpu_launch,
    check_parallelism,
    launched_processes,
)
from llmdistill.recipe.lora import check_lora
from llmdistill.recipe.settings import PENALISED, Conflict, check_settings, option, require
from llmdistill.record.metrics import GREATER_IS_BETTER

DType = Literal["float32", "bfloat16", "float16", "auto"]
TOKEN_ENV = "LLMDISTILL_TOKEN"  # a recipe names the variable, so the token itself is never in a file


@dataclass
class StudentConfig:
    """The model that learns."""

    model: str = option("", "folder or hub name of the student, or of an adapter")
    adapter: Literal["merge", "continue"] = option(
        "merge", "of an adapter as model: merged into its base and trained from there, or trained on as an adapter"
    )
    revision: str = option("", "branch, tag or commit of a hub model; empty: its main branch")
    tokenizer: str = option("", "folder or hub name of another tokenizer than the model's")
    saved_as: Literal["merged", "adapter"] = option(
        "merged", "what student/ holds of a LoRA student: whole weights, or the adapter alone"
    )
    dtype: DType = option(
        "float32", "dtype of its weights; with train.bf16 they stay float32 and the maths is bfloat16"
    )
    lora_r: int = option(0, "rank of a LoRA adapter; 0 trains the weights themselves")
    lora_alpha: int = option(32, "LoRA scale numerator")
    lora_dropout: float = option(0.0, "LoRA dropout")
    lora_target_modules: list[str] = option(
        [], "modules to adapt: names, one regular expression, or all-linear; empty: every linear layer but the head"
    )
    lora_target_parameters: list[str] = option([], "parameters to adapt, as mlp.experts.gate_up_proj of fused experts")
    lora_modules_to_save: list[str] = option([], "modules trained whole beside the adapter, as norm")
    use_dora: bool = option(False, "DoRA: direction by the adapter, length of its own")
    use_rslora: bool = option(False, "rank-stabilised LoRA: alpha / sqrt(r)")
    init_lora_weights: str = option("true", "start: true, false, gaussian, orthogonal, pissa, pissa_niter_N or olora")
    load_in_4bit: bool = option(False, "QLoRA: weights in 4 bits (NF4, bitsandbytes) below a LoRA adapter")
    load_in_8bit: bool = option(False, "the same in 8 bits")
    attn_implementation: str | None = option(None, "transformers' attention implementation")
    trust_remote_code: bool = option(False, "run model code that comes with the checkpoint")

    @property
    def quantised(self) -> Literal["", "4bit", "8bit"]:
        return "4bit" if self.load_in_4bit else "8bit" if self.load_in_8bit else ""

    def __post_init__(self) -> None:
        check_lora(self)
        two = self.adapter == "continue" and self.lora_r > 0
        require(not two, "student.lora_r", self.lora_r, "0 where student.adapter is continue", "leave it out")
        lacking = self.saved_as == "adapter" and self.lora_r == 0 and self.adapter == "merge"
        require(not lacking, "student.saved_as", "adapter", "merged where student.lora_r is 0", "--student.lora_r 16")


@dataclass
class TeacherConfig:
    """A model that is learnt from: loaded here (``model``), asked over HTTP (``url``), or read from disk (``stored``).

    A recipe has one as ``teacher:``, or several as the list ``teachers:``. Then ``domains`` says whose rows each of
    them judges, and those with the same domains and a ``weight`` are averaged.
    """

    model: str = option("", "folder or hub name of the teacher; an adapter's folder is merged into its base")
    revision: str = option("", "branch, tag or commit of a hub model; empty: its main branch")
    engine: Literal["hf", "vllm"] = option("hf", "hf: embedded, exact full distribution; vllm: top-k evidence at speed")
    dtype: DType = option("bfloat16", "dtype of its weights")
    batch_tokens: int = option(16384, "tokens (padding included) of one forward pass when scoring")
    placement: Literal["whole", "sharded", "offload"] = option(
        "whole",
        "of an embedded one; whole: on every device; sharded: in parts over all processes, each layer put together as "
        "it runs; offload: in the host's memory between uses",
    )
    attn_implementation: str | None = option(None, "transformers' attention implementation")
    trust_remote_code: bool = option(False, "run model code that comes with the checkpoint")
    url: str = option("", "teacher service instead of a model in this process; replicas with commas")
    tokenizer: str = option("", "folder or hub name of its tokenizer, where its model has none or is not here")
    token_env: str = option(TOKEN_ENV, "environment variable that holds the service's bearer token")
    timeout_s: float = option(120.0, "seconds until a request to the service is tried again")
    max_outage_s: float = option(3600.0, "seconds without any answer until the run gives up")
    in_flight: int = option(8, "requests to the service at one time")
    lossless: bool = option(False, "float32 evidence from the service, twice the bytes of float16")
    hidden: Literal["", "bfloat16", "int8"] = option(
        "",
        "a service or a store gives final hidden states in this form, of which the full distribution is rebuilt here",
    )
    stored: str = option("", "folder of score blocks: alone, training runs from disk; else a read-through cache")
    name: str = option("", "what messages and --teachers.NAME.key call it")
    domains: list[str] = option([], "rows of these domains are its own; empty: all that no other teacher has")
    weight: float = option(0.0, "share in the average of teachers with the same domains; 0: it is not averaged")
    min_aligned: float = option(0.9, "of another tokenizer: least share of the bytes that both have chunks for")
    view: Literal["tokens", "classes"] = option(
        "tokens", "classes: it has another tokenizer, and is compared in classes of tokens that both can tell"
    )
    context: str = option("", "it reads the completions under this one of data.contexts instead of the prompt")
    student: Literal["", "live", "initial", "ema"] = option(
        "", "the student is its own teacher: as it is, as it began, or as an average over its steps (needs a context)"
    )
    ema_decay: float = option(0.999, "student ema: share of the average that a step keeps")

    def __post_init__(self) -> None:
        self.domains = [str(domain) for domain in self.domains]  # YAML reads some names as numbers
        given = next((n for n in ("model", "url", "stored") if getattr(self, n)), "")
        require(
            not (self.student and given),
            f"teacher.{given}",
            getattr(self, given, ""),
            "empty beside teacher.student",
            "leave one out",
        )
        require(0 <= self.min_aligned <= 1, "teacher.min_aligned", self.min_aligned, "in [0, 1]", "use 0.9")
        require(0 <= self.ema_decay < 1, "teacher.ema_decay", self.ema_decay, "in [0, 1)", "use 0.999")
        stored_alone = self.stored and self.context
        require(
            not stored_alone,
            "teacher.context",
            self.context,
            "empty beside teacher.stored, which holds one text of a row",
            "leave one out",
        )
        alone = bool(self.model) and self.engine == "hf" and not self.domains
        needed = "whole, but for an embedded model (teacher.model, engine hf) without domains"
        require(alone or self.placement == "whole", "teacher.placement", self.placement, needed, "leave it out")
        require(not (self.model and self.url), "teacher.url", self.url, "empty beside teacher.model", "leave one out")
        for name, needed in (("tokenizer", self.url or self.model or self.stored), ("revision", self.model)):
            value, of = getattr(self, name), "a model" if name == "revision" else "a model, a url or a store"
            require(bool(needed) or not value, f"teacher.{name}", value, f"empty without {of}", "leave it out")
        needed, fix = (
            "empty without teacher.url or teacher.stored",
            "leave it out: a teacher that is here gives all it has",
        )
        require(bool(self.url or self.stored) or not self.hidden, "teacher.hidden", self.hidden, needed, fix)
        needed, fix = "false beside teacher.hidden, which says how much is kept of its states", "leave one out"
        require(not (self.hidden and self.lossless), "teacher.lossless", self.lossless, needed, fix)
        require(self.timeout_s > 0, "teacher.timeout_s", self.timeout_s, "> 0", "use 120")
        require(self.max_outage_s >= 0, "teacher.max_outage_s", self.max_outage_s, ">= 0", "use 3600")
        require(self.batch_tokens >= 1, "teacher.batch_tokens", self.batch_tokens, ">= 1", "use 16384")
        require(self.in_flight >= 1, "teacher.in_flight", self.in_flight, ">= 1", "use 8")
        require(0 <= self.weight < math.inf, "teacher.weight", self.weight, ">= 0", "leave it out, or use 1")

    @property
    def label(self) -> str:
        """What to call it where no name was given."""
        return self.name or self.model or self.url or self.stored


@dataclass
class RolloutConfig:
    """How the student's completions are sampled."""

    engine: Literal["hf", "vllm", "remote"] = option(
        "hf", "hf: generate() of transformers; vllm: in-process engine, weights pushed; remote: a service"
    )
    max_new_tokens: int = option(256, "longest completion")
    temperature: float = option(1.0, "sampling temperature (0: greedy); apart from objective.loss_temperature")
    top_p: float = option(1.0, "nucleus sampling")
    top_k: int = option(0, "sample among so many tokens; 0: all")
    min_p: float = option(0.0, "only tokens with this share of the likeliest one's probability")
    repetition_penalty: float = option(
        1.0, "divides positive logits of tokens that prompt or completion have, multiplies negative ones"
    )
    stop: list[str] = option([], "strings that end a completion; their tokens stay in it")
    ignore_eos: bool = option(False, "go on past every end of text to max_new_tokens or a stop string")
    batch_tokens: int = option(
        0,
        "tokens (prompts, padding, room for completions) generated at one time; 0: 32768 of hf, else the engine's own",
    )
    samples_per_prompt: int = option(1, "completions of every prompt")
    mask_truncated: bool = option(False, "keep completions cut off by max_new_tokens out of the loss")
    dtype: DType = option("bfloat16", "dtype of the vllm engine's copy of the student")
    kv_cache_gib: float = option(0.5, "memory for vllm's key-value cache on CPU")
    gpu_memory_utilization: float = option(0.3, "share of the GPU given to vllm's copy and cache")
    sleep: bool = option(True, "vllm on a GPU: its memory is given back while teacher and student compute")
    lora: Literal["merged", "adapter"] = option(
        "merged", "vllm with student.lora_r: weights with the adapter merged in; adapter: it alone, over the checkpoint"
    )
    tensor_parallel_size: int = option(1, "processes that hold one vllm engine together")
    url: str = option("", "rollout service of the remote engine; replicas with commas")
    token_env: str = option(TOKEN_ENV, "environment variable that holds the service's bearer token")
    push_every: int = option(1, "steps between pushes of the student's weights; more: staler samples, fewer pushes")
    staleness: int = option(
        0, "steps that engine remote and teacher services work ahead; 0: text is by the weights it trains"
    )
    push_folder: str = option("", "folder the service can read: weights go there and not through HTTP")
    transfer: Literal["http", "nccl", "nccl_m2n", "ipc", "gloo"] = option(
        "http", "how weights reach the services: http, or vLLM's transfer by this backend (llmdistill serve --transfer)"
    )

    def __post_init__(self) -> None:
        remote = self.engine == "remote"
        require(bool(self.url) or not remote, "rollouts.url", self.url, "set for engine remote", "--rollouts.url URL")
        for name in ("url", "push_folder"):
            value = getattr(self, name)
            require(remote or not value, f"rollouts.{name}", value, f"empty for engine {self.engine}", "engine remote")
        direct = self.transfer != "http"
        require(
            remote or not direct, "rollouts.transfer", self.transfer, f"http for engine {self.engine}", "leave it out"
        )
        needed = "http beside rollouts.push_folder" if self.push_folder else "http beside rollouts.staleness"
        apart = not direct or not (self.push_folder or self.staleness)
        require(apart, "rollouts.transfer", self.transfer, needed, "--rollouts.transfer http")
        require(self.push_every >= 1, "rollouts.push_every", self.push_every, ">= 1", "use 1")
        needed = "1 for engine hf, which samples from the student itself"
        require(self.engine != "hf" or self.push_every == 1, "rollouts.push_every", self.push_every, needed, "use 1")
        require(self.staleness >= 0, "rollouts.staleness", self.staleness, ">= 0", "use 0")
        needed = f"0 for engine {self.engine}, which works in this process"
        fix = "--rollouts.engine remote, with a service (llmdistill serve), or 0"
        require(remote or self.staleness == 0, "rollouts.staleness", self.staleness, needed, fix)
        needed = "1 beside rollouts.staleness, which says how old text is"
        require(self.push_every == 1 or not self.staleness, "rollouts.push_every", self.push_every, needed, "use 1")
        require(self.temperature >= 0, "rollouts.temperature", self.temperature, ">= 0", "use 0 for greedy")
        require(0 < self.top_p <= 1, "rollouts.top_p", self.top_p, "in (0, 1]", "use 1 for no nucleus")
        require(self.top_k >= 0, "rollouts.top_k", self.top_k, ">= 0", "use 0 for the whole vocabulary")
        require(0 <= self.min_p <= 1, "rollouts.min_p", self.min_p, "in [0, 1]", "use 0 for all tokens")
        penalty = self.repetition_penalty
        require(0 < penalty < math.inf, "rollouts.repetition_penalty", penalty, "> 0", "use 1 for none")
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop)
        require(all(isinstance(s, str) and s for s in self.stop), "rollouts.stop", self.stop, "strings", "leave it out")
        endless = self.ignore_eos and self.mask_truncated and not self.stop
        needed = "false beside rollouts.ignore_eos: every completion is cut off"
        require(not endless, "rollouts.mask_truncated", True, needed, "leave one out")
        require(self.batch_tokens >= 0, "rollouts.batch_tokens", self.batch_tokens, ">= 0", "use 0")
        require(self.max_new_tokens >= 1, "rollouts.max_new_tokens", self.max_new_tokens, ">= 1", "raise it")
        require(self.kv_cache_gib > 0, "rollouts.kv_cache_gib", self.kv_cache_gib, "> 0", "use 0.5")
        share = self.gpu_memory_utilization
        require(0 < share <= 1, "rollouts.gpu_memory_utilization", share, "in (0, 1]", "use 0.3")
        merged = self.engine == "vllm" or self.lora == "merged"
        require(merged, "rollouts.lora", self.lora, f"merged for engine {self.engine}", "engine vllm")
        size = self.tensor_parallel_size
        require(size >= 1, "rollouts.tensor_parallel_size", size, ">= 1", "use 1")
        needed = f"1 for engine {self.engine}, which has no parts"
        require(self.engine == "vllm" or size == 1, "rollouts.tensor_parallel_size", size, needed, "engine vllm")
        require(self.samples_per_prompt >= 1, "rollouts.samples_per_prompt", self.samples_per_prompt, ">= 1", "use 1")


@dataclass
class EvalsConfig:
    """Benchmarks the student is scored on during training (llmdistill.evals.callback)."""

    suites: list[str] = option([], "YAML files or names of suites; empty: none")
    every_steps: int = option(0, "steps between evaluations; 0: before the first and after the last step only")
    problems: int = option(100, "problems of each suite, drawn at random; 0: all")
    samples: int = option(1, "samples of every problem; 1: greedy")
    longest: int = option(512, "new tokens of a sample")
    batch: int = option(16, "samples generated at one time")
    data_dir: str = option("", "folder with the benchmarks' files; empty: $LLMDISTILL_DATA, else the hub")

    def __post_init__(self) -> None:
        for name in ("every_steps", "problems"):
            require(getattr(self, name) >= 0, f"evals.{name}", getattr(self, name), ">= 0", "use 0")
        for name in ("samples", "longest", "batch"):
            require(getattr(self, name) >= 1, f"evals.{name}", getattr(self, name), ">= 1", "use 1 or more")


@dataclass
class DistillationConfig(TrainingArguments):
    """``transformers.TrainingArguments`` plus what every distillation method has.

    ``per_device_train_batch_size`` counts prompts: a micro-batch holds that many times ``samples_per_prompt``
    sequences. All micro-batches of an optimizer step are sampled in one round.
    """

    # Defaults of ours over transformers': explicit precision (a CPU build may choose bfloat16 by itself), losses that
    # are shown as they are, raw columns for our own collator.
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "bfloat16 autocast over float32 weights; by itself on where a GPU has it"}
    )
    ddp_timeout: int = field(
        default=5400, metadata={"help": "seconds that ranks wait for each other; longer than a teacher's max_outage_s"}
    )
    learning_rate: float = field(default=1e-5, metadata={"help": "peak learning rate"})
    logging_steps: float = field(default=5, metadata={"help": "write a line of metrics.jsonl every so many steps"})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "hide NaN losses from the log (we stop instead)"}
    )
    save_total_limit: int | None = field(
        default=3, metadata={"help": "checkpoints kept; older ones go once a newer one is whole; null keeps all"}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "drop dataset columns (must stay off)"})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "trackio, tensorboard, wandb, none"})
    disable_tqdm: bool | None = field(
        default=True, metadata={"help": "transformers' own bars (ours shows rate and ETA)"}
    )

    restart_optimizer: bool = field(
        default=False,
        metadata={
            "help": "resume with a new optimizer where the checkpoint has none (save_only_model), or that of another "
            "launch which cannot be laid out anew"
        },
    )
    save_in_background: bool = field(
        default=False, metadata={"help": "train on while a checkpoint reaches the disk; it is one only then"}
    )
    rollouts: RolloutConfig = field(default_factory=RolloutConfig, metadata={"section": "rollouts"})
    chunk_tokens: int = field(
        default=0,
        metadata={
            "help": "rows whose logits exist at one time; 0: 128 on a CPU, 1 GiB on a GPU",
            "section": "objective",
        },
    )
    batch_tokens: int = field(
        default=0,
        metadata={
            "help": "tokens, padding included, of one forward and backward pass; 0: as many prompts as "
            "train.per_device_train_batch_size says, which counts those of a step otherwise",
            "section": "objective",
            "at_least": 0,
        },
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "the sequences of a pass one behind another, without padding, which batch_tokens then does not "
            "count; refused for models whose states run from one into the next",
            "section": "objective",
        },
    )
    sequence_parallel_size: int = field(
        default=1,
        metadata={"help": "processes that part every sequence among them", "section": "objective", "at_least": 1},
    )
    num_iterations: int = field(
        default=1,
        metadata={
            "help": "optimizer steps on the texts of every round, whose rows are then read so many times slower",
            "section": "objective",
            "at_least": 1,
        },
    )
    freeze_embeddings: bool = field(
        default=False,
        metadata={"help": "do not train the token embeddings and output head", "section": "objective"},
    )
    domain_weights: dict[str, float] = field(
        default_factory=dict,
        metadata={
            "help": "weight of the rows of a domain in the loss; 1 where none is given",
            "section": "objective",
            "at_least": 0,
            "below": math.inf,
        },
    )
    mixture_every: int = field(
        default=0,
        metadata={
            "help": "steps between new shares of domains, by how far the student is behind there; 0: rows as they come",
            "section": "objective",
            "at_least": 0,
        },
    )
    mixture_alpha: float = field(
        default=0.5,
        metadata={
            "help": "mixture_every: how much of a domain's share follows that; the rest is spread evenly",
            "section": "objective",
            "at_least": 0,
            "at_most": 1,
        },
    )
    heldout_sequences: int = field(
        default=64,
        metadata={"help": "held-out prompts measured at each evaluation", "section": "objective", "at_least": 0},
    )

    conflicts: ClassVar[tuple[Conflict, ...]] = (
        Conflict(
            lambda s: (s.rollouts.staleness or s.num_iterations > 1) and s.mixture_every,
            "objective.mixture_every is {mixture_every} and chooses the rows of every step by the one before it, with "
            "rollouts.staleness {rollouts.staleness} and objective.num_iterations {num_iterations}",
            "staleness 0 and num_iterations 1, or leave mixture_every out",
        ),
    )

    def __post_init__(self) -> None:
        check_parallelism()
        check_fsdp_launch()
        if torch.cuda.is_available() and not self.use_cpu:
            check_gpu_launch(torch.cuda.device_count())
        else:
            self._prepare_cpu()
        self.bf16 = bf16_here(self.bf16, self.fp16, on_gpu=not self.use_cpu)
        train_fields.prepare(self)
        if self.greater_is_better is None and self.metric_for_best_model:
            # our held-out metrics by the last part of their names, as in eval_student/reverse_kl
            self.greater_is_better = GREATER_IS_BETTER.get(self.metric_for_best_model.rsplit("/", 1)[-1])
        try:
            super().__post_init__()  # which takes all that is called "…loss" for better when lower, and nothing else
        except (ValueError, TypeError, ImportError, OSError) as error:
            raise UserError(f"train: {error}".splitlines()[0]) from error
        train_fields.check_made(self)
        require(self.chunk_tokens >= 0, "objective.chunk_tokens", self.chunk_tokens, ">= 0", "leave it out")
        check_settings(self)

    @property
    def sampler(self) -> dict[str, Any]:
        """How tokens are drawn: what an estimator on them must know of the policy they came from.

        Raises:
            UserError: it is a policy that a position alone does not say.
        """
        r = self.rollouts
        if PENALISED.when(self):
            raise UserError(f"{PENALISED.message.format(rollouts=r)}. Fix: {PENALISED.fix}.")
        return {"temperature": r.temperature or 1.0, "top_k": r.top_k, "top_p": r.top_p, "min_p": r.min_p}

    def _prepare_cpu(self) -> None:
        check_cpu_launch()
        self.use_cpu = True
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for others, and says so
        # DeepSpeed on CPU starts on gloo only; a torch built with MPI would choose that. One process has no backend.
        self.ddp_backend = (self.ddp_backend or "gloo") if launched_processes() > 1 else None
        if asks_for_deepspeed():
            os.environ.pop("ACCELERATE_USE_CPU", None)  # together they make accelerate leave DeepSpeed out, in silence

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        return {**values, "rollouts": dataclasses.asdict(self.rollouts)}


def torch_dtype(name: DType) -> torch.dtype | Literal["auto"]:
    """The torch dtype a setting names."""
    return "auto" if name == "auto" else getattr(torch, name)


def bearer_token(variable: str, setting: str) -> str | None:
    """The token in an environment variable; None where the usual one is not set.

    Raises:
        UserError: another variable was named, and it is not set.
    """
    token = os.environ.get(variable) or None
    if token is None and variable != TOKEN_ENV:
        raise UserError(f"{setting} is {variable!r}, and no such environment variable is set. Fix: export {variable}.")
    return token
