"""Sampling in a service of its own: the trainer pushes the student's weights there and asks for completions.

Requests name the weights they expect. A service that was started again, with weights of its own, therefore refuses
them, gets the student's once more, and the step goes on. Every push has a word of its own, the same on all ranks:
before weights go out the service is asked whether it has those already, and of several ranks that find it without them
one pushes while the others wait there.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from llmdistill.errors import UserError
from llmdistill.files import full_disk_is_said
from llmdistill.models.weights import base_model, named_weights
from llmdistill.ranks import from_first_rank, is_first
from llmdistill.rollouts.asking import sample
from llmdistill.rollouts.engine import Hear
from llmdistill.rollouts.probe import check_engine
from llmdistill.rollouts.transfer import Transfers
from llmdistill.texts.rollout import Prompt, Rollout, Sampling
from llmdistill.wire.protocol import (
    INFO,
    OFFER,
    PROTOCOL_VERSION,
    READY,
    TENSORS_TYPE,
    WEIGHTS,
)
from llmdistill.wire.tensors import safetensors_stream
from llmdistill.wire.transport import Ask, Get, Gone, Refused, Request, Transport, json_object

PUSHES_PER_CALL = 3  # a service that forgets its weights more often shares them with another run

T = TypeVar("T")
Weights = Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Snapshot:
    """The student's weights of one step, under the names of a checkpoint."""

    policy_version: int
    weights: Mapping[str, Tensor]
    trained_only: bool  # the others are not in it


class RemoteRollouts:
    """Samples from the student in a rollout service. Implements :class:`~llmdistill.rollouts.engine.RolloutEngine`.

    Args:
        url: of the service, or several with commas: every one gets the weights, prompts are shared out.
        eos_ids, pad_id: every id that ends a completion, and the padding id.
        push_every: optimizer steps between two pushes; what is sampled meanwhile says how old it is.
        folder: on a disk that the service can read: weights are written there, and only the path is sent.
        transfer: http, or a backend of vLLM's weight-transfer API (:mod:`llmdistill.rollouts.transfer`).
        batch_tokens: of :func:`sample`.
        options: of :class:`~llmdistill.wire.transport.Transport`.

    Raises:
        UserError: no service there within ``max_outage_s``, or one that takes no weights.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        token: str | None = None,
        push_every: int = 1,
        folder: str | Path | None = None,
        timeout_s: float = 600.0,
        transfer: str = "http",
        batch_tokens: int = 0,
        **options: Any,
    ) -> None:
        self.batch_tokens = batch_tokens
        self.eos_ids, self.pad_id, self.push_every = tuple(eos_ids), pad_id, push_every
        self.folder = Path(folder).resolve() if folder is not None else None
        self.policy_version: int | None = None  # of the weights in the service
        self._digest = ""  # the word under which all of them are pushed
        self._fingerprint: str | None = None
        self._model: nn.Module | None = None
        self._admitting = threading.Lock()
        self._info: dict[str, Any] = {}  # what every replica can do
        self._written: Path | None = None  # the weights of the last push
        self._snapshot: Snapshot | None = None  # that was pushed, where it was not the model as it is now
        settings = {"token": token, "section": "rollouts", "timeout_s": timeout_s, "admit": self._admit, **options}
        self.transport = Transport(url, **settings)
        self._each: dict[str, Transport] = {}  # to one replica each
        self._transfers = Transfers(transfer, self._one_by_one) if transfer != "http" else None
        try:
            self.transport.wait_ready()
        except BaseException:
            self.close()
            raise

    def sync(self, model: nn.Module, policy_version: int) -> None:
        """Pushes the weights of ``model`` if ``push_every`` steps have gone by; after the first time only the trained,
        where every replica takes a part.

        Every rank of a launch calls it; rank 0 sends, and all go on when the service has the weights. They do not wait
        for it in a collective, which an outage of the service would time out.

        Raises:
            UserError: the service does not take them, or after the first push says other log-probs than the student; on
                every rank.
        """
        self._model, self._snapshot = model, None
        if self.policy_version is not None and 0 <= policy_version - self.policy_version < self.push_every:
            return
        trained_only = self._pushes_trained_only(model)
        if self._transfers is not None and self._transferred(self._transfers, model, policy_version):
            return
        # a service that was started again has not got the weights that the trained ones belong to
        plan = from_first_rank(lambda: self._plan(trained_only))
        partial, digest = bool(plan["partial"]), str(plan["digest"])
        weights = self._weights(model, partial, keep=is_first())
        self._fingerprint = from_first_rank(lambda: self._push(lambda: weights, policy_version, partial, digest))
        # should the service lose them, all weights go out: under a word that is the same on every rank
        self._has(model, policy_version, f"{digest}-whole" if partial else digest)

    def _transferred(self, transfers: Transfers, model: nn.Module, policy_version: int) -> bool:
        """Whether all replicas have the weights now, without HTTP."""
        digest = str(from_first_rank(lambda: uuid.uuid4().hex))
        found = transfers.push(model, lambda: self._sent(model), policy_version, digest)
        if found is None:
            return False
        self._fingerprint = found
        self._has(model, policy_version, digest)
        return True

    def _has(self, model: nn.Module, policy_version: int, digest: str) -> None:
        """The service has the weights of ``model``; after the first of them it has to say what the student says."""
        first = self.policy_version is None
        self.policy_version, self._digest = policy_version, digest
        if first:
            check_engine(self, model, float32=self._info["dtype"] == "float32")

    def snapshot(self, model: nn.Module, policy_version: int) -> Snapshot:
        """The weights of ``model`` as they are now, for :meth:`install` to push while training goes on.

        Every rank of a launch calls it, between steps: shards are gathered by all together. Of what is never trained
        there is no copy. The copies are on the host, no wider than the service holds them; of sharded weights on rank 0
        alone.
        """
        self._model = model
        trained_only = self._pushes_trained_only(model)
        keep = is_first() or not _is_sharded(model)
        return Snapshot(policy_version, self._weights(model, trained_only, keep=keep, copy=True), trained_only)

    def install(self, snapshot: Snapshot) -> None:
        """Pushes a snapshot, unless the service has the weights of that step. Every rank calls it, as :meth:`sync`,
        which comes before.

        Raises:
            UserError: as :meth:`sync`.
        """
        if self.policy_version == snapshot.policy_version:
            return
        plan = from_first_rank(lambda: self._plan(snapshot.trained_only))
        partial, digest, version = bool(plan["partial"]), str(plan["digest"]), snapshot.policy_version
        self._snapshot = snapshot
        whole = not snapshot.trained_only
        weights = (lambda: snapshot.weights) if partial or whole else self._whole
        self._fingerprint = from_first_rank(lambda: self._push(weights, version, partial, digest))
        self.policy_version, self._digest = version, f"{digest}-whole" if partial else digest

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, hear: Hear | None = None) -> Rollout:
        """Completions with the eos that ended them, their log-probs in the distribution sampled from, and the version
        of the weights that the service says it used.

        Args:
            hear: of :func:`sample`.

        Raises:
            UserError: a prompt leaves no room for ``max_new_tokens``; the service keeps losing the student's weights.
        """
        assert self._model is not None and self.policy_version is not None, "sync() comes before generate()"
        for _ in range(PUSHES_PER_CALL):
            try:
                return sample(
                    self.transport,
                    prompts,
                    sampling,
                    limits=self._info["limits"],
                    vocab_size=int(self._info["vocab_size"]),
                    pad_id=self.pad_id,
                    eos_ids=self.eos_ids,
                    teacher=self._fingerprint,
                    batch_tokens=self.batch_tokens,
                    hear=hear,
                )
            except Refused as refusal:
                if refusal.status != 409:
                    raise
            self._push_again(self._model)
        raise UserError(
            f"rollouts {', '.join(self.transport.urls)} had other weights than were pushed, {PUSHES_PER_CALL} times in "
            f"one step. Fix: give every run a rollout service of its own."
        )

    def close(self) -> None:
        for transport in (self.transport, *self._each.values()):
            transport.close()
        if self._transfers is not None:
            self._transfers.close()
        self._forget_written()

    def _admit(self, get: Get) -> None:
        info = service_info(get, "rollouts")
        if not info["weights"]:
            raise UserError(
                f"rollouts.url {info['name']!r} is a service that takes no weights; the student's have to be pushed. "
                f"Fix: start it so that it takes them."
            )
        with self._admitting:
            if before := self._info:
                info["partial_weights"] = info["partial_weights"] and before["partial_weights"]
                info["limits"] = {name: min(value, before["limits"][name]) for name, value in info["limits"].items()}
            self._info = info

    def _plan(self, trained_only: bool) -> dict[str, Any]:
        """What is pushed, and the word for it."""
        partial = trained_only and bool(self._info["partial_weights"]) and self._has_ours()
        return {"partial": partial, "digest": uuid.uuid4().hex}

    def _has_ours(self) -> bool:
        if self._fingerprint is None:
            return False
        asking = Request(INFO, json_object, method="GET")
        return all(info["teacher"] == self._fingerprint for info in self._at_each(lambda t: t.send(asking)))

    def _pushes_trained_only(self, model: nn.Module) -> bool:
        return self.folder is None and not all(p.requires_grad for p in base_model(model).parameters())

    def _push_again(self, model: nn.Module) -> None:
        if _is_sharded(model):
            raise UserError(
                f"rollouts {', '.join(self.transport.urls)} was started again and lost the student's weights; sharded "
                f"ones are pushed between steps only. Fix: --resume."
            )
        assert self.policy_version is not None
        self._fingerprint = self._push(self._whole, self.policy_version, False, self._digest)

    def _whole(self) -> Mapping[str, Tensor]:
        """All weights of the last push. What is trained has gone on since a snapshot; the rest is as it always was."""
        assert self._model is not None
        if self._snapshot is not None and not self._snapshot.trained_only:
            return self._snapshot.weights
        if self._snapshot is not None and _is_sharded(self._model):
            raise UserError(
                f"rollouts {', '.join(self.transport.urls)} was started again and lost the student's weights; sharded "
                "ones are gathered between steps only. Fix: --resume."
            )
        weights = self._weights(self._model, False, keep=True)
        return weights if self._snapshot is None else {**weights, **self._snapshot.weights}

    def _weights(self, model: nn.Module, partial: bool, keep: bool, copy: bool = False) -> dict[str, Tensor]:
        """What is sent, on the CPU and no wider than the service holds it; a ``copy`` outlives the next step."""
        dtype = getattr(torch, self._info["dtype"], torch.float32)
        tied = getattr(base_model(model).config, "tie_word_embeddings", False)
        kept: dict[str, Tensor] = {}
        for name, tensor in named_weights(model, trainable_only=partial):  # every rank: it gathers shards
            if keep and not (tied and name == "lm_head.weight"):
                narrower = tensor.is_floating_point() and dtype.itemsize < tensor.dtype.itemsize
                kept[name] = tensor.to("cpu", dtype if narrower else tensor.dtype, copy=copy)
        return kept

    def _sent(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """All weights as they are sent, where they are: no wider than the service holds them."""
        dtype = getattr(torch, self._info["dtype"], torch.float32)
        tied = getattr(base_model(model).config, "tie_word_embeddings", False)
        for name, tensor in named_weights(model):
            if not (tied and name == "lm_head.weight"):
                narrower = tensor.is_floating_point() and dtype.itemsize < tensor.dtype.itemsize
                yield name, tensor.detach().to(dtype) if narrower else tensor.detach()

    def _push(self, weights: Weights, policy_version: int, partial: bool, digest: str) -> str:
        """The fingerprint that the services give the weights. All are sent to at one time, those that lack them."""
        made = _Once(weights)
        found = self._at_each(lambda t: t.send(self._pushing(made, policy_version, partial, digest)))
        fingerprints = {str(told["teacher"]) for told in found}
        if len(fingerprints) > 1:
            raise UserError(
                f"rollouts.url names services that differ after the same weights were pushed: {sorted(fingerprints)}. "
                f"Fix: start all of them with one checkpoint."
            )
        return fingerprints.pop()

    def _pushing(
        self, weights: _Once[Mapping[str, Tensor]], policy_version: int, partial: bool, digest: str
    ) -> Request[dict[str, Any]]:
        named: dict[str, Any] = {"policy_version": policy_version, "digest": digest}

        def already(ask: Ask) -> dict[str, Any] | None:
            told: dict[str, Any] = ask(Request(OFFER, json_object, body=json.dumps(named).encode()))
            return None if told["needed"] else told

        if self.folder is None:
            stream = _Once(lambda: safetensors_stream(weights()))
            params = {name: str(value) for name, value in named.items()} | ({"partial": "true"} if partial else {})
            return Request(
                WEIGHTS,
                json_object,
                body=lambda: stream()[1](),
                length=lambda: stream()[0],
                body_type=TENSORS_TYPE,
                params=params,
                already=already,
            )
        path = _Once(lambda: json.dumps({"path": str(self._write(weights(), policy_version)), **named}).encode())
        return Request(WEIGHTS, json_object, body=lambda: [path()], length=lambda: len(path()), already=already)

    def _at_each(self, work: Callable[[Transport], T]) -> list[T]:
        """``work`` with every replica there is now, all at one time."""
        each = self._one_by_one()

        def there(url: str) -> list[T]:
            try:
                return [work(each[url])]
            except Gone:
                return []

        if len(each) == 1:
            return [work(self.transport)]
        with ThreadPoolExecutor(len(each)) as threads:
            found = [one for answer in threads.map(there, each) for one in answer]
        return found or self._at_each(work)  # all of them went meanwhile

    def _one_by_one(self) -> dict[str, Transport]:
        """A transport to each replica there is now."""
        urls = self.transport.replicas()
        for url in self._each.keys() - set(urls):
            self._each.pop(url).close()
        if len(urls) == 1:
            return {urls[0]: self.transport}
        for url in urls:
            if url not in self._each:
                self._each[url] = self.transport.only(url)
        return dict(self._each)

    def _write(self, weights: Mapping[str, Tensor], policy_version: int) -> Path:
        """A folder of its own for every push: another rank may be writing too."""
        assert self.folder is not None
        self._forget_written()
        with full_disk_is_said(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._written = Path(tempfile.mkdtemp(prefix=f"policy-{policy_version}-", dir=self.folder))
            self._written.chmod(0o755)  # the service may be another user
            with (self._written / "model.safetensors").open("wb") as file:
                file.writelines(safetensors_stream(weights)[1]())
        return self._written

    def _forget_written(self) -> None:
        if self._written is not None:
            shutil.rmtree(self._written, ignore_errors=True)
        self._written = None


def _is_sharded(model: nn.Module) -> bool:
    return any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in model.parameters())


class _Once(Generic[T]):
    """What a function returns, called when that is first asked for; by several threads once."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make, self._lock, self._made = make, threading.Lock(), list[T]()

    def __call__(self) -> T:
        with self._lock:
            if not self._made:
                self._made.append(self._make())
            return self._made[0]


def service_info(get: Get, section: str) -> dict[str, Any]:
    """``/v1/info`` of a replica that is ready.

    Raises:
        UserError: it speaks another version of the protocol.
    """
    get(READY)
    info = json_object(get(INFO))
    if info["protocol"] != PROTOCOL_VERSION:
        raise UserError(
            f"{section}.url {info['name']!r} speaks protocol {info['protocol']}, this llmdistill {PROTOCOL_VERSION}. "
            f"Fix: run the same release of llmdistill on both sides."
        )
    return info
