"""Bodies of requests, checked against what the engine can do and the service takes on before any work starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from llmdistill.recipe.data_config import TEMPLATE_ARGUMENTS
from llmdistill.service.engine import Engine, GenerateJob, ScoreJob
from llmdistill.service.limits import Limits
from llmdistill.service.problems import Problem, first_line, invalid
from llmdistill.texts import Sampling
from llmdistill.wire.bodies import BodyError, Prompts, Sequences, unpack_prompts, unpack_sequences
from llmdistill.wire.protocol import IDS_TYPE


class _Fast(FailFast):
    """pydantic's mark for stopping at the first wrong entry; hashable, which optional fields ask of it."""

    def __hash__(self) -> int:
        return 1


ONE_MISTAKE = _Fast()  # a list of a million wrong entries is one mistake
Id = Annotated[int, Field(strict=True)]
Ids = Annotated[list[Id], ONE_MISTAKE]
COLDEST, HOTTEST = 0.01, 2.0  # temperatures that every engine samples at as they are
LARGEST = 2**53  # whole numbers that survive as floats
DIGEST = r"^[A-Za-z0-9_.-]{1,128}$"
MOST_STOPS, LONGEST_STOP = 16, 256  # strings, and characters of one: they are looked for after every token
MOST_JSON_CELLS = 1 << 20  # of a table of chosen ids
CHARACTERS_A_TOKEN = 64  # more than any tokenizer makes of text on average
Body = TypeVar("Body", bound=BaseModel)


Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ScoreSettings(_Body):
    top_k: Annotated[int, Field(strict=True, ge=0, lt=1 << 31)] = 0
    temperature: Annotated[float, Field(ge=1.0, le=1.0)] = 1.0  # log-softmax at 1 is all that engines give
    dtype: Literal["float16", "float32"] = "float16"
    teacher: str | None = None
    hidden: Literal["", "bfloat16", "int8"] = ""


class ScoreBody(ScoreSettings):
    sequences: Annotated[list[Ids], ONE_MISTAKE]
    positions: Annotated[list[tuple[Id, Id]], ONE_MISTAKE]
    chosen: Annotated[list[Annotated[list[Ids], ONE_MISTAKE]], ONE_MISTAKE] | None = None


class SamplingBody(_Body):
    max_new_tokens: Annotated[int, Field(strict=True, ge=1)]
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(strict=True, ge=0)] = 0
    samples_per_prompt: Annotated[int, Field(strict=True, ge=1)] = 1
    seed: Annotated[int, Field(strict=True)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    stop: Annotated[list[Stop], ONE_MISTAKE, Field(max_length=MOST_STOPS)] = []
    ignore_eos: Annotated[bool, Field(strict=True)] = False
    first_sample: Annotated[int, Field(strict=True, ge=0, lt=1 << 31)] = 0


class GenerateSettings(_Body):
    sampling: SamplingBody
    eos_ids: Ids | None = None
    adapter: str | None = None
    teacher: str | None = None


class GenerateBody(GenerateSettings):
    prompts: Annotated[list[Ids], ONE_MISTAKE]
    rows: Annotated[list[Annotated[int, Field(strict=True, ge=0)]], ONE_MISTAKE] | None = None


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


class OfferBody(_Body):
    digest: Annotated[str, Field(pattern=DIGEST)]
    policy_version: Annotated[int, Field(strict=True, ge=0, lt=LARGEST)]


class WeightsBody(_Body):
    path: str
    policy_version: Annotated[int, Field(strict=True, ge=0, lt=LARGEST)]
    digest: Annotated[str, Field(pattern=DIGEST)] | None = None


class JoinBody(_Body):
    group: Annotated[str, Field(pattern=DIGEST)]
    backend: str
    replica: Annotated[int, Field(strict=True, ge=0, lt=1 << 16)]
    init: dict[str, Any]
    shapes: dict[str, list[Annotated[int, Field(strict=True, ge=0)]]]


class ReceiveBody(OfferBody):
    group: Annotated[str, Field(pattern=DIGEST)]
    update: dict[str, Any] | None = None


class AdapterBody(_Body):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    path: str


def read(kind: type[Body], data: bytes) -> Body:
    """The body as ``kind``.

    Raises:
        Problem: 400, with the field that is wrong.
    """
    return _validated(kind, lambda: kind.model_validate_json(data))


def checked(kind: type[Body], settings: dict[str, Any]) -> Body:
    """The settings of a body in bytes as ``kind``.

    Raises:
        Problem: 400, with the field that is wrong.
    """
    return _validated(kind, lambda: kind.model_validate(settings))


def _validated(kind: type[Body], made: Callable[[], Body]) -> Body:
    try:
        return made()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"]).lstrip(".") or "body"
        known = f"; known fields: {', '.join(kind.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise invalid(field, f"{first['msg'][0].lower()}{first['msg'][1:]}{known}") from None


def score_request(data: bytes, kind: str, limits: Limits) -> tuple[Sequences, str, str | None]:
    """What is to be scored, in which dtype the evidence goes out, and of which weights it has to be.

    Args:
        kind: content type of ``data``.

    Raises:
        Problem: 400.
    """
    if kind == IDS_TYPE:
        cells = limits.positions * max(limits.top_k, 1)
        try:
            asked = unpack_sequences(data, max_cells=cells)
        except BodyError as error:
            raise invalid("body", f"is no request for scores: {error}") from None
        body = checked(ScoreSettings, asked.settings)
    else:
        given = read(ScoreBody, data)
        _as_many("positions", given.positions, given.sequences)
        if given.chosen is not None:
            _as_many("chosen", given.chosen, given.sequences)
        spans = np.asarray(_in_range(given.positions), np.int64).reshape(-1, 2)
        asked = Sequences({}, [_as_ids(ids) for ids in given.sequences], spans, _tables(given))
        body = given
    if body.hidden and (body.top_k or asked.chosen is not None):
        raise invalid("hidden", f"is {body.hidden}; hidden states go without top_k and chosen ids")
    return replace(asked, settings={"top_k": body.top_k, "hidden": body.hidden or None}), body.dtype, body.teacher


def score_jobs(asked: Sequences, engine: Engine, limits: Limits) -> list[ScoreJob]:
    """One job per sequence.

    Raises:
        Problem: 400.
    """
    top_k = asked.settings["top_k"]
    _count("sequences", len(asked.ids), limits)
    for i, ((start, stop), ids) in enumerate(zip(asked.positions.tolist(), asked.ids, strict=True)):
        if not (1 <= start <= stop <= len(ids) or (start == stop == 0)):
            raise invalid(
                f"positions[{i}]",
                f"is [{start}, {stop}]; needed: 1 <= start <= stop <= {len(ids)} (its length)",
            )
    _ids("sequences", asked.ids, engine, limits)
    spans = asked.positions[:, 1] - asked.positions[:, 0]
    if (positions := int(spans.sum())) > limits.positions:
        raise invalid("positions", f"are {positions} together; at most {limits.positions} a request", limits.positions)
    width = asked.chosen[0].shape[1] if asked.chosen else 0
    wide, most = top_k + width, min(limits.top_k, engine.max_top_k)
    if wide > most:
        own = f"is {top_k}" if asked.chosen is None else f"and the chosen ids make {wide}"
        raise invalid("top_k", f"{own}; at most {most}", most)
    chosen, hidden = _chosen(asked, engine), asked.settings.get("hidden")
    if hidden and engine.head() is None:
        raise Problem(400, "unsupported", "this engine does not give hidden states", field="hidden")
    return [
        ScoreJob(ids[:stop].tolist(), start, stop, top_k, mine, hidden)
        for ids, (start, stop), mine in zip(asked.ids, asked.positions.tolist(), chosen, strict=True)
    ]


def generate_request(data: bytes, kind: str) -> tuple[Prompts, GenerateSettings]:
    """The prompts, and everything that is said about them.

    Raises:
        Problem: 400.
    """
    if kind == IDS_TYPE:
        try:
            asked = unpack_prompts(data)
        except BodyError as error:
            raise invalid("body", f"is no request for completions: {error}") from None
        return asked, checked(GenerateSettings, asked.settings)
    given = read(GenerateBody, data)
    rows = given.rows if given.rows is not None else list(range(len(given.prompts)))
    _as_many("rows", rows, given.prompts, "prompts")
    numbers = np.asarray([min(row, LARGEST) for row in rows], np.int64)
    return Prompts({}, [_as_ids(ids) for ids in given.prompts], numbers), given


def generate_job(asked: Prompts, body: GenerateSettings, engine: Engine, limits: Limits) -> GenerateJob:
    """The request as the engine takes it.

    Raises:
        Problem: 400; 404 for an unknown adapter.
    """
    sampling = body.sampling
    _count("prompts", len(asked.ids) * sampling.samples_per_prompt, limits)
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
    _ids("prompts", asked.ids, engine, limits, extra=sampling.max_new_tokens)
    if (asked.rows < 0).any():
        raise invalid("rows", f"holds {int(asked.rows.min())}; they number the prompts from 0")
    known_adapter(body.adapter, engine)
    vocab = engine.info.vocab_size
    for i, token in enumerate(body.eos_ids or ()):
        if not 0 <= token < vocab:
            raise invalid(f"eos_ids[{i}]", f"is {token}; token ids go from 0 to {vocab - 1}", vocab - 1)
    eos = tuple(body.eos_ids) if body.eos_ids is not None else engine.info.eos_ids
    prompts = [ids.tolist() for ids in asked.ids]
    return GenerateJob(prompts, asked.rows.tolist(), Sampling(**sampling.model_dump()), eos, body.adapter)


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
        shown = ", ".join(map(str, roots)) or "none (start the service with --allow_weights FOLDER)"
        raise invalid("path", f"{path[:200]!r} lies outside the allowed folders, or a file in it does: {shown}")
    return folder


def check_texts(body: TextBody, limits: Limits) -> None:
    """Refuses what cannot fit before it is tokenised, and names that a template is given otherwise.

    Raises:
        Problem: 400.
    """
    items = body.items
    check_template_kwargs(body.chat_template_kwargs or {}, limits)
    _count("items", len(items), limits)
    for i, item in enumerate(items):
        check_text(f"items[{i}].prompt", item.prompt if isinstance(item.prompt, str) else str(item.prompt), limits)
        check_text(f"items[{i}].completion", item.completion, limits)
        check_text(f"items[{i}].tools", str(item.tools or ""), limits)


def check_template_kwargs(kwargs: dict[str, Any], limits: Limits) -> None:
    """Raises Problem 400 for names that a template is given otherwise, and for more than fits."""
    if ours := [name for name in kwargs if name in TEMPLATE_ARGUMENTS]:
        raise invalid("chat_template_kwargs", f"has {ours[0]!r}; it takes names that only the template reads")
    check_text("chat_template_kwargs", str(kwargs), limits)


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


def _ids(field: str, sequences: Sequence[NDArray[Any]], engine: Engine, limits: Limits, extra: int = 0) -> None:
    """Every sequence is there, fits the context, and holds known ids."""
    vocab, most = engine.info.vocab_size, min(limits.sequence_tokens, engine.max_model_len)
    for i, ids in enumerate(sequences):
        if not len(ids):
            raise invalid(f"{field}[{i}]", "is empty; there must be at least one token")
        if len(ids) + extra > most:
            more = f" and {extra} new ones" if extra else ""
            raise invalid(f"{field}[{i}]", f"has {len(ids)} tokens{more}; the context holds {most}", most)
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
            j = int(np.flatnonzero((ids < 0) | (ids >= vocab))[0])
            raise invalid(f"{field}[{i}][{j}]", f"is {ids[j]}; token ids go from 0 to {vocab - 1}", vocab - 1)


def _as_ids(ids: Sequence[int]) -> NDArray[Any]:
    """A list of JSON's whole numbers, which may be of any size, as ids; what is none of any vocabulary is -1."""
    try:
        return np.asarray(ids, np.int64)
    except OverflowError:
        return np.asarray([x if 0 <= x < 1 << 31 else -1 for x in ids], np.int64)


def _in_range(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(max(min(a, LARGEST), -1), max(min(b, LARGEST), -1)) for a, b in spans]


def _as_many(field: str, found: Sequence[Any], others: Sequence[Any], what: str = "sequences") -> None:
    if len(found) != len(others):
        raise invalid(field, f"has {len(found)} entries for {len(others)} {what}")


def _tables(body: ScoreBody) -> list[Any] | None:
    """The ids a JSON body chooses as [n, C] arrays, one width for the whole request.

    Raises:
        Problem: 400.
    """
    if body.chosen is None:
        return None
    width = max((len(row) for rows in body.chosen for row in rows), default=0)
    made = []
    for i, (rows, (start, stop)) in enumerate(zip(body.chosen, body.positions, strict=True)):
        if len(rows) != stop - start:
            raise invalid(f"chosen[{i}]", f"has {len(rows)} rows for {stop - start} positions")
        if len(rows) * width > MOST_JSON_CELLS:  # one wide row is not spread over all the others
            raise invalid("top_k", f"and the chosen ids make {body.top_k + width}; send such tables as bytes", width)
        table = np.full((len(rows), width), -1, np.int64)
        for j, row in enumerate(rows):
            table[j, : len(row)] = _as_ids(row)
        made.append(table)
    return made


def _chosen(asked: Sequences, engine: Engine) -> list[torch.Tensor | None]:
    """The caller's ids as int32 tensors, if the engine takes them.

    Raises:
        Problem: 400.
    """
    if asked.chosen is None:
        return [None] * len(asked.ids)
    if not engine.chosen_ids:
        raise Problem(
            400,
            "unsupported",
            "this engine cannot score ids a caller chooses; serve with --engine hf",
            field="chosen",
        )
    vocab, made = engine.info.vocab_size, list[torch.Tensor | None]()
    for i, table_nC in enumerate(asked.chosen):
        wrong_n = ((table_nC < -1) | (table_nC >= vocab)).any(1)
        if wrong_n.any():
            j = int(np.flatnonzero(wrong_n)[0])
            raise invalid(f"chosen[{i}][{j}]", f"holds ids outside 0 to {vocab - 1} (-1 pads)", vocab - 1)
        made.append(torch.from_numpy(table_nC.astype(np.int32)))
    return made
