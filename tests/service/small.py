"""The protocol over a :class:`LocalTeacher` in a few lines: what clients are tested against."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors.torch import load

from llmdistill.models.generation import generate
from llmdistill.teachers.local import LocalTeacher
from llmdistill.texts import Prompt, Rollout, Sampling, collate
from llmdistill.wire import protocol
from llmdistill.wire.blocks import encode
from llmdistill.wire.bodies import pack_completions, unpack_prompts, unpack_sequences

LIMITS = {
    "top_k": 264,
    "sequence_tokens": 256,
    "sequences": 64,
    "positions": 4096,
    "new_tokens": 64,
    "body_bytes": 1 << 20,
    "json_bytes": 1 << 20,
    "in_flight": 64,
}

_one_at_a_time = threading.Lock()  # services of one test may share a model, which is not made for several threads


@dataclass
class Seen:
    """One request as it came."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes = field(repr=False)
    fault: str | None = None

    @property
    def id(self) -> str | None:
        return self.headers.get("x-request-id")


@dataclass
class Answer:
    status: int
    body: bytes
    kind: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)


class Small:
    """A service of one thread. Attributes may be changed while it runs.

    Args:
        limits: overriding :data:`LIMITS`.
        ready: False: ``/ready`` says 503 until it is set.
        chosen_ids, weights: what ``/v1/info`` says it can.
    """

    def __init__(
        self,
        teacher: LocalTeacher,
        *,
        limits: Mapping[str, int] | None = None,
        token: str | None = None,
        ready: bool = True,
        chosen_ids: bool = True,
        weights: bool = True,
    ) -> None:
        self.teacher, self.token = teacher, token
        self.limits, self.ready = {**LIMITS, **(limits or {})}, ready
        self.chosen_ids, self.weights = chosen_ids, weights
        self.policy_version, self.digest = 0, ""
        self.partial_weights = True

    def restart(self, teacher: LocalTeacher) -> None:
        """With other weights, and no memory of what was pushed."""
        self.teacher, self.policy_version, self.digest = teacher, 0, ""

    def answer(self, seen: Seen) -> Answer:
        with _one_at_a_time:
            return self._answer(seen)

    def _answer(self, seen: Seen) -> Answer:
        if self.token and seen.path != protocol.READY and seen.headers.get("authorization") != f"Bearer {self.token}":
            return error(401, "the token is wrong")
        if seen.path == protocol.READY:
            return Answer(200, b"{}") if self.ready else error(503, "starting")
        if seen.path == protocol.INFO:
            return _json(self._info())
        kind = seen.headers.get("content-type")
        body = json.loads(seen.body) if kind == protocol.JSON_TYPE else {}
        if kind == protocol.IDS_TYPE:
            body = as_json(seen)
        expected = body.get("teacher")
        if expected not in (None, self.teacher.info().fingerprint):
            return error(409, f"teacher is {self.teacher.info().fingerprint}", "teacher")
        if seen.path == protocol.SCORE:
            return self._score(body)
        if seen.path == protocol.SCORE_TEXT:
            return self._score_text(body)
        if seen.path == protocol.GENERATE:
            return self._generate(body)
        if seen.path == protocol.WEIGHTS:
            return self._load(seen, body)
        if seen.path == protocol.OFFER:
            told = {"needed": False, "teacher": self.teacher.info().fingerprint, "policy_version": self.policy_version}
            return _json(told if body["digest"] == self.digest else {"needed": True})
        return error(404, seen.path)

    def _info(self) -> dict[str, Any]:
        told = asdict(self.teacher.info())
        return {
            **{k: told[k] for k in ("name", "tokenizer", "vocab_size", "eos_ids", "context_length", "template")},
            "teacher": told["fingerprint"],
            "protocol": protocol.PROTOCOL_VERSION,
            "engine": "hf",
            "dtype": "float32",
            "policy_version": self.policy_version,
            "chosen_ids": self.chosen_ids,
            "weights": self.weights,
            "partial_weights": self.partial_weights,
            "adapters": [],
            "transfer": None,
            "limits": self.limits,
        }

    def _score(self, body: dict[str, Any]) -> Answer:
        spans, sequences = body["positions"], body["sequences"]
        if len(sequences) > self.limits["sequences"] or sum(b - a for a, b in spans) > self.limits["positions"]:
            return error(400, "too many", "positions")
        rollout = _spans(sequences, spans)
        chosen = None
        if body["chosen"] is not None:
            rows = [row for per_sequence in body["chosen"] for row in per_sequence]
            width = max(map(len, rows))
            chosen = torch.tensor([row + [-1] * (width - len(row)) for row in rows])
        return self._scored(rollout, body, chosen)

    def _score_text(self, body: dict[str, Any]) -> Answer:
        tokenizer, items = self.teacher.tokenizer, []
        for item in body["items"]:
            prompt = item["prompt"]
            if not isinstance(prompt, str):
                prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            coded = tokenizer(item["completion"], add_special_tokens=False, return_offsets_mapping=True)
            items.append(
                {
                    "prompt_ids": tokenizer(prompt)["input_ids"],
                    "ids": coded["input_ids"],
                    "offsets": coded["offset_mapping"],
                }
            )
        rollout = collate([i["prompt_ids"] for i in items], [i["ids"] for i in items], pad_id=0)
        return self._scored(rollout, body, items=items)

    def _scored(self, rollout: Rollout, body: dict[str, Any], chosen: Any = None, **more: Any) -> Answer:
        info, blocks = self.teacher.info(), self.teacher.score(rollout, body["top_k"], chosen)
        head = {"protocol": protocol.PROTOCOL_VERSION, "teacher": info.fingerprint, "tokenizer": info.tokenizer}
        head |= {"policy_version": self.policy_version, "positions": rollout.num_rows, **more}
        frames = [json.dumps(head).encode(), *(encode(block, body["dtype"]) for block in blocks)]
        return Answer(200, protocol.pack_frames(frames), protocol.BLOCKS_TYPE)

    def _generate(self, body: dict[str, Any]) -> Answer:
        sampling = Sampling(**body["sampling"])
        if len(body["prompts"]) * sampling.samples_per_prompt > self.limits["sequences"]:
            return error(400, "too many", "prompts")
        drawn = generate(
            self.teacher.model,
            [Prompt(ids, "") for ids in body["prompts"]],
            sampling,
            eos_ids=body["eos_ids"] if body["eos_ids"] is not None else self.teacher.info().eos_ids,
            pad_id=0,
            rows=body["rows"],
            tokenizer=self.teacher.tokenizer,
        )
        assert drawn.behavior_logprobs is not None
        columns = zip(drawn.input_ids, drawn.behavior_logprobs, drawn.completion_mask, drawn.finish, strict=True)
        samples = [{"ids": i[m].tolist(), "logprobs": lp[m].tolist(), "finish": f} for i, lp, m, f in columns]
        told = {"teacher": self.teacher.info().fingerprint, "policy_version": self.policy_version}
        lists = ([sample[name] for sample in samples] for name in ("ids", "logprobs", "finish"))
        return Answer(200, pack_completions(told, *lists), protocol.COMPLETIONS_TYPE)

    def _load(self, seen: Seen, body: dict[str, Any]) -> Answer:
        if not self.partial_weights and seen.query.get("partial") == "true":
            return error(400, "complete sets only", "partial")
        if "path" in body:
            with open(f"{body['path']}/model.safetensors", "rb") as file:
                tensors, version, partial = load(file.read()), body["policy_version"], False
        else:
            tensors, version = load(seen.body), int(seen.query["policy_version"])
            partial = seen.query.get("partial") == "true"
        problems = self.teacher.model.load_state_dict(tensors, strict=False)
        missing = set(problems.missing_keys) - {"lm_head.weight"}
        if problems.unexpected_keys or (missing and not partial):
            return error(400, f"weights: {problems}", "weights")
        self.teacher.forget_info()
        self.policy_version, self.digest = version, seen.query.get("digest") or body.get("digest", "")
        return _json({"teacher": self.teacher.info().fingerprint, "policy_version": version})


def as_json(seen: Seen) -> dict[str, Any]:
    """A request in bytes as the JSON one that asks the same."""
    if seen.path == protocol.SCORE:
        asked = unpack_sequences(seen.body, max_cells=1 << 24)
        chosen = None if asked.chosen is None else [table.tolist() for table in asked.chosen]
        ids, spans = [one.tolist() for one in asked.ids], asked.positions.tolist()
        return {**asked.settings, "sequences": ids, "positions": spans, "chosen": chosen}
    prompts = unpack_prompts(seen.body)
    return {**prompts.settings, "prompts": [one.tolist() for one in prompts.ids], "rows": prompts.rows.tolist()}


def _spans(sequences: list[list[int]], spans: list[list[int]]) -> Rollout:
    """The sequences as a rollout in which the spans count."""
    whole = collate(sequences, [[] for _ in sequences], pad_id=0)
    for mask, (start, stop) in zip(whole.completion_mask, spans, strict=True):
        mask[start:stop] = True
    return whole


def _json(content: dict[str, Any]) -> Answer:
    return Answer(200, json.dumps(content).encode())


def error(status: int, message: str, name: str | None = None) -> Answer:
    told = {"error": {"type": "problem", "field": name, "message": message, "limit": None}}
    return Answer(status, json.dumps(told).encode())
