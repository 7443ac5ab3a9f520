"""Bodies of requests, checked against what the engine can do and the service takes on before any work starts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError
from starlette.requests import Request

from llmdistill.recipe.config import TEMPLATE_ARGUMENTS
from llmdistill.service.engine import Engine, GenerateJob, ScoreJob
from llmdistill.service.limits import Limits
from llmdistill.service.problems import Problem, first_line, invalid
from llmdistill.texts import Sampling


class _Fast(FailFast):
    """pydantic's mark for stopping at the first wrong entry; hashable, which optional fields ask of it."""

    def __hash__(self) -> int:
        return 1


ONE_MISTAKE = _Fast()  # a list of a million wrong entries is one mistake
Id = Annotated[int, Field(strict=True)]
Ids = Annotated[list[Id], ONE_MISTAKE]
COLDEST, HOTTEST = 0.01, 2.0  # temperatures that every engine samples at as they are
LARGEST = 2**53  # whole numbers that survive as floats
CHARACTERS_A_TOKEN = 64  # more than any tokenizer makes of text on average
Body = TypeVar("Body", bound=BaseModel)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ScoreBody(_Body):
    sequences: Annotated[list[Ids], ONE_MISTAKE]
    positions: Annotated[list[tuple[Id, Id]], ONE_MISTAKE]
    top_k: Annotated[int, Field(strict=True, ge=0)] = 0
    chosen: Annotated[list[Annotated[list[Ids], ONE_MISTAKE]], ONE_MISTAKE] | None = None
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
    prompts: Annotated[list[Ids], ONE_MISTAKE]
    rows: Annotated[list[Annotated[int, Field(strict=True, ge=0)]], ONE_MISTAKE] | None = None
    sampling: SamplingBody
    eos_ids: Ids | None = None
    adapter: str | None = None
    teacher: str | None = None


class TextItem(_Body):
    prompt: str | list[dict[str, Any]]
    completion: str
    tools: list[dict[str, Any]] | None = None


class TextBody(_Body):
    items: Annotated[list[TextItem], ONE_MISTAKE]
    chat_template_kwargs: dict[str, Any] | None = None
    top_k: Annotated[int, Field(strict=True, ge=0)] = 0
    dtype: Literal["float16", "float32"] = "float16"
    teacher: str | None = None


class WeightsBody(_Body):
    path: str
    policy_version: Annotated[int, Field(strict=True, ge=0, lt=LARGEST)]


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


class Bodies:
    """Bodies that are being read: together they stay within a bound."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.bytes = limits, 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The body, held as long as the context lasts.

        Raises:
            Problem: 413 as soon as it is known to be too long, 408 when it does not arrive, 429 when too much is held.
        """
        limit = self.limits.body_bytes
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > limit:
            raise too_large(limit)
        parts, size = list[bytes](), 0
        try:
            try:
                async with asyncio.timeout(self.limits.body_s):
                    async for chunk in request.stream():
                        size, self.bytes = size + len(chunk), self.bytes + len(chunk)
                        if size > limit:
                            raise too_large(limit)
                        if self.bytes > max(self.limits.bodies_bytes, limit):
                            raise Problem(429, "busy", "too many large bodies at one time", retry_after_s=1)
                        parts.append(chunk)
            except TimeoutError:
                raise Problem(408, "limit", f"the body did not arrive in {self.limits.body_s:g} s") from None
            data = b"".join(parts)
            parts.clear()
            yield data
        finally:
            self.bytes -= size


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
    width = max((len(row) for rows in body.chosen or () for row in rows), default=0)
    wide, most = body.top_k + width, min(limits.top_k, engine.max_top_k)
    if wide > most:
        asked = f"is {body.top_k}" if body.chosen is None else f"and the chosen ids make {wide}"
        raise invalid("top_k", f"{asked}; at most {most}", most)
    chosen = _chosen(body, engine, width)
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
    if sampling.temperature and not COLDEST <= sampling.temperature <= HOTTEST:
        raise invalid(
            "sampling.temperature",
            f"is {sampling.temperature}; it must be 0 (greedy) or {COLDEST} to {HOTTEST}",
            HOTTEST,
        )
    if sampling.top_k > engine.info.vocab_size:
        most = engine.info.vocab_size
        raise invalid("sampling.top_k", f"is {sampling.top_k}; at most {most}, and 0 for all", most)
    if sampling.max_new_tokens > limits.new_tokens:
        raise invalid(
            "sampling.max_new_tokens", f"is {sampling.max_new_tokens}; at most {limits.new_tokens}", limits.new_tokens
        )
    _ids("prompts", body.prompts, engine, limits, extra=sampling.max_new_tokens)
    rows = body.rows if body.rows is not None else list(range(len(body.prompts)))
    if len(rows) != len(body.prompts):
        raise invalid("rows", f"has {len(rows)} entries for {len(body.prompts)} prompts")
    known_adapter(body.adapter, engine)
    vocab = engine.info.vocab_size
    for i, token in enumerate(body.eos_ids or ()):
        if not 0 <= token < vocab:
            raise invalid(f"eos_ids[{i}]", f"is {token}; token ids go from 0 to {vocab - 1}", vocab - 1)
    eos = tuple(body.eos_ids) if body.eos_ids is not None else engine.info.eos_ids
    return GenerateJob(body.prompts, rows, Sampling(**sampling.model_dump()), eos, body.adapter)


def known_adapter(name: str | None, engine: Engine) -> None:
    """Raises Problem 404 for an adapter that is not loaded."""
    if name is not None and name not in engine.adapters:
        known = ", ".join(engine.adapters) or "none"
        raise Problem(404, "adapter", f"adapter {name[:64]!r} is not loaded; loaded: {known}", field="adapter")


def allowed_folder(path: str, roots: list[Path]) -> Path:
    """``path`` with its links resolved.

    Raises:
        Problem: 400, it is no folder within ``roots``.
    """
    try:
        folder = Path(path).resolve()
        files = [folder, *(file.resolve() for file in folder.glob("*"))]  # links in it may lead elsewhere
        if not folder.is_dir():
            raise invalid("path", f"{path[:200]!r} is no folder here")
    except (ValueError, OSError, RuntimeError) as error:
        raise invalid("path", f"cannot be a folder: {first_line(error)[:200]}") from None
    allowed = [root.resolve() for root in roots]
    if not all(any(file.is_relative_to(root) for root in allowed) for file in files):
        shown = ", ".join(map(str, roots)) or "none (start the service with --allow-weights FOLDER)"
        raise invalid("path", f"{path[:200]!r} lies outside the allowed folders, or a file in it does: {shown}")
    return folder


def check_texts(body: TextBody, limits: Limits) -> None:
    """Refuses what cannot fit before it is tokenised, and names that a template is given otherwise.

    Raises:
        Problem: 400.
    """
    items, kwargs = body.items, body.chat_template_kwargs or {}
    if ours := [name for name in kwargs if name in TEMPLATE_ARGUMENTS]:
        raise invalid("chat_template_kwargs", f"has {ours[0]!r}; it takes names that only the template reads")
    check_text("chat_template_kwargs", str(kwargs), limits)
    _count("items", len(items), limits)
    for i, item in enumerate(items):
        check_text(f"items[{i}].prompt", item.prompt if isinstance(item.prompt, str) else str(item.prompt), limits)
        check_text(f"items[{i}].completion", item.completion, limits)
        check_text(f"items[{i}].tools", str(item.tools or ""), limits)


def check_text(field: str, text: str, limits: Limits) -> None:
    """Raises Problem 400 for a text that is longer than any that fits."""
    most = CHARACTERS_A_TOKEN * limits.sequence_tokens
    if len(text) > most:
        raise invalid(field, f"has {len(text)} characters; {most} are more than the context holds", most)


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


def _chosen(body: ScoreBody, engine: Engine, width: int) -> list[torch.Tensor | None]:
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
    vocab, made = engine.info.vocab_size, list[torch.Tensor | None]()
    for i, (rows, (start, stop)) in enumerate(zip(body.chosen, body.positions, strict=True)):
        if len(rows) != stop - start:
            raise invalid(f"chosen[{i}]", f"has {len(rows)} rows for {stop - start} positions")
        for j, row in enumerate(rows):
            if any(not -1 <= token < vocab for token in row):
                raise invalid(f"chosen[{i}][{j}]", f"holds ids outside 0 to {vocab - 1} (-1 pads)", vocab - 1)
        table = torch.full((stop - start, width), -1, dtype=torch.int32)
        for j, row in enumerate(rows):
            table[j, : len(row)] = torch.tensor(row, dtype=torch.int32)
        made.append(table)
    return made if width else [None] * len(made)
