"""Sampling in a service of its own: the trainer pushes the student's weights there and asks for completions.

Requests name the weights they expect. A service that was started again, with weights of its own, therefore refuses
them, gets the student's once more, and the step goes on. Every push has a word of its own, the same on all ranks:
before weights go out the service is asked whether it has those already, and of several ranks that find it without them
one pushes while the others wait there.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import httpx
import numpy as np
import torch
from torch import Tensor, nn

from llmdistill.errors import UserError
from llmdistill.files import full_disk_is_said
from llmdistill.models.weights import base_model, named_weights
from llmdistill.ranks import from_first_rank, is_first
from llmdistill.rollouts.probe import check_engine
from llmdistill.texts.rollout import Prompt, Rollout, Sampling, collate
from llmdistill.wire.bodies import Completions, pack_prompts, unpack_completions
from llmdistill.wire.protocol import (
    COMPLETIONS_TYPE,
    GENERATE,
    IDS_TYPE,
    INFO,
    OFFER,
    PROTOCOL_VERSION,
    READY,
    TENSORS_TYPE,
    WEIGHTS,
)
from llmdistill.wire.tensors import safetensors_stream
from llmdistill.wire.transport import Ask, Get, Refused, Request, Transport, json_object

PUSHES_PER_CALL = 3  # a service that forgets its weights more often shares them with another run
SAMPLE_BYTES, TOKEN_BYTES = 64, 8  # of an answer: for a sample, and for each of its tokens
ANSWER_BYTES = 1 << 16  # and for the rest of it
PROMPT_BYTES, FRAME_BYTES = 12, 64  # of a request, beside ids and settings: for a prompt, and for the rest of it
LOGPROB_ROUNDING = 1e-3  # an engine in 16 bits may report so much above 0

T = TypeVar("T")


class RemoteRollouts:
    """Samples from the student in a rollout service. Implements :class:`~llmdistill.rollouts.engine.RolloutEngine`.

    Args:
        url: of the service, or several with commas: every one gets the weights, prompts are shared out.
        eos_ids, pad_id: every id that ends a completion, and the padding id.
        push_every: optimizer steps between two pushes; what is sampled meanwhile says how old it is.
        folder: on a disk that the service can read: weights are written there, and only the path is sent.
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
        settings = {"token": token, "section": "rollouts", "timeout_s": timeout_s, "admit": self._admit, **options}
        self.transport = Transport(url, **settings)
        self._each = [self.transport]
        if len(self.transport.urls) > 1:
            self._each = [Transport(one, **settings) for one in self.transport.urls]
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
        self._model = model
        if self.policy_version is not None and 0 <= policy_version - self.policy_version < self.push_every:
            return
        trained_only = self.folder is None and not all(p.requires_grad for p in base_model(model).parameters())
        # a service that was started again has not got the weights that the trained ones belong to
        plan = from_first_rank(lambda: self._plan(trained_only))
        partial, digest = bool(plan["partial"]), str(plan["digest"])
        weights = self._weights(model, partial, keep=is_first())
        self._fingerprint = from_first_rank(lambda: self._push(lambda: weights, policy_version, partial, digest))
        # should the service lose them, all weights go out: under a word that is the same on every rank
        first = self.policy_version is None
        self.policy_version, self._digest = policy_version, f"{digest}-whole" if partial else digest
        if first:
            check_engine(self, model, float32=self._info["dtype"] == "float32")

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Rollout:
        """Completions with the eos that ended them, their log-probs in the distribution sampled from, and the version
        of the weights that the service says it used.

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
        for transport in {id(t): t for t in [self.transport, *self._each]}.values():
            transport.close()
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

    def _push_again(self, model: nn.Module) -> None:
        if any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in model.parameters()):
            raise UserError(
                f"rollouts {', '.join(self.transport.urls)} was started again and lost the student's weights; sharded "
                f"ones are pushed between steps only. Fix: --resume."
            )
        assert self.policy_version is not None
        weights, version = lambda: self._weights(model, False, keep=True), self.policy_version
        self._fingerprint = self._push(weights, version, False, self._digest)

    def _weights(self, model: nn.Module, partial: bool, keep: bool) -> dict[str, Tensor]:
        """What is sent, on the CPU and no wider than the service holds it."""
        dtype = getattr(torch, self._info["dtype"], torch.float32)
        tied = getattr(base_model(model).config, "tie_word_embeddings", False)
        kept: dict[str, Tensor] = {}
        for name, tensor in named_weights(model, trainable_only=partial):  # every rank: it gathers shards
            if keep and not (tied and name == "lm_head.weight"):
                narrower = tensor.is_floating_point() and dtype.itemsize < tensor.dtype.itemsize
                kept[name] = tensor.to("cpu", dtype if narrower else tensor.dtype)
        return kept

    def _push(self, weights: Callable[[], dict[str, Tensor]], policy_version: int, partial: bool, digest: str) -> str:
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
        self, weights: _Once[dict[str, Tensor]], policy_version: int, partial: bool, digest: str
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
        """``work`` with every replica, all at one time."""
        if len(self._each) == 1:
            return [work(self._each[0])]
        with ThreadPoolExecutor(len(self._each)) as threads:
            return list(threads.map(work, self._each))

    def _write(self, weights: dict[str, Tensor], policy_version: int) -> Path:
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


class _Once(Generic[T]):
    """What a function returns, called when that is first asked for; by several threads once."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make, self._lock, self._made = make, threading.Lock(), list[T]()

    def __call__(self) -> T:
        with self._lock:
            if not self._made:
                self._made.append(self._make())
            return self._made[0]


def sample(
    transport: Transport,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    limits: Mapping[str, int],
    vocab_size: int,
    pad_id: int,
    eos_ids: Sequence[int] | None = None,
    teacher: str | None = None,
    batch_tokens: int = 0,
) -> Rollout:
    """Completions of every prompt from a service, split into requests that stay within its limits.

    Args:
        batch_tokens: of this caller, prompts and room for completions that are generated at one time by each replica;
            0: as the service likes. Samples of a prompt that are more go in parts.

    Raises:
        UserError: ``max_new_tokens``, or a prompt with it, is above the service's limits.
    """
    n, where = sampling.samples_per_prompt, f"the service at {transport.urls[0]}"
    longest = max((len(p.ids) for p in prompts), default=0) + sampling.max_new_tokens
    for found, limit, what in (
        (sampling.max_new_tokens, limits["new_tokens"], "generates at most {} tokens"),
        (longest, limits["sequence_tokens"], f"the longest prompt makes that {longest} tokens, it holds {{}}"),
    ):
        if found > limit:
            raise UserError(
                f"rollouts.max_new_tokens is {sampling.max_new_tokens}; {where} {what.format(limit)}. "
                f"Fix: lower it or data.max_prompt_tokens, or raise the service's limit."
            )
    settings: dict[str, Any] = {
        "sampling": dataclasses.asdict(sampling),
        "eos_ids": None if eos_ids is None else list(eos_ids),
        "adapter": None,
        "teacher": teacher,
    }
    share = -(-len(prompts) * n // len(transport.urls))  # every replica gets some; one engine likes one large batch
    room = (limits["sequences"], limits["body_bytes"] - len(json.dumps(settings)) - FRAME_BYTES, share)
    requests, asked = [], list[tuple[int, int]]()  # and the prompt and number of every sample in the answers
    for part in _parts(sampling, batch_tokens // longest if batch_tokens else n):
        k = part.samples_per_prompt
        costs = [(k, 4 * len(p.ids) + PROMPT_BYTES, k, k * longest) for p in prompts]
        for rows in pack(costs, (*room, batch_tokens or sum(cost[-1] for cost in costs))):
            ids = [np.asarray(prompts[i].ids, np.int32) for i in rows]
            parse = _completions_of(len(rows), part, vocab_size)
            most = ANSWER_BYTES + len(rows) * k * (SAMPLE_BYTES + TOKEN_BYTES * sampling.max_new_tokens)
            body = pack_prompts({**settings, "sampling": dataclasses.asdict(part)}, ids, rows)
            requests.append(
                Request(GENERATE, parse, body=body, body_type=IDS_TYPE, answer_type=COMPLETIONS_TYPE, max_bytes=most)
            )
            asked += [(i, j) for i in rows for j in part.numbers]
    # with a bound every replica works at one request
    answers = transport.send_all(requests, len(transport.urls) if batch_tokens else None)
    drawn = [
        (ids.tolist(), logprobs.tolist(), finish)
        for given in answers
        for ids, logprobs, finish in zip(given.ids, given.logprobs, given.finish, strict=True)
    ]
    order = sorted(range(len(asked)), key=asked.__getitem__)
    return collate(
        [p.ids for p in prompts for _ in range(n)],
        [drawn[i][0] for i in order],
        pad_id=pad_id,
        behavior_logprobs=[drawn[i][1] for i in order],
        finish=[drawn[i][2] for i in order],
        domain=[p.domain for p in prompts for _ in range(n)],
        policy_version=min((given.settings["policy_version"] for given in answers), default=0),
    )


def _parts(sampling: Sampling, most: int) -> list[Sampling]:
    """The samples of every prompt, at most so many of each in one call."""
    n, each = sampling.samples_per_prompt, max(most, 1)
    return [
        replace(sampling, first_sample=sampling.first_sample + start, samples_per_prompt=min(each, n - start))
        for start in range(0, n, each)
    ]


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


def pack(costs: Sequence[Sequence[int]], room: Sequence[int]) -> list[list[int]]:
    """Indices in order, in groups whose summed costs stay within ``room``; one that is above it is alone."""
    groups: list[list[int]] = []
    used: list[int] = []
    for i, cost in enumerate(costs):
        summed = [u + c for u, c in zip(used, cost, strict=True)] if groups else []
        if groups and all(s <= r for s, r in zip(summed, room, strict=True)):
            groups[-1].append(i)
            used = summed
        else:
            groups.append([i])
            used = list(cost)
    return groups


def _completions_of(count: int, sampling: Sampling, vocab_size: int) -> Callable[[httpx.Response], Completions]:
    """Reads the samples of ``count`` prompts and makes sure that nothing is missing, and nothing is there that no
    engine draws: an id outside the vocabulary would be looked up in the student's embeddings."""

    def parse(response: httpx.Response) -> Completions:
        given = unpack_completions(response.content)
        if len(given.ids) != count * sampling.samples_per_prompt:
            raise ValueError(f"{len(given.ids)} samples of {count} x {sampling.samples_per_prompt}")
        for ids, logprobs in zip(given.ids, given.logprobs, strict=True):
            if len(ids) > sampling.max_new_tokens:
                raise ValueError(f"a completion of {len(ids)} tokens; at most {sampling.max_new_tokens} were asked for")
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
                raise ValueError(f"a completion has ids {ids.min()} to {ids.max()}; the vocabulary has {vocab_size}")
            if not bool((logprobs <= LOGPROB_ROUNDING).all()):  # a NaN is not
                raise ValueError("a log-prob of a completion is positive or not a number")
        if type(given.settings.get("policy_version")) is not int:
            raise ValueError("an answer without the version of the policy")
        return given

    return parse
