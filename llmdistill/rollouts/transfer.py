"""The student's weights to the engines of all replicas at one time, by vLLM's weight-transfer API and not over HTTP.

Replicas and trainer make a group, once; a push is one broadcast to all of them, in which they say by their answers
which weights came. A replica that is new, was started again or has joined another trainer makes the group anew with the
next push. What fails is said, and the push goes over HTTP to those that lack it.
"""

from __future__ import annotations

import json
import logging
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from llmdistill.compat.vllm_senders import gathered_to_the_end, in_json, make_sender
from llmdistill.errors import UserError
from llmdistill.ranks import from_first_rank, is_first, on_every_rank
from llmdistill.wire.protocol import INFO, JOIN, RECEIVE
from llmdistill.wire.transport import Request, Transport, json_object

Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]
Pairs = Callable[[], Iterator[tuple[str, Tensor]]]
_logger = logging.getLogger(__name__)


class Transfers:
    """What sends to the replicas of a service, and what has become of it.

    Args:
        backend: of `rollouts.transfer`.
        replicas: a transport to each replica there is now, by its url.
    """

    def __init__(self, backend: str, replicas: Callable[[], Mapping[str, Transport]]) -> None:
        self.backend, self._replicas = backend, replicas
        self._fleet = Fleet(backend)
        self._sender: Any = None
        self._shapes: Shapes = {}
        self._pairs: Pairs = lambda: iter(())

    def push(self, model: nn.Module, pairs: Pairs, policy_version: int, digest: str) -> str | None:
        """The fingerprint of the weights that all replicas have now; None where it did not work. Every rank calls it.

        Args:
            pairs: the weights as they are sent, from the start; gathering them takes every rank.

        Raises:
            UserError: a replica does not take weights this way, or the backend cannot send this student.
        """
        self._pairs = pairs
        if not self._shapes:
            self._shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in pairs()}
        plan = from_first_rank(self._plan)
        made = on_every_rank(lambda: self._joined(plan, model))
        failed = from_first_rank(lambda: made)
        if failed is None:
            self._fleet.policy_version, self._fleet.digest = policy_version, digest
            here = self._send()
            failed = from_first_rank(lambda: here)
            teachers = set(from_first_rank(lambda: self._fleet.teachers))
            if failed is None and len(teachers) == 1:
                return str(teachers.pop())
            failed = failed or f"the replicas say different weights came: {sorted(teachers)}"
        self.close()
        if is_first():
            _logger.warning("rollouts.transfer %s failed, weights go over HTTP: %s", self.backend, failed)
        return None

    def close(self) -> None:
        if self._sender is not None:
            self._sender.shutdown()
        self._sender, self._fleet.group = None, ""

    def _plan(self) -> dict[str, Any]:
        """Whether a new group is needed, and how large it is. The first rank asks."""
        fleet = self._fleet
        transports = dict(self._replicas())
        asking = Request(INFO, json_object, method="GET")
        with ThreadPoolExecutor(len(transports)) as threads:
            infos = list(threads.map(lambda t: t.send(asking)["transfer"], transports.values()))
        for url, info in zip(transports, infos, strict=True):
            if info is None or info["backend"] != self.backend:
                there = "HTTP alone" if info is None else info["backend"]
                raise UserError(
                    f"rollouts.transfer is {self.backend}, and {url} takes weights by {there}. Fix: start it with "
                    f"--transfer {self.backend}, or --rollouts.transfer http."
                )
        workers = {int(info["workers"]) for info in infos}
        if len(workers) > 1:
            raise UserError(
                f"rollouts.transfer is {self.backend}, and the replicas have {sorted(workers)} workers; they are sent "
                "to together. Fix: one --tensor_parallel for all, or --rollouts.transfer http."
            )
        whole = self._sender is not None and fleet.transports.keys() == transports.keys()
        whole = whole and all(info["group"] == fleet.group for info in infos)
        fleet.transports = transports
        address = _own_address(next(iter(transports)))
        return {"join": not whole, "replicas": len(transports), "workers": workers.pop(), "address": address}

    def _joined(self, plan: Mapping[str, Any], model: nn.Module) -> str | None:
        """Makes the group where there is none; what went wrong."""
        if not plan["join"]:
            return None
        self.close()
        fleet = self._fleet
        fleet.group, fleet.shapes = uuid.uuid4().hex, {name: list(shape) for name, (_, shape) in self._shapes.items()}
        there = torch.distributed.is_initialized()
        rank, ranks = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if there else (0, 1)
        workers = plan["replicas"], plan["workers"]
        current = lambda: self._pairs()  # noqa: E731  (of each push)
        several = {"rank": rank, "ranks": ranks, "workers": workers, "address": plan["address"]}
        try:
            self._sender = make_sender(self.backend, current, self._shapes, model, fleet, **several)
        except UserError:
            raise
        except Exception as error:  # of vLLM, NCCL, gloo, or a replica's refusal
            return _line(error)
        return None

    def _send(self) -> str | None:
        """What went wrong."""
        try:
            self._sender.send_weights()
        except Exception as error:
            self._fleet.given_up = True
            gathered_to_the_end(self._sender)
            return _line(error)
        return None


class Fleet:
    """What vLLM's senders take for an engine: all replicas, told at one time over HTTP, by the first rank alone."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.transports: Mapping[str, Transport] = {}
        self.group, self.digest, self.policy_version = "", "", 0
        self.shapes: dict[str, list[int]] = {}
        self.teachers: list[str] = []  # fingerprints of what came
        self.given_up = False

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        body = {"group": self.group, "backend": self.backend, "init": init_info, "shapes": self.shapes}
        self._each(JOIN, [{**body, "replica": i} for i in range(len(self.transports))])

    def start_weight_update(self) -> None:
        """Returns when every replica waits for the weights. It starts, takes and finishes them at the next request: a
        trainer that dies leaves none half way."""
        self.teachers, self.given_up = [], False
        self._each(RECEIVE, [{**self._push(), "update": None}] * len(self.transports))

    def update_weights(self, update_info: Any) -> None:
        if isinstance(update_info, dict) and "ipc_handles" in update_info:
            update_info = {**update_info, "ipc_handles": in_json(update_info["ipc_handles"])}
        found = self._each(RECEIVE, [{**self._push(), "update": update_info}] * len(self.transports))
        self.teachers = [str(told["teacher"]) for told in found]

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Done already."""

    def _push(self) -> dict[str, Any]:
        return {"group": self.group, "digest": self.digest, "policy_version": self.policy_version}

    def _each(self, path: str, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        def tell(transport: Transport, body: dict[str, Any]) -> dict[str, Any]:
            return transport.send(Request(path, json_object, body=json.dumps(body).encode()), lambda: self.given_up)

        with ThreadPoolExecutor(len(bodies)) as threads:
            return list(threads.map(tell, self.transports.values(), bodies))


def _own_address(url: str) -> str:
    """Of this machine, as a replica sees it."""
    parts = urlsplit(url)
    family, kind, *_, place = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as asked:
        asked.connect(place)  # of datagrams: nothing is sent
        return str(asked.getsockname()[0])


def _line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
