"""Bodies of requests, checked against what the engine can do and the service takes on before any work starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request

from llmdistill.rollouts import Sampling
from llmdistill.service.engine import Engine, GenerateJob, ScoreJob
from llmdistill.service.limits import Limits
from llmdistill.service.problems import Problem, invalid

Id = Annotated[int, Field(strict=True)]
Body = TypeVar("Body", bound=BaseModel)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ScoreBody(_Body):
    sequences: list[list[Id]]
    positions: list[tuple[Id, Id]]
    top_k: Annotated[int, Field(strict=True, ge=0)] = 0
    chosen: list[list[list[Id]]] | None = None
    temperature: float = 1.0
    dtype: Literal["float16", "float32"] = "float16"
    teacher: str | None = None


class SamplingBody(_Body):
    max_new_tokens: Annotated[int, Field(strict=True, ge=1)]
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(strict=True, ge=0)] = 0
    samples_per_prompt: Annotated[int, Field(strict=True, ge=1)] = 1
    seed: Annotated[int, Field(strict=True)] = 0


class GenerateBody(_Body):
    prompts: list[list[Id]]
    rows: list[Annotated[int, Field(strict=True, ge=0)]] | None = None
    sampling: SamplingBody
    eos_ids: list[Id] | None = None
    adapter: str | None = None
    teacher: str | None = None


class TextItem(_Body):
    prompt: str | list[dict[str, Any]]
    completion: str


class TextBody(_Body):
    items: list[TextItem]
    top_k: Annotated[int, Field(strict=True, ge=0)] = 0
    dtype: Literal["float16", "float32"] = "float16"
    teacher: str | None = None


class WeightsBody(_Body):
    path: str
    policy_version: Annotated[int, Field(strict=True, ge=0)]


class AdapterBody(_Body):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    path: str


def read(kind: type[Body], data: bytes) -> Body:
    """The body as ``kind``.

    Raises:
        Problem: 400, with the field that is wrong.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"]).lstrip(".") or "body"
        known = f"; known fields: {', '.join(kind.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise invalid(field, f"{first['msg'][0].lower()}{first['msg'][1:]}{known}") from None


async def read_body(request: Request, limit: int) -> bytes:
    """The body, refused as soon as it is known to be too long."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large(limit)
    parts, size = list[bytes](), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise too_large(limit)
        parts.append(chunk)
    return b"".join(parts)


def too_large(limit: int) -> Problem:
    return Problem(413, "limit", f"the body is larger than {limit} bytes", field="body", limit=limit)


def score_jobs(body: ScoreBody, engine: Engine, limits: Limits) -> list[ScoreJob]:
    """One job per sequence.

    Raises:
        Problem: 400.
    """
    if body.temperature != 1.0:
        raise invalid(
            "temperature", f"is {body.temperature}; scores are log-softmax at temperature 1, no engine gives others"
        )
    if len(body.positions) != len(body.sequences):
        raise invalid("positions", f"has {len(body.positions)} entries for {len(body.sequences)} sequences")
    _count("sequences", len(body.sequences), limits)
    for i, ((start, stop), ids) in enumerate(zip(body.positions, body.sequences, strict=True)):
        if not (1 <= start <= stop <= len(ids) or (start == stop == 0)):
            raise invalid(
                f"positions[{i}]",
                f"is [{start}, {stop}]; needed: 1 <= start <= stop <= {len(ids)} (its length)",
            )
    _ids("sequences", body.sequences, engine, limits)
    positions = sum(stop - start for start, stop in body.positions)
    if positions > limits.positions:
        raise invalid("positions", f"are {positions} together; at most {limits.positions} a request", limits.positions)
    chosen = _chosen(body, engine)
    wide = body.top_k + max((c.shape[1] for c in chosen if c is not None), default=0)
    most = min(limits.top_k, engine.max_top_k)
    if wide > most:
        asked = f"is {body.top_k}" if body.chosen is None else f"and the chosen ids make {wide}"
        raise invalid("top_k", f"{asked}; at most {most}", most)
    return [
        ScoreJob(ids[:stop], start, stop, body.top_k, mine)
        for ids, (start, stop), mine in zip(body.sequences, body.positions, chosen, strict=True)
    ]


def generate_job(body: GenerateBody, engine: Engine, limits: Limits) -> GenerateJob:
    """The request as the engine takes it.

    Raises:
        Problem: 400; 404 for an unknown adapter.
    """
    sampling = body.sampling
    _count("prompts", len(body.prompts) * sampling.samples_per_prompt, limits)
    if sampling.max_new_tokens > limits.new_tokens:
        raise invalid(
            "sampling.max_new_tokens", f"is {sampling.max_new_tokens}; at most {limits.new_tokens}", limits.new_tokens
        )
    _ids("prompts", body.prompts, engine, limits, extra=sampling.max_new_tokens)
    rows = body.rows if body.rows is not None else list(range(len(body.prompts)))
    if len(rows) != len(body.prompts):
        raise invalid("rows", f"has {len(rows)} entries for {len(body.prompts)} prompts")
    if body.adapter is not None and body.adapter not in engine.adapters:
        known = ", ".join(engine.adapters) or "none"
        raise Problem(404, "adapter", f"adapter {body.adapter!r} is not loaded; loaded: {known}", field="adapter")
    vocab = engine.info.vocab_size
    for i, token in enumerate(body.eos_ids or ()):
        if not 0 <= token < vocab:
            raise invalid(f"eos_ids[{i}]", f"is {token}; token ids go from 0 to {vocab - 1}", vocab - 1)
    eos = tuple(body.eos_ids) if body.eos_ids is not None else engine.info.eos_ids
    return GenerateJob(body.prompts, rows, Sampling(**sampling.model_dump()), eos, body.adapter)


def allowed_folder(path: str, roots: list[Path]) -> Path:
    """``path`` with its links resolved.

    Raises:
        Problem: 400, it is no folder within ``roots``.
    """
    folder = Path(path).resolve()
    if not any(folder.is_relative_to(root.resolve()) for root in roots):
        shown = ", ".join(map(str, roots)) or "none (start the service with --allow-weights FOLDER)"
        raise invalid("path", f"{path!r} lies outside the allowed folders: {shown}")
    if not folder.is_dir():
        raise invalid("path", f"{path!r} is no folder")
    return folder


def _count(field: str, n: int, limits: Limits) -> None:
    if n == 0:
        raise invalid(field, "is empty; there must be at least one")
    if n > limits.sequences:
        raise invalid(field, f"makes {n} sequences; at most {limits.sequences} a request", limits.sequences)


def _ids(field: str, sequences: list[list[int]], engine: Engine, limits: Limits, extra: int = 0) -> None:
    """Every sequence is there, fits the context, and holds known ids."""
    vocab, most = engine.info.vocab_size, min(limits.sequence_tokens, engine.max_model_len)
    for i, ids in enumerate(sequences):
        if not ids:
            raise invalid(f"{field}[{i}]", "is empty; there must be at least one token")
        if len(ids) + extra > most:
            more = f" and {extra} new ones" if extra else ""
            raise invalid(f"{field}[{i}]", f"has {len(ids)} tokens{more}; the context holds {most}", most)
        try:
            array = np.asarray(ids, dtype=np.int64)
        except OverflowError:
            array = np.asarray([-1 if abs(x) > 1 << 62 else x for x in ids])
        wrong = np.flatnonzero((array < 0) | (array >= vocab))
        if len(wrong):
            j = int(wrong[0])
            raise invalid(f"{field}[{i}][{j}]", f"is {ids[j]}; token ids go from 0 to {vocab - 1}", vocab - 1)


def _chosen(body: ScoreBody, engine: Engine) -> list[torch.Tensor | None]:
    """The caller's ids as [n, C] tensors, one width for the whole request."""
    if body.chosen is None:
        return [None] * len(body.sequences)
    if not engine.chosen_ids:
        raise Problem(
            400,
            "unsupported",
            "this engine cannot score ids a caller chooses; serve with --engine hf",
            field="chosen",
        )
    if len(body.chosen) != len(body.sequences):
        raise invalid("chosen", f"has {len(body.chosen)} entries for {len(body.sequences)} sequences")
    width = max((len(row) for rows in body.chosen for row in rows), default=0)
    vocab, made = engine.info.vocab_size, list[torch.Tensor | None]()
    for i, (rows, (start, stop)) in enumerate(zip(body.chosen, body.positions, strict=True)):
        if len(rows) != stop - start:
            raise invalid(f"chosen[{i}]", f"has {len(rows)} rows for {stop - start} positions")
        for j, row in enumerate(rows):
            if any(not -1 <= token < vocab for token in row):
                raise invalid(f"chosen[{i}][{j}]", f"holds ids outside 0 to {vocab - 1} (-1 pads)", vocab - 1)
        padded = [row + [-1] * (width - len(row)) for row in rows]
        made.append(torch.tensor(padded, dtype=torch.int64).reshape(stop - start, width))
    return made
