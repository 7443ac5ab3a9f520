"""``llmdistill serve``: one model behind HTTP, for every trainer, dataset script and evaluation that wants it."""

from __future__ import annotations

import asyncio
import difflib
import ipaddress
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import HfArgumentParser

from llmdistill.compat.uvicorn import bounded_connections
from llmdistill.errors import UserError
from llmdistill.options import in_our_words
from llmdistill.recipe.config import DType, TeacherConfig
from llmdistill.recipe.settings import option
from llmdistill.service.app import Service
from llmdistill.service.engine import Engine, EngineDead
from llmdistill.service.gate import Gate
from llmdistill.service.limits import Limits
from llmdistill.service.problems import Problem
from llmdistill.service.remote_gate import RemoteGate
from llmdistill.service.routes import create_app
from llmdistill.service.uploads import Uploads

if TYPE_CHECKING:
    import uvicorn

    from llmdistill.compat.vllm_clients import Seat

SCALING = (("scale_up_s", 0.0), ("scale_down_s", 0.0))
WATCH_S, LAG_EVERY_S, FOLLOW_S = 2.0, 0.05, 0.25
OTHER_FILES = 256  # than connections: the model's, the engine's, libraries'
WHY_ALONE = {  # what several processes in front of one engine do not go with
    "ray": "a replica of a fleet is one process, and there may be more replicas",
    "versions": "replicas that share a folder are one process each",
    "transfer": "a trainer sends to an engine through one process",
    "max_lora_rank": "an adapter is known to one process",
}
# Limits that are settings of the command; the others are the same for everybody.
LIMITS = ("top_k", "sequences", "positions", "new_tokens", "body_bytes", "in_flight", "queue_tokens")


@dataclass
class ServeConfig:
    """What is served, where, and to whom."""

    model: str = option("", "folder or hub name of the model")
    engine: Literal["vllm", "hf"] = option("vllm", "vllm, or hf: any architecture, caller-chosen ids, all log-probs")
    dtype: DType = option("bfloat16", "dtype of the weights")
    host: str = option("127.0.0.1", "address to listen on; any but a loopback one needs a token")
    port: int = option(8100, "port; 0: a free one, which is printed")
    token_env: str = option(
        "LLMDISTILL_TOKEN", "environment variable with the bearer token callers have to show, or several"
    )
    tls_cert: str = option("", "file with the certificate (chain) of this host: https instead of http")
    tls_key: str = option("", "file with its private key")
    max_model_len: int = option(4096, "longest sequence, prompt and completion")
    updatable: bool = option(False, "take new weights: a student's, for rollouts")
    transfer: Literal["", "nccl", "nccl_m2n", "ipc", "gloo"] = option(
        "", "by which backend of vLLM a trainer may send weights (vllm, --updatable); empty: over HTTP alone"
    )
    allow_weights: list[str] = field(
        default_factory=list, metadata={"help": "folders that weights and adapters may be read from"}
    )
    upload_folder: str = option("", "where pushed weights are written to on their way; empty: memory (/dev/shm)")
    versions: str = option(
        "", "folder that all replicas of a fleet see: weights pushed to one of them reach the others"
    )
    max_lora_rank: int = option(0, "largest rank of adapters (vllm); 0: no adapters")
    max_adapters: int = option(Limits.adapters, "most adapters loaded at one time")
    batch_tokens: int = option(16384, "token budget of one forward pass")
    kv_cache_gib: float = option(0.5, "vllm's key-value cache on CPU")
    gpu_memory_utilization: float = option(0.9, "vllm's share of the GPU")
    tensor_parallel: int = option(1, "GPUs one copy of the model is spread over (vllm)")
    drain_s: float = option(60.0, "at SIGTERM: seconds given to the requests that are there")
    api_processes: int = option(1, "processes that answer, all with one engine (vllm)")
    trust_remote_code: bool = option(False, "run model code that comes with the checkpoint")
    top_k: int = option(Limits.top_k, "most tokens listed at a position")
    sequences: int = option(Limits.sequences, "most sequences of one request")
    positions: int = option(Limits.positions, "most scored positions of one request")
    new_tokens: int = option(Limits.new_tokens, "longest completion")
    body_bytes: int = option(Limits.body_bytes, "largest body of a request")
    in_flight: int = option(Limits.in_flight, "most requests at one time; more get 429")
    queue_tokens: int = option(Limits.queue_tokens, "most tokens of all of them")
    ray: bool = option(False, "replicas on a Ray cluster behind one address (Ray Serve)")
    ray_address: str = option("", "of the cluster, or auto: the one this machine is in; empty: this machine alone")
    replicas: int = option(1, "that always run (with --ray)")
    max_replicas: int = option(0, "that run when there is much to do; 0: no more than --replicas")
    queue_depth: float = option(
        8.0, "requests at a replica, waiting ones included, from which more of them are started"
    )
    scale_up_s: float = option(30.0, "the queue has to be long for so many seconds before a replica is started")
    scale_down_s: float = option(600.0, "and short for so many before one goes")
    replica_cpus: float = option(1.0, "CPUs that Ray sets aside for a replica")
    replica_gpus: float = option(
        -1.0, "GPUs that Ray sets aside for a replica; -1: --tensor_parallel where there are any"
    )


def parsed(argv: Sequence[str]) -> ServeConfig:
    """The settings of a command line.

    Raises:
        UserError: an unknown option, or a value of the wrong type.
    """

    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:
            raise UserError(
                f"llmdistill serve: {in_our_words(message)}. Fix: llmdistill serve --help lists the options."
            )

    parser = Parser(ServeConfig, allow_abbrev=False, add_help=False)  # type: ignore[arg-type]
    config, unknown = parser.parse_args_into_dataclasses(list(argv), return_remaining_strings=True)
    if unknown:
        near = difflib.get_close_matches(
            unknown[0].lstrip("-").replace("-", "_"), [f.name for f in fields(ServeConfig)], 1
        )
        hint = f"; did you mean --{near[0]}?" if near else ""
        raise UserError(f"llmdistill serve: unknown option {unknown[0]!r}{hint}")
    return config  # type: ignore[no-any-return]


def check(config: ServeConfig, token: str | None) -> None:
    """Refuses what would be unsafe or cannot work, before the model is loaded.

    Raises:
        UserError: says what to change.
    """
    if not config.model:
        raise UserError("--model is empty; it must be a folder or hub name. Fix: llmdistill serve --model PATH.")
    if token is None and not is_loopback(config.host):
        raise UserError(
            f"--host {config.host} can be reached from other machines and there is no token. "
            f"Fix: set the environment variable {config.token_env}, or --host 127.0.0.1."
        )
    if config.engine == "vllm" and config.updatable and config.max_lora_rank:
        raise UserError(
            f"--updatable and --max_lora_rank {config.max_lora_rank} are both given; vLLM takes either new weights or "
            "adapters. Fix: leave out the one your student does not send."
        )
    if config.transfer and (config.engine != "vllm" or not config.updatable or config.versions):
        raise UserError(
            f"--transfer {config.transfer} is given; it is for --engine vllm with --updatable, each replica by its own "
            "address (without --versions). Fix: leave it out, and weights come over HTTP."
        )
    for name, folder in [
        *(("allow_weights", f) for f in config.allow_weights),
        ("upload_folder", config.upload_folder),
        ("versions", config.versions),
    ]:
        if folder and not Path(folder).is_dir():
            raise UserError(f"--{name} {folder}: no such folder. Fix: make it, or name another.")
    if config.versions and not config.updatable:
        raise UserError("--versions is given and --updatable is not: nobody may push any. Fix: --updatable true.")
    _check_processes(config)
    if config.ray:
        _check_fleet(config)
    if config.max_adapters < 1:
        raise UserError(f"--max_adapters is {config.max_adapters}; it must be at least 1. Fix: --max_adapters 4.")
    if bool(config.tls_cert) != bool(config.tls_key):
        missing = "--tls_key" if config.tls_cert else "--tls_cert"
        raise UserError(f"{missing} is missing; certificate and key go together. Fix: give both, or neither.")
    for name, file in (("tls_cert", config.tls_cert), ("tls_key", config.tls_key)):
        if file and not Path(file).is_file():
            raise UserError(f"--{name} {file}: no such file. Fix: a PEM file.")


def _check_processes(config: ServeConfig) -> None:
    count = config.api_processes
    if count < 1:
        raise UserError(f"--api_processes is {count}; it must be at least 1. Fix: --api_processes 1.")
    if count == 1:
        return
    if config.engine != "vllm":
        raise UserError(
            f"--api_processes {count} is given with --engine {config.engine}; only vLLM's engine runs in a process of "
            "its own that several can ask. Fix: --engine vllm, or leave it out."
        )
    clashes = {"ray": config.ray, "versions": config.versions, "transfer": config.transfer}
    clashes["max_lora_rank"] = config.max_lora_rank
    if clash := next((name for name, value in clashes.items() if value), None):
        raise UserError(
            f"--api_processes {count} and --{clash} are both given; {WHY_ALONE[clash]}. Fix: leave one of them out."
        )


def _check_fleet(config: ServeConfig) -> None:
    for name, least in (("replicas", 1), ("max_replicas", 0), ("queue_depth", 0.1), ("replica_cpus", 0.0), *SCALING):
        if (value := getattr(config, name)) < least:
            raise UserError(f"--{name} is {value}; it must be at least {least}. Fix: --{name} {max(least, 1)}.")
    if 0 < config.max_replicas < config.replicas:
        raise UserError(
            f"--max_replicas {config.max_replicas} is below --replicas {config.replicas}. Fix: leave it out."
        )
    if config.updatable and max(config.replicas, config.max_replicas) > 1 and not config.versions:
        raise UserError(
            "--updatable with several replicas needs --versions: a push reaches one of them, and the others would "
            "keep old weights. Fix: --versions FOLDER on a disk that every node sees."
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def help_text() -> str:
    lines = ["usage: llmdistill serve --model PATH [--option value ...]", "", str(ServeConfig.__doc__), ""]
    for f in fields(ServeConfig):
        default = f.default if f.default_factory is None or not callable(f.default_factory) else "-"
        lines.append(f"  --{f.name:<24} {f.metadata['help']} [{default}]")
    return "\n".join(lines)


def load(config: ServeConfig, seat: Seat | None = None) -> Engine:
    """The engine, with the model in it; with a ``seat``, one that other processes ask too."""
    if config.engine == "vllm":
        from llmdistill.service.vllm_engine import AsyncVLLMEngine

        return AsyncVLLMEngine(config.model, seat=seat, **settings_of(config))
    import torch

    from llmdistill.service.hf_engine import HFEngine
    from llmdistill.teachers.local import LocalTeacher

    teacher = TeacherConfig(model=config.model, dtype=config.dtype, trust_remote_code=config.trust_remote_code)
    local = LocalTeacher.load(teacher, "cuda" if torch.cuda.is_available() else "cpu")
    return HFEngine(local, batch_tokens=config.batch_tokens, max_model_len=config.max_model_len)


def settings_of(config: ServeConfig) -> dict[str, Any]:
    """Of :class:`~llmdistill.service.vllm_engine.AsyncVLLMEngine`."""
    return {
        "dtype": config.dtype,
        "max_top_k": config.top_k,
        "max_model_len": config.max_model_len,
        "kv_cache_gib": config.kv_cache_gib,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "trust_remote_code": config.trust_remote_code,
        "updatable": config.updatable,
        "max_lora_rank": config.max_lora_rank,
        "max_adapters": config.max_adapters,
        "transfer": config.transfer,
        "max_num_batched_tokens": max(config.batch_tokens, config.max_model_len + 1),
        "tensor_parallel_size": config.tensor_parallel,
    }


def limits_of(config: ServeConfig) -> Limits:
    """What the service takes on."""
    own = {name: getattr(config, name) for name in LIMITS}
    return Limits(sequence_tokens=config.max_model_len, adapters=config.max_adapters, **own)


def service_of(
    config: ServeConfig,
    token: str | None,
    engine: Engine,
    on_dead: Callable[[], None] = lambda: None,
    gate: Gate | RemoteGate | None = None,
) -> Service:
    """The service around an engine, or one of several processes around it."""
    limits = limits_of(config)
    if config.api_processes > 1:  # each has its part of what is held in memory
        parts = {name: getattr(limits, name) // config.api_processes for name in ("answers_bytes", "bodies_bytes")}
        limits = replace(limits, **parts)
    return Service(
        engine,
        limits,
        token=token,
        weight_folders=[Path(folder) for folder in config.allow_weights],
        accept_weights=config.updatable,
        upload_folder=Path(config.upload_folder) if config.upload_folder else None,
        versions=Path(config.versions) if config.versions else None,
        on_dead=on_dead,
        gate=gate,
    )


def service_uploads(config: ServeConfig) -> Uploads:
    """Where weights are written to on their way."""
    return Uploads(Path(config.upload_folder) if config.upload_folder else None)


def http_server(service: Service, config: ServeConfig) -> uvicorn.Server:
    """What speaks HTTP for the service; signals are not its business."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    settings: dict[str, Any] = {"log_level": "warning", "access_log": False, "lifespan": "off"}
    settings |= {"timeout_graceful_shutdown": 10, "ws": "none"}
    settings["http"] = bounded_connections(service.limits.connections)
    if config.tls_cert:
        settings |= {"ssl_certfile": config.tls_cert, "ssl_keyfile": config.tls_key}
    return Server(uvicorn.Config(create_app(service), **settings))


def announce(config: ServeConfig, engine: str, most: int, listening: socket.socket) -> None:
    """Says that the service is there, and where.

    Args:
        engine: its kind and what else is to be said of it.
        most: tokens that it lists at a position.
    """
    host, port = listening.getsockname()[:2]
    shown, scheme = f"[{host}]" if ":" in host else host, "https" if config.tls_cert else "http"
    print(f"serving {config.model} ({engine}, top-k up to {most}) on {scheme}://{shown}:{port}", flush=True)


async def serve(config: ServeConfig, token: str | None) -> int:
    """Loads, listens, and drains when told to stop."""
    allow_files(limits_of(config))
    listening = bind(config.host, config.port)
    try:
        engine = load(config)
        await engine.start()

        server: uvicorn.Server

        def dead() -> None:
            print("the engine has died; the service ends", file=sys.stderr)
            server.should_exit = True

        gate = Gate(limits_of(config), lambda: engine.capacity_tokens)
        service = service_of(config, token, engine, dead, gate)
        service.uploads.clear()
        await service.weights.fetch()
        server = http_server(service, config)
        stopping: list[asyncio.Task[None]] = []

        async def stop() -> None:
            print(f"draining: {gate.requests} requests", file=sys.stderr, flush=True)
            if not await gate.drained(config.drain_s):
                print(f"{gate.requests} requests were not done in {config.drain_s:g} s", file=sys.stderr)
            server.should_exit = True

        def told() -> None:
            if stopping:
                server.force_exit = server.should_exit = True
            else:
                stopping.append(asyncio.get_running_loop().create_task(stop()))

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, told)
        announce(config, f"{engine.kind}, {engine.dtype}", min(service.limits.top_k, engine.max_top_k), listening)
        watching = [asyncio.create_task(work) for work in (watch(service), measure_lag(service), follow(service))]
        await server.serve(sockets=[listening])
        for task in watching:
            task.cancel()
        await engine.close()
        service.adapters.close()
        code = 1 if service.dead else 0
        if gate.requests:  # what was not done in time must not keep the process
            sys.stdout.flush()
            os._exit(code)
        return code
    finally:
        listening.close()


async def watch(service: Service, every_s: float = WATCH_S) -> None:
    """Notices an engine that dies while nobody asks it."""
    while not service.dead:
        await asyncio.sleep(every_s)
        try:
            await service.engine.check()
        except EngineDead:
            service.died()


async def follow(service: Service, every_s: float = FOLLOW_S) -> None:
    """Loads what was pushed to other replicas."""
    while service.weights.versions is not None and not service.dead:
        await asyncio.sleep(every_s)
        try:
            await service.weights.fetch()
        except (EngineDead, UserError) as error:
            print(error, file=sys.stderr, flush=True)
            service.died()
        except Problem:  # it goes down
            return


async def measure_lag(service: Service) -> None:
    """How late the event loop is, for the metrics: whatever keeps it busy keeps every caller waiting."""
    while True:
        wanted = time.monotonic() + LAG_EVERY_S
        await asyncio.sleep(LAG_EVERY_S)
        service.metrics.late(max(time.monotonic() - wanted, 0.0))


def allow_files(limits: Limits) -> None:
    """Raises this process's limit on open files to what that many connections need.

    Raises:
        UserError: more than the system lets it have.
    """
    needed = limits.connections + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        fits = max((hard - OTHER_FILES - 64) // (2 * limits.callers_per_request), 1)
        raise UserError(
            f"--in_flight {limits.in_flight} means up to {limits.connections} connections, and this process may have "
            f"{hard} files open. Fix: a higher limit (ulimit -Hn {needed}), or --in_flight {fits}."
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        UserError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: {error.strerror}. Fix: another port; 0 takes a free one."
        ) from error
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else every answer waits 40 ms for an ack
    return listening
