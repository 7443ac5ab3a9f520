"""``llmdistill serve --ray``: replicas of the service on a Ray cluster, as many as the queue needs.

Ray Serve's proxy takes what comes to one address and hands it to a replica, none in particular: scoring needs no
affinity. Replicas come when the requests at each are more than ``--queue_depth``, and go when they are fewer; one that
goes answers what it has first. One that dies is replaced, and what it was at work with is sent again by its clients.
Weights that are pushed reach all replicas by ``--versions``, on a disk that every node sees.

Each replica reads the token from its own environment, and llmdistill has to be installed on every node: nothing of ours
is pickled but the settings.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any, TypeVar

from starlette.types import ASGIApp

from llmdistill.compat.ray import quiet
from llmdistill.errors import UserError
from llmdistill.service.engine import EngineDead
from llmdistill.service.routes import create_app
from llmdistill.service.serve import ServeConfig, bind, follow, limits_of, load, measure_lag, service_of, watch

APP, DEPLOYMENT = "llmdistill", "Replica"
LOOK_S, HEALTH_S, ANSWER_S = 1.0, 5.0, 20.0
AGAIN = "Fix: see to its head node (ray status), then start this command again."
DIED = "has died"
T = TypeVar("T")


class Replica:
    """One process with the engine, as Ray Serve starts it.

    Args:
        settings: the fields of :class:`~llmdistill.service.serve.ServeConfig`.
        guarded: whether the one that started the fleet has a token.
    """

    async def __init__(self, settings: dict[str, Any], guarded: bool) -> None:  # type: ignore[misc]  # as Ray has it
        config = ServeConfig(**settings)
        token = os.environ.get(config.token_env) or None
        if guarded and token is None:
            raise UserError(
                f"{config.token_env} is not set on this Ray node; its replica would answer anybody. "
                "Fix: set it before `ray start` on every node."
            )
        engine = load(config)
        await engine.start()
        self.service = service_of(config, token, engine)
        self.service.uploads.clear()
        await self.service.weights.fetch()
        self._watching = [asyncio.create_task(w) for w in (watch(self.service), measure_lag(self.service))]
        self._watching.append(asyncio.create_task(follow(self.service)))

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return create_app(self.service)

    async def check_health(self) -> None:
        """Ray starts another replica in place of one whose engine has died."""
        if self.service.dead:
            raise EngineDead("the engine has died")


def run(config: ServeConfig, token: str | None) -> int:
    """Deploys the fleet and stays until it is told to stop. Returns the exit status.

    Raises:
        UserError: no Ray, no cluster, or a replica that cannot start; says which.
    """
    import ray
    from ray import serve
    from ray.exceptions import RayError

    stopped, deployed = threading.Event(), threading.Event()

    def told(*_: object) -> None:
        stopped.set()
        if not deployed.is_set():
            raise KeyboardInterrupt  # Ray waits by itself

    with _cluster(config), bind(config.host, config.port) as free:
        for number in (signal.SIGTERM, signal.SIGINT):  # in place of Ray's
            signal.signal(number, told)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        port = free.getsockname()[1]
        free.close()
        with contextlib.suppress(KeyboardInterrupt):
            deploy(config, port, guarded=token is not None)
            deployed.set()
        scheme = "https" if config.tls_cert else "http"
        if deployed.is_set():
            print(f"serving {config.model} by Ray Serve on {scheme}://{config.host}:{port}", flush=True)
        shown, code = (-1, False), 0
        while not stopped.wait(LOOK_S):
            try:
                up, wanted, why = _within(ANSWER_S, standing)
            except TimeoutError:
                words = f"its head has not answered for {ANSWER_S:g} s"
                print(f"the Ray cluster is gone: {words}. {AGAIN}", file=sys.stderr, flush=True)
                os._exit(1)  # Ray would go on trying to reach it
            except (RayError, ConnectionError, RuntimeError, KeyError) as error:
                print(f"the Ray cluster is gone: {str(error).splitlines()[0]}. {AGAIN}", file=sys.stderr, flush=True)
                code = 1
                break
            lost = f": {why}; Ray starts others where there is room" if up < wanted else ""
            if (up, DIED in why) != shown:
                print(f"{up} of {wanted} replicas{lost}", flush=True)
                shown = up, DIED in why
        with contextlib.suppress(Exception):  # of a cluster that is gone
            serve.shutdown()
        ray.shutdown()
        return code


def deploy(config: ServeConfig, port: int, guarded: bool) -> None:
    """Starts the replicas and returns when they answer.

    Raises:
        UserError: one cannot start.
    """
    from ray import serve

    limits = limits_of(config)
    http: dict[str, Any] = {"host": config.host, "port": port, "request_timeout_s": None}
    if config.tls_cert:
        http |= {"ssl_certfile": config.tls_cert, "ssl_keyfile": config.tls_key}
    serve.start(proxy_location="EveryNode", http_options=http)
    many = config.max_replicas > config.replicas
    scaling: dict[str, Any] = {"num_replicas": config.replicas}
    if many:
        scaling = {
            "autoscaling_config": {
                "min_replicas": config.replicas,
                "max_replicas": config.max_replicas,
                "target_ongoing_requests": config.queue_depth,
                "upscale_delay_s": config.scale_up_s,
                "downscale_delay_s": config.scale_down_s,
            }
        }
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=DEPLOYMENT,
        # the service itself refuses what is too much: it knows whose turn it is, and says when to come back
        max_ongoing_requests=limits.callers,
        graceful_shutdown_timeout_s=config.drain_s,
        health_check_period_s=HEALTH_S,
        ray_actor_options={"num_cpus": config.replica_cpus, "num_gpus": _gpus(config)},
        **scaling,
    )
    try:
        serve.run(deployment.bind(asdict(config), guarded), name=APP, route_prefix="/")
    except RuntimeError as error:
        found = serve.status().applications.get(APP)
        words = [d.message for d in found.deployments.values()] if found else []
        serve.shutdown()
        raise UserError(_why([*words, str(error)])) from None


def standing() -> tuple[int, int, str]:
    """Replicas that answer, how many there are to be, and what Ray says of those that are missing."""
    import ray
    from ray import serve

    found = serve.status().applications[APP].deployments[DEPLOYMENT]
    up = found.replica_states.get("RUNNING", 0)
    missing = {state: n for state, n in found.replica_states.items() if state not in ("RUNNING", "STOPPING")}
    others = ", ".join(f"{count} {state.lower()}" for state, count in missing.items())
    dead = sorted({str(node["NodeManagerAddress"]) for node in ray.nodes() if not node["Alive"]})
    if dead:
        others = f"{others or 'lost'}, Ray node {', '.join(dead)} {DIED}"
    return up, up + sum(missing.values()), others or found.message or "lost"


def _within(seconds: float, work: Callable[[], T]) -> T:
    """What ``work`` returns.

    Raises:
        TimeoutError: not in that time; it goes on on its thread.
    """
    found: Future[T] = Future()

    def run() -> None:
        try:
            found.set_result(work())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return found.result(seconds)


@contextlib.contextmanager
def _cluster(config: ServeConfig) -> Iterator[None]:
    """The cluster at ``--ray_address``; without one, this machine alone.

    Raises:
        UserError: none is there.
    """
    import ray

    quiet()
    try:
        ray.init(
            address=config.ray_address or "local",
            include_dashboard=False if not config.ray_address else None,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"--ray_address {config.ray_address}: no Ray cluster answers there ({str(error).splitlines()[0][:200]}). "
            "Fix: `ray start --head` on its first node, and the address that prints; or leave it out for this machine."
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _gpus(config: ServeConfig) -> float:
    if config.replica_gpus >= 0:
        return config.replica_gpus
    import torch

    return float(config.tensor_parallel) if torch.cuda.is_available() else 0.0


def _why(words: list[str]) -> str:
    """What a replica that cannot start says, out of Ray's report of it."""
    lines = [line.strip() for text in words for line in text.splitlines()]
    for line in lines:
        name, found, rest = line.partition("UserError: ")
        if found:
            return rest
    said = next((line for line in reversed(lines) if "Error" in line), lines[0] if lines else "no reason given")
    return f"a replica cannot start: {said[:400]}. Fix: try the same command without --ray, which shows all of it."
