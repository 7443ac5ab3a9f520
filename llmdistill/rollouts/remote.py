"""Sampling in a service of its own: the trainer pushes the student's weights there and asks for completions.

Requests name the weights they expect. A service that was started again, with weights of its own, therefore refuses
them, gets the student's once more, and the step goes on.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor, nn

from llmdistill.errors import UserError
from llmdistill.models.weights import base_model, named_weights
from llmdistill.texts.rollout import Prompt, Rollout, Sampling, collate
from llmdistill.wire.protocol import GENERATE, INFO, PROTOCOL_VERSION, READY, TENSORS_TYPE, WEIGHTS
from llmdistill.wire.transport import Get, Refused, Request, Transport, json_object

CHUNK_BYTES = 1 << 24  # of a weight, as it is handed to the socket
PUSHES_PER_CALL = 3  # a service that forgets its weights more often shares them with another run
_SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class RemoteRollouts:
    """Samples from the student in a rollout service. Implements :class:`~llmdistill.rollouts.engine.RolloutEngine`.

    Args:
        url: of the service, or several with commas: every one gets the weights, prompts are shared out.
        eos_ids, pad_id: every id that ends a completion, and the padding id.
        push_every: optimizer steps between two pushes; what is sampled meanwhile says how old it is.
        folder: on a disk that the service can read: weights are written there, and only the path is sent.
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
        **options: Any,
    ) -> None:
        self.eos_ids, self.pad_id, self.push_every = tuple(eos_ids), pad_id, push_every
        self.folder = Path(folder).resolve() if folder is not None else None
        self.policy_version: int | None = None  # of the weights in the service
        self._fingerprint: str | None = None
        self._model: nn.Module | None = None
        self._info: dict[str, Any] = {}
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
        """Pushes the weights of ``model`` if ``push_every`` steps have gone by; after the first time only the trained.

        Every rank of a launch calls it; rank 0 sends, and all go on when the service has the weights.

        Raises:
            UserError: the service does not take them.
        """
        self._model = model
        if self.policy_version is not None and 0 <= policy_version - self.policy_version < self.push_every:
            return
        trained_only = self.folder is None and not all(p.requires_grad for p in base_model(model).parameters())
        # a service that was started again has not got the weights that the trained ones belong to
        partial = _from_rank_0(trained_only and _rank() == 0 and self._has_ours())
        weights = self._weights(model, partial, keep=_rank() == 0)
        told: tuple[str, str | None] = ("", None)
        if _rank() == 0:
            try:
                told = "", self._push(weights, policy_version, partial)
            except UserError as error:  # on every rank, or the others would wait for this one
                told = str(error), None
        problem, fingerprint = _from_rank_0(told)
        if problem:
            raise UserError(problem)
        self.policy_version, self._fingerprint = policy_version, fingerprint

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
                    pad_id=self.pad_id,
                    eos_ids=self.eos_ids,
                    teacher=self._fingerprint,
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
        self._info = info

    def _has_ours(self) -> bool:
        if self._fingerprint is None:
            return False
        found = [t.send(Request(INFO, json_object, method="GET"))["teacher"] for t in self._each]
        return all(one == self._fingerprint for one in found)

    def _push_again(self, model: nn.Module) -> None:
        if any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in model.parameters()):
            raise UserError(
                f"rollouts {', '.join(self.transport.urls)} was started again and lost the student's weights; sharded "
                f"ones are pushed between steps only. Fix: --resume."
            )
        assert self.policy_version is not None
        self._fingerprint = self._push(self._weights(model, False, keep=True), self.policy_version, False)

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

    def _push(self, weights: dict[str, Tensor], policy_version: int, partial: bool) -> str:
        """The fingerprint that the service gives the weights."""
        if self.folder is None:
            length, stream = safetensors_stream(weights)
            params = {"policy_version": str(policy_version)} | ({"partial": "true"} if partial else {})
            request = Request(WEIGHTS, json_object, body=stream, length=length, body_type=TENSORS_TYPE, params=params)
        else:
            self._write(weights, policy_version)
            told = {"path": str(self._written), "policy_version": policy_version}
            request = Request(WEIGHTS, json_object, body=json.dumps(told).encode())
        fingerprints = {str(t.send(request)["teacher"]) for t in self._each}
        if len(fingerprints) > 1:
            raise UserError(
                f"rollouts.url names services that differ after the same weights were pushed: {sorted(fingerprints)}. "
                f"Fix: start all of them with one checkpoint."
            )
        return fingerprints.pop()

    def _write(self, weights: dict[str, Tensor], policy_version: int) -> None:
        """A folder of its own for every push: another rank may be writing too."""
        assert self.folder is not None
        self._forget_written()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._written = Path(tempfile.mkdtemp(prefix=f"policy-{policy_version}-", dir=self.folder))
        self._written.chmod(0o755)  # the service may be another user
        with (self._written / "model.safetensors").open("wb") as file:
            file.writelines(safetensors_stream(weights)[1]())

    def _forget_written(self) -> None:
        if self._written is not None:
            shutil.rmtree(self._written, ignore_errors=True)
        self._written = None


def sample(
    transport: Transport,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    limits: Mapping[str, int],
    pad_id: int,
    eos_ids: Sequence[int] | None = None,
    teacher: str | None = None,
) -> Rollout:
    """Completions of every prompt from a service, split into requests that stay within its limits.

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
    rest: dict[str, Any] = {"eos_ids": None if eos_ids is None else list(eos_ids), "adapter": None, "teacher": teacher}
    drawn = {name: getattr(sampling, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k", "seed")}
    rest["sampling"] = drawn | {"samples_per_prompt": n}
    share = -(-len(prompts) * n // len(transport.urls))  # every replica gets some; one engine likes one large batch
    costs = [(n, len(str(p.ids)) + 24, n) for p in prompts]  # 24: the row and the commas
    room = (limits["sequences"], limits["body_bytes"] - len(json.dumps(rest)) - 256, share)
    requests = []
    for rows in pack(costs, room):
        body = {"prompts": [list(prompts[i].ids) for i in rows], "rows": rows, **rest}
        requests.append(Request(GENERATE, _completions_of(len(rows), sampling), body=json.dumps(body).encode()))
    answers = transport.send_all(requests)
    ordered = [s for _, given in answers for samples in given for s in samples]  # pack() keeps the order
    return collate(
        [p.ids for p in prompts for _ in range(n)],
        [s["ids"] for s in ordered],
        pad_id=pad_id,
        behavior_logprobs=[s["logprobs"] for s in ordered],
        finish=[s["finish"] for s in ordered],
        domain=[p.domain for p in prompts for _ in range(n)],
        policy_version=min((version for version, _ in answers), default=0),
    )


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


def safetensors_stream(tensors: Mapping[str, Tensor]) -> tuple[int, Callable[[], Iterator[bytes]]]:
    """Size and chunks of a safetensors file of ``tensors``, which is never in memory as a whole."""
    entries, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": _SAFETENSORS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)

    def chunks() -> Iterator[bytes]:
        yield len(header).to_bytes(8, "little") + header
        for tensor in tensors.values():
            raw = tensor.contiguous().reshape(-1).view(torch.uint8)
            for start in range(0, len(raw), CHUNK_BYTES):
                yield raw[start : start + CHUNK_BYTES].numpy().tobytes()

    return 8 + len(header) + end, chunks


def _completions_of(
    count: int, sampling: Sampling
) -> Callable[[httpx.Response], tuple[int, list[list[dict[str, Any]]]]]:
    """Reads (policy version, samples of each prompt) and makes sure that nothing is missing."""

    def parse(response: httpx.Response) -> tuple[int, list[list[dict[str, Any]]]]:
        body = json_object(response)
        given = body["completions"]
        if len(given) != count:
            raise ValueError(f"completions of {len(given)} prompts instead of {count}")
        for samples in given:
            if len(samples) != sampling.samples_per_prompt:
                raise ValueError(f"{len(samples)} samples of a prompt instead of {sampling.samples_per_prompt}")
            for one in samples:
                size, told = len(one["ids"]), len(one["logprobs"])
                if size != told or size > sampling.max_new_tokens or one["finish"] not in ("stop", "length"):
                    raise ValueError(f"a completion of {size} ids and {told} log-probs, {one['finish']!r}")
        return int(body["policy_version"]), given

    return parse


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _from_rank_0(value: Any) -> Any:
    """The first rank's value, on every rank; waits for it."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
