"""``export``: traces and pairs in the forms that others read, and nothing but what they read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from llmdistill.datagen.schema import as_messages, conversation
from llmdistill.datagen.steps import Paths, Step, run_step
from llmdistill.datagen.tables import MOST_REJECTED, Row
from llmdistill.errors import UserError
from llmdistill.record.manifest import Manifest

Format = Literal["trl", "messages", "sharegpt"]
SHAREGPT = {"user": "human", "assistant": "gpt"}


def export(src: Paths, out: str | Path, *, format: Format = "trl", max_rejected: float = MOST_REJECTED) -> Manifest:
    """Rows in another form.

    Args:
        format: "trl": traces as prompt and completion, pairs as prompt, chosen, rejected, all as messages, which
            SFTTrainer and DPOTrainer read as they are; "messages": a conversation in a column; "sharegpt":
            ``conversations`` of {"from", "value"}, pairs with ``chosen`` and ``rejected`` beside.

    Raises:
        UserError: another format, or rows that are neither traces nor pairs.
    """
    if format not in get_args(Format):
        raise UserError(f"format is {format!r}; it must be one of {', '.join(get_args(Format))}. Fix: trl.")
    written: Callable[[Mapping[str, Any]], Row] = {"trl": trl, "messages": messages, "sharegpt": sharegpt}[format]

    def work(step: Step) -> None:
        def rows() -> Iterator[Row]:
            for row in step.rows(("prompt",)):
                if row.get("completion") is None and row.get("chosen") is None:
                    step.lose("neither a trace nor a pair")
                else:
                    yield written(row)

        step.write(rows())

    return run_step("export", work, src=src, out=out, settings={"format": format}, max_rejected=max_rejected)


def trl(row: Mapping[str, Any]) -> Row:
    """As TRL's conversational datasets."""
    prompt = as_messages(row["prompt"])
    if row.get("chosen") is None:
        return {"prompt": prompt, "completion": conversation(row)[-1:]}
    sides = {name: _answer(row[name]) for name in ("chosen", "rejected") if row.get(name) is not None}
    if "rejected" not in sides:  # a positive
        return {"prompt": prompt, "completion": sides["chosen"]}
    return {"prompt": prompt, **sides}


def messages(row: Mapping[str, Any]) -> Row:
    """One conversation; of a pair two."""
    prompt = as_messages(row["prompt"])
    if row.get("chosen") is None:
        return {"messages": conversation(row)}
    if row.get("rejected") is None:
        return {"messages": [*prompt, *_answer(row["chosen"])]}
    return {name: [*prompt, *_answer(row[name])] for name in ("chosen", "rejected")}


def sharegpt(row: Mapping[str, Any]) -> Row:
    """As ShareGPT's readers have it; a pair in the form of LLaMA-Factory."""
    if row.get("chosen") is None:
        return {"conversations": _shared(conversation(row))}
    if row.get("rejected") is None:
        return {"conversations": _shared([*as_messages(row["prompt"]), *_answer(row["chosen"])])}
    sides = {name: _shared(_answer(row[name]))[0] for name in ("chosen", "rejected")}
    return {"conversations": _shared(as_messages(row["prompt"])), **sides}


def _shared(said: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"from": SHAREGPT.get(m["role"], m["role"]), "value": m["content"]} for m in said]


def _answer(side: Any) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": side}] if isinstance(side, str) else [dict(m) for m in side]
