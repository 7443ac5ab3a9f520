"""What becomes of each field of ``transformers.TrainingArguments``: it is read, or refused in a line.

Accepted and unread would be a run that is not the one that was asked for. ``READ`` and ``REFUSED`` together name every
field of the transformers that is installed (a test holds them against it); of a field that a newer one adds, a value is
warned of. ``READ_WITH`` are fields that only another one makes mean something, ``LEAST`` and ``ONE_OF`` what values can
be; ``docs/settings.md`` has the table of what is refused.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import math
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.checkpoint
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from llmdistill.errors import UserError
from llmdistill.recipe.launches import asks_for_deepspeed, asks_for_fsdp, launched_processes
from llmdistill.recipe.settings import Conflict, check_conflicts, require
from llmdistill.record.metrics import HELDOUT_TEXTS, METRICS, OTHER_METRICS


@dataclass(frozen=True)
class Refused:
    """A field that nothing reads here: the values that mean nothing anyway, why no other is taken, what to do."""

    accepted: tuple[Any, ...]
    why: str
    fix: str = "leave it out"
    secret: bool = False  # its value is not repeated


_NO_PREDICTIONS = "held-out rows are measured by our own metrics, sequence by sequence: no predictions are collected"
_NO_LIGER = "Liger's layers were not proven here, and the loss is computed in chunks, by kernels on a GPU, anyway"
_NO_PUSH = "what would be uploaded is the run folder, with the prompts and completions in it"
_PUSH_FIX = "leave it out, and `hf upload NAME RUN/student` when you have looked at it"

REFUSED: dict[str, Refused] = {
    "label_smoothing_factor": Refused(
        (0,), "what is learnt from is a teacher's distribution, and no label that could be smoothed"
    ),
    "average_tokens_across_devices": Refused(
        (True,), "a loss here is always the mean over the tokens of all processes"
    ),
    "auto_find_batch_size": Refused(
        (False,),
        "the batch of a step is settled before its texts are sampled",
        "a lower per_device_train_batch_size, rollouts.batch_tokens or objective.chunk_tokens",
    ),
    **dict.fromkeys(
        ("bf16_full_eval", "fp16_full_eval"),
        Refused((False,), "held-out rows are measured in the precision of training", "--bf16 true"),
    ),
    "use_cache": Refused((False,), "training reads every text in one pass, and sampling has its cache anyway"),
    "logging_nan_inf_filter": Refused((False,), "a loss that is no number stops the run, and is not hidden"),
    **dict.fromkeys(
        ("prediction_loss_only", "eval_use_gather_object", "batch_eval_metrics"), Refused((False,), _NO_PREDICTIONS)
    ),
    "eval_do_concat_batches": Refused((True,), _NO_PREDICTIONS),
    "eval_accumulation_steps": Refused((None,), _NO_PREDICTIONS, "per_device_eval_batch_size bounds what is measured"),
    "include_for_metrics": Refused(([],), _NO_PREDICTIONS),
    "label_names": Refused((None, []), "rows have prompts and completions, named by data.prompt_column and its like"),
    "skip_memory_metrics": Refused((True,), "memory/peak_gib is in every line of metrics.jsonl anyway"),
    "enable_jit_checkpoint": Refused(
        (False,), "a run told to stop would be measured and saved as if it had ended", "--save_steps N, and --resume"
    ),
    "remove_unused_columns": Refused((False,), "our own encoder reads the columns, and needs all of them"),
    "train_sampling_strategy": Refused(
        ("random", "sequential"), "micro-batches are made of texts of like length anyway, once they are sampled"
    ),
    "length_column_name": Refused(("length",), "no column with lengths is read"),
    "parallelism_config": Refused(
        (None,),
        "tensor and context parallelism part the rows of a text (docs/training.md)",
        "recipes/accelerate/zero3.yaml",
    ),
    "use_liger_kernel": Refused((False,), _NO_LIGER),
    "liger_kernel_config": Refused((None,), _NO_LIGER),
    "do_predict": Refused((False,), "there is no prediction loop", "llmdistill eval SUITE --model RUN/student"),
    "local_rank": Refused((-1,), "the launcher says it"),
    "push_to_hub": Refused((False,), _NO_PUSH, _PUSH_FIX),
    "hub_token": Refused((None, "<HUB_TOKEN>"), _NO_PUSH, _PUSH_FIX, secret=True),  # config.yaml has the latter
    "hub_strategy": Refused(("every_save",), _NO_PUSH, _PUSH_FIX),
    "hub_always_push": Refused((False,), _NO_PUSH, _PUSH_FIX),
    **dict.fromkeys(("hub_model_id", "hub_private_repo", "hub_revision"), Refused((None,), _NO_PUSH, _PUSH_FIX)),
}

READ = frozenset(
    {
        *("output_dir", "per_device_train_batch_size", "num_train_epochs", "max_steps", "learning_rate"),
        *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "optim_target_modules"),
        *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "gradient_accumulation_steps", "max_grad_norm"),
        *("bf16", "fp16", "tf32", "gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_compile"),
        *("torch_compile_backend", "torch_compile_mode"),
        *("neftune_noise_alpha", "torch_empty_cache_steps", "logging_strategy", "logging_steps"),
        *("logging_first_step", "log_on_each_node", "include_num_input_tokens_seen", "log_level", "log_level_replica"),
        *("disable_tqdm", "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id"),
        *("trackio_static_space_id", "eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size"),
        *("eval_on_start", "save_only_model", "save_strategy", "save_steps", "save_on_each_node", "save_total_limit"),
        *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "ignore_data_skip"),
        *("restore_callback_states_from_checkpoint", "full_determinism", "seed", "data_seed", "use_cpu"),
        *("accelerator_config", "dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory"),
        *("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
        *("dataloader_in_order", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
        *("ddp_static_graph", "ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "deepspeed", "debug"),
        # what a front door does anyway: it trains, and measures held-out rows where there are some
        *("do_train", "do_eval", "resume_from_checkpoint"),
    }
)

# The least that numbers may be; None, where a field may be that, is never too little.
LEAST = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("seed", "data_seed", "learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"), 0),
    **dict.fromkeys(("eval_delay", "dataloader_num_workers", "neftune_noise_alpha"), 0),
    **dict.fromkeys(("torch_empty_cache_steps", "ddp_bucket_cap_mb", "ddp_timeout", "dataloader_prefetch_factor"), 1),
}
MOST = {"seed": 2**32 - 1, "data_seed": 2**32 - 1}  # numpy's
ABOVE_ZERO = ("num_train_epochs", "logging_steps", "save_steps", "eval_steps")

_LEVELS = ("passive", "debug", "info", "warning", "error", "critical", "detail")
ONE_OF = {
    **dict.fromkeys(("log_level", "log_level_replica"), _LEVELS),
    "include_num_input_tokens_seen": ("no", "all", "non_padding", True, False),
    "dataloader_multiprocessing_context": (None, "fork", "spawn", "forkserver"),
}

# Optimizers whose memory is a number, or two, for every element of a weight: it can be kept in parts of any cut.
ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad")
_IN_BLOCKS = ("8bit", "4bit", "bnb", "paged")
_LOW_RANK = ("galore_", "apollo_")
# Their handlers in transformers look into optim_args.
_ARGUMENTS = (
    *(*_LOW_RANK, "sgd", "adagrad", "rmsprop", "ademamix", "grokadamw", "stable_adamw", "adamw_anyprecision"),
    *("adamw_torch_4bit", "adamw_torch_8bit", "paged_ademamix", "ademamix_8bit"),
)
# What a tracker of transformers imports, where it has another name.
_PACKAGES = {"azure_ml": "azureml", "flyte": "flytekit", "kubeflow": "kubeflow_trainer"}
_PACKAGES_OF_OPTIMIZERS = {"galore_": "galore_torch", "apollo_": "apollo_torch"}


def _without_evaluation(s: Any) -> bool:
    return bool(s.eval_strategy == "no")


READ_WITH: tuple[Conflict, ...] = (
    Conflict(
        lambda s: s.save_strategy == "best" and _without_evaluation(s),
        "train.save_strategy is best and train.eval_strategy no: nothing would ever be the best, nor saved",
        "--eval_strategy steps --eval_steps N with data.heldout, or --save_strategy steps",
    ),
    Conflict(
        lambda s: s.load_best_model_at_end and _without_evaluation(s),
        "train.load_best_model_at_end is true and train.eval_strategy no: no checkpoint would be the best",
        "--eval_strategy steps --eval_steps N with data.heldout, or leave it out",
    ),
    Conflict(
        lambda s: s.eval_steps is not None and _without_evaluation(s),
        "train.eval_steps is {eval_steps} and train.eval_strategy no: nothing would be evaluated",
        "--eval_strategy steps with data.heldout, or leave eval_steps out",
    ),
    Conflict(
        lambda s: s.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy") and _without_evaluation(s),
        "train.lr_scheduler_type is {lr_scheduler_type}, which goes by what evaluations measure, and "
        "train.eval_strategy no",
        "--eval_strategy steps --eval_steps N with data.heldout",
    ),
    Conflict(
        lambda s: s.optim_target_modules is not None and not _optim(s).startswith(_LOW_RANK),
        "train.optim_target_modules is {optim_target_modules}, and train.optim {optim} does not read it",
        "leave it out, or --optim galore_adamw",
    ),
    Conflict(
        lambda s: s.optim_args and not any(name in _optim(s) for name in _ARGUMENTS),
        "train.optim_args is {optim_args}, and train.optim {optim} does not read it",
        "adam_beta1, adam_beta2, adam_epsilon and weight_decay are settings of their own",
    ),
    Conflict(
        lambda s: "layerwise" in _optim(s) or "lomo" in _optim(s),
        "train.optim is {optim}, which moves weights within the backward pass, before the loss and the gradients of "
        "the whole step are known",
        "--optim adamw_torch",
    ),
    Conflict(
        lambda s: _optim(s).startswith("schedule_free"),
        "train.optim is {optim}, which trains at other weights than those to be used, and the student is sampled and "
        "measured between its steps",
        "--optim adamw_torch with --lr_scheduler_type constant_with_warmup",
    ),
    Conflict(
        lambda s: any(word in _optim(s) for word in _IN_BLOCKS),
        "train.optim is {optim}, whose memory is in blocks of few bits, or paged, on a GPU alone: it was not proven "
        "here to train, or to go on, as AdamW does",
        "--optim adamw_torch; ZeRO and FSDP2 share its memory out, and can keep it in the host's (recipes/accelerate)",
    ),
    Conflict(
        lambda s: (s.deepspeed or asks_for_deepspeed() or s.fsdp or asks_for_fsdp()) and _optim(s) not in ELEMENTWISE,
        "train.optim is {optim}, and ZeRO and FSDP cut weights into parts, of which it would remember other things "
        "than of the weights",
        f"--optim {ELEMENTWISE[0]} (or {', '.join(ELEMENTWISE[1:])})",
    ),
    Conflict(
        lambda s: s.dataloader_num_workers == 0 and s.dataloader_persistent_workers,
        "train.dataloader_persistent_workers is true and train.dataloader_num_workers 0: there are none to be kept",
        "leave it out, or --dataloader_num_workers 1",
    ),
    Conflict(
        lambda s: s.dataloader_num_workers == 0 and s.dataloader_multiprocessing_context,
        "train.dataloader_multiprocessing_context is {dataloader_multiprocessing_context} and "
        "train.dataloader_num_workers 0: there are none to be started",
        "leave it out, or --dataloader_num_workers 1",
    ),
    Conflict(
        lambda s: s.fp16 and not torch.cuda.is_available(),
        "train.fp16 is true, which needs a GPU",
        "--bf16 true, or leave it out for float32",
    ),
    Conflict(
        lambda s: s.fp16 and s.bf16,
        "train.fp16 and train.bf16 are both true; at most one can be",
        "leave out fp16, which needs its loss scaled",
    ),
    Conflict(
        lambda s: s.fsdp and launched_processes() == 1,
        "train.fsdp is {fsdp}, and no launcher started several processes to share the student",
        "accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m llmdistill.opd ..., without train.fsdp",
    ),
    Conflict(
        lambda s: s.save_only_model and (s.fsdp or asks_for_fsdp()),
        "train.save_only_model is true, and FSDP's checkpoints hold weights in parts, which only a resumed run reads",
        "leave it out; RUN/student has the whole student at the end",
    ),
    Conflict(
        lambda s: s.deepspeed and not os.environ.get("MASTER_ADDR"),
        "train.deepspeed is set, and no launcher started this process",
        "accelerate launch --config_file recipes/accelerate/zero2.yaml -m llmdistill.opd ..., without train.deepspeed",
    ),
    Conflict(
        lambda s: s.fsdp_config and not s.fsdp,
        "train.fsdp_config is set, and train.fsdp is not: nothing is sharded",
        "leave it out, or say fsdp too",
    ),
    Conflict(
        lambda s: "tpu_metrics_debug" in _words(s.debug),
        "train.debug is tpu_metrics_debug, and our evaluation prints no metrics of a TPU",
        "leave it out, or --train.debug underflow_overflow",
    ),
    Conflict(
        lambda s: _trackio(s) and "trackio" not in _trackers(s),
        "train.project or a train.trackio_ setting is given, and train.report_to has no trackio, which reads it",
        "leave it out, or --report_to trackio",
    ),
    Conflict(
        lambda s: s.run_name is not None and not _trackers(s),
        "train.run_name is {run_name}, and train.report_to none: no tracker would show it",
        "leave it out (a run is called as its output_dir), or --report_to wandb",
    ),
)


def prepare(args: Any) -> None:
    """Before transformers looks at its fields: what is written in several ways becomes one, and what nothing reads or
    no value can be is refused.

    Raises:
        UserError: names the field, its value, why and what to use.
    """
    args.report_to = "none" if args.report_to in (None, "", "null", []) else args.report_to
    if isinstance(args.report_to, str) and "," in args.report_to:
        args.report_to = [name.strip() for name in args.report_to.split(",")]
    if isinstance(args.lr_scheduler_kwargs, dict):  # YAML reads 1e-6 as text
        args.lr_scheduler_kwargs = {name: _number(value) for name, value in args.lr_scheduler_kwargs.items()}
    args.resume_from_checkpoint = _resumed_from(args.resume_from_checkpoint)
    if args.save_strategy == "best" and args.metric_for_best_model is None:
        args.metric_for_best_model = "loss"  # as transformers has it for load_best_model_at_end
    _check_ranges(args)
    for f in dataclasses.fields(TrainingArguments):
        _check_field(f, getattr(args, f.name))
    check_conflicts(args, READ_WITH)
    _check_trackers(args)
    _check_metric(args.metric_for_best_model)


def check_made(args: Any) -> None:
    """After transformers has read its fields: that schedule and optimizer can be made of them, and what the launcher
    is told.

    Raises:
        UserError: names the field and what is wrong with it.
    """
    config = args.accelerator_config
    for name, accepted, why in (
        ("split_batches", False, "a micro-batch is per_device_train_batch_size prompts on every process"),
        ("dispatch_batches", False, "every process reads the rows itself"),
        ("even_batches", True, "every process must have as many micro-batches as the others"),
    ):
        value = getattr(config, name)
        if value not in (accepted, None):
            raise _refusal(f"accelerator_config {name}", repr(value), why, "leave it out")
    _check_accumulation(config.gradient_accumulation_kwargs)
    _check_checkpointing(args.gradient_checkpointing_kwargs)
    name = str(args.lr_scheduler_type.value)
    try:
        optimizer = _made_optimizer(args)
    except (ImportError, ValueError, TypeError) as error:
        raise UserError(
            f"train.optim {_optim(args)} cannot be made: {_first_line(error)}. Fix: --optim adamw_torch."
        ) from error
    try:
        kwargs = dict(args.lr_scheduler_kwargs or {})
        get_scheduler(name, optimizer, args.get_warmup_steps(100), 100, scheduler_specific_kwargs=kwargs)
    except (TypeError, ValueError, KeyError) as error:
        given = args.lr_scheduler_kwargs or "not set"
        raise UserError(
            f"train.lr_scheduler_type {name} cannot be made, train.lr_scheduler_kwargs is {given}: "
            f"{_first_line(error)}. Fix: the arguments that transformers' get_{name}_schedule takes, or another type."
        ) from error


def _check_ranges(args: Any) -> None:
    defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(args)}
    for name, least in LEAST.items():
        value = getattr(args, name)
        sound = isinstance(value, int | float) and math.isfinite(value) and value >= least
        usual: float = defaults[name] if isinstance(defaults[name], int | float) else least
        require(value is None or sound, f"train.{name}", value, f"a number >= {least}", f"--{name} {max(least, usual)}")
    for name, most in MOST.items():
        value = getattr(args, name)
        require(value is None or value <= most, f"train.{name}", value, f"at most {most}", f"--{name} 1")
    for name in ABOVE_ZERO:
        value = getattr(args, name)
        sound = isinstance(value, int | float) and 0 < value < math.inf
        fix = "--num_train_epochs 1" if name == "num_train_epochs" else f"--{name} 10"
        require(value is None or sound, f"train.{name}", value, "above 0", fix)
    sound = args.max_steps == -1 or args.max_steps >= 1
    require(sound, "train.max_steps", args.max_steps, ">= 1, or -1 for num_train_epochs", "leave it out")
    for name, values in ONE_OF.items():
        shown = ", ".join(str(value) for value in values if isinstance(value, str))
        require(getattr(args, name) in values, f"train.{name}", getattr(args, name), f"one of {shown}", "leave it out")


def _check_field(f: Any, value: Any) -> None:
    """Refuses a value that nothing reads; warns of one of which nobody knows."""
    if f.name in REFUSED:
        refused = REFUSED[f.name]
        launched = f.name == "local_rank" and str(value) == os.environ.get("LOCAL_RANK")  # DeepSpeed's launcher adds it
        if not launched and value not in refused.accepted:
            raise _refusal(f.name, "given" if refused.secret else repr(value), refused.why, refused.fix)
    elif f.name not in READ and value != f.default and f.default is not dataclasses.MISSING:
        warnings.warn(
            f"train.{f.name} is {value!r}, which the transformers that is installed has and this version of llmdistill "
            "was not tried with: it may do nothing",
            stacklevel=5,
        )


def _check_trackers(args: Any) -> None:
    for name in _trackers(args):
        if name in ("all", "none"):
            continue
        known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
        require(name in INTEGRATION_TO_CALLBACK, "train.report_to", name, f"none, or of {known}", "--report_to none")
        package = _PACKAGES.get(name, name)
        there = _installed(package) or (name == "tensorboard" and _installed("tensorboardX"))
        if not there:
            raise UserError(
                f"train.report_to is {name!r}, and the package {package} is not installed. Fix: pip install {package}, "
                "or --report_to none: metrics.jsonl and report.html have everything."
            )


def _check_metric(name: str | None) -> None:
    """That it can be one of those that evaluations here have, before the first of them."""
    if name is None:
        return
    text, _, metric = name.removeprefix("eval_").rpartition("/")
    known = {m.name for m in METRICS} | OTHER_METRICS
    plain = metric.removesuffix("_low").removesuffix("_high")
    found = text.rpartition("_")[2] in HELDOUT_TEXTS and plain in known if text else metric.endswith("loss")
    found = found or metric in ("mean_token_accuracy", "entropy") or text == "rewards"  # TRL's, of sft and dpo
    require(
        found,
        "train.metric_for_best_model",
        name,
        f"loss, or TEXT/METRIC as student/reverse_kl: TEXT of {', '.join(HELDOUT_TEXTS)}, METRIC of "
        f"{', '.join(sorted(known))}",
        "--metric_for_best_model student/reverse_kl",
    )


def _check_accumulation(kwargs: Any) -> None:
    others = sorted(set(kwargs or {}) - {"sync_each_batch"})
    if others:
        why = "the micro-batches of a step are made by the trainer"
        fix = "gradient_accumulation_steps"
        raise _refusal("accelerator_config gradient_accumulation_kwargs", repr(kwargs), why, fix)


def _check_checkpointing(kwargs: Any) -> None:
    """torch's own would be missed at the first step only."""
    known = {"every_n_layers", "offload", *inspect.signature(torch.utils.checkpoint.checkpoint).parameters}
    known |= {"context_fn", "determinism_check", "debug", "early_stop", "preserve_rng_state"}
    known -= {"function", "args", "kwargs"}
    others = sorted(set(kwargs or {}) - known)
    if others:
        needed = f"of {', '.join(sorted(known))}"
        require(False, "train.gradient_checkpointing_kwargs", others[0], needed, "'{\"use_reentrant\": false}'")


def _made_optimizer(args: Any) -> torch.optim.Optimizer:
    """One of torch's and transformers' own over nothing, with the arguments of the run; of others only that the
    package is there."""
    weight, name = torch.nn.Parameter(torch.zeros(1)), _optim(args)
    for prefix, package in _PACKAGES_OF_OPTIMIZERS.items():
        if name.startswith(prefix) and not _installed(package):
            raise ImportError(f"the package {package.replace('_', '-')} is not installed")
        if name.startswith(prefix) and args.optim_target_modules is None:
            raise ValueError("it needs train.optim_target_modules, as '[attn, mlp]'")
    if name.startswith(tuple(_PACKAGES_OF_OPTIMIZERS)):
        return torch.optim.SGD([weight], lr=1.0)  # which takes modules, not weights
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    if cls.__module__.startswith(("torch.", "transformers.")):
        made: torch.optim.Optimizer = cls([weight], **kwargs)
        return made
    return torch.optim.SGD([weight], lr=1.0)


def _resumed_from(value: Any) -> str | bool | None:
    """A checkpoint, True for the last one, None for a new run: of all that people write for them."""
    text = str(value).strip().lower()
    if text in ("true", "yes", "last", "latest"):
        return True
    return None if text in ("none", "null", "false", "no", "") else os.fspath(value)


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _refusal(name: str, value: str, why: str, fix: str) -> UserError:
    return UserError(f"train.{name} is {value}, and nothing here reads it: {why}. Fix: {fix}.")


def _optim(args: Any) -> str:
    return str(getattr(args.optim, "value", args.optim))


def _words(value: Any) -> list[str]:
    return value.split() if isinstance(value, str) else [str(getattr(v, "value", v)) for v in value or ()]


def _trackers(args: Any) -> list[str]:
    given = [args.report_to] if isinstance(args.report_to, str) else list(args.report_to)
    return [str(name) for name in given if name != "none"]


def _trackio(args: Any) -> bool:
    names = ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
    return args.project != "huggingface" or any(getattr(args, name) is not None for name in names)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
