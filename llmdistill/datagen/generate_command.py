"""``llmdistill generate``: prompts in, traces out.

llmdistill generate --prompts prompts.jsonl --teacher Qwen/Qwen3-8B --out traces.jsonl --n 4 --judge math
llmdistill generate --prompts openai/gsm8k:main --template boxed --teacher.url http://127.0.0.1:8000 --out t.parquet
llmdistill generate --prompts reasoning_gym:chain_sum --size 200 --teacher M --temperatures 0.6 1.0 --n 8 --out t.jsonl
llmdistill generate --prompts p.jsonl --writer capped --student S --teacher T --options '{"budget": 2048}' --out t.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin, get_type_hints

from llmdistill.datagen.generation import generate
from llmdistill.datagen.jobs import MAX_NEW_TOKENS
from llmdistill.datagen.prompts import Prompts
from llmdistill.datagen.roles import RoleConfig
from llmdistill.datagen.steps import beside
from llmdistill.datagen.tables import MOST_REJECTED
from llmdistill.datagen.tell import summary
from llmdistill.errors import UserError
from llmdistill.options import OptionParser, underscored
from llmdistill.quiet import quiet

ROLES = ("teacher", "student", "judge", "opponent")  # others as --NAME.model


def run(argv: Sequence[str]) -> int:
    """The command. Exit status 0, or what :class:`UserError` makes of it one level up."""
    words, rest = _parser().parse_known_args(argv)
    roles = roles_of(rest)
    if not roles:
        raise UserError("llmdistill generate was given no model. Fix: --teacher FOLDER_OR_HUB_NAME_OR_URL.")
    quiet()
    shard = shard_of(words.shard)
    out = words.out if shard[1] == 1 else str(beside(words.out, f"{shard[0]:05d}-of-{shard[1]:05d}"))
    prompts = Prompts(
        words.prompts,
        column=words.prompt_column,
        answer_column=words.answer_column,
        template=words.template,
        system_prompt=words.system_prompt,
        split=words.split,
        size=words.size,
        settings=words.settings or None,
        seed=words.prompts_seed,
        limit=words.limit,
        shard=shard,
    )
    drawn = {name: getattr(words, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k")}
    manifest = generate(
        prompts,
        words.writer,
        roles,
        out,
        n=words.n,
        sampling=drawn,
        temperatures=words.temperatures,
        seed=words.seed,
        options=words.options,
        judge=words.judge,
        allow_unsafe_exec=words.allow_unsafe_exec,
        max_cost=words.max_cost,
        max_rejected=words.max_rejected,
        progress=True,
    )
    for line in summary(manifest):
        print(line)
    if judged := manifest.details.get("verdicts"):
        print("  verdicts: " + ", ".join(f"{count:,} {kind}" for kind, count in judged.items()))
    return 0


def roles_of(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Role -> settings, of ``--NAME MODEL_OR_URL`` and ``--NAME.KEY VALUE``.

    Raises:
        UserError: a word that is neither, or a value of another type.
    """
    kinds, found, rest = get_type_hints(RoleConfig), dict[str, dict[str, Any]](), list(words)
    while rest:
        word = rest.pop(0)
        name, given, value = word.removeprefix("--").partition("=")
        name = underscored(name)
        role, dot, key = name.partition(".")
        if not word.startswith("--") or not role or (not dot and role not in ROLES) or (dot and key not in kinds):
            known = [*_known(), *(f"{r}.{k}" for r in ROLES for k in kinds)]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean --{near[0]}?" if near else "llmdistill generate --help lists the settings."
            raise UserError(f"llmdistill generate does not know {word}; {hint}")
        kind = kinds.get(key, str)
        if not given:
            if kind is bool and (not rest or rest[0].startswith("--")):
                value = "true"
            elif not rest:
                raise UserError(f"{word} was given no value. Fix: {word} VALUE.")
            else:
                value = rest.pop(0)
        settings = found.setdefault(role, {})
        if dot:
            settings[key] = read_as(kind, value, word)
        else:
            settings["url" if value.startswith(("http://", "https://")) else "model"] = value
    return found


def read_as(kind: Any, text: str, what: str) -> Any:
    """A word of the command line as the type of its setting. Raises UserError where it is none."""
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if get_origin(kind) in (dict, list) or kind in (dict, list) or get_origin(kind) is Mapping:
            return json.loads(text)
        if kind in (int, float):
            return kind(text)
        if get_args(kind) and all(isinstance(option, str) for option in get_args(kind)) and text not in get_args(kind):
            raise ValueError(f"one of {', '.join(get_args(kind))}")
    except (ValueError, KeyError) as error:
        needed = str(error) if str(error).startswith("one of") else getattr(kind, "__name__", "JSON")
        raise UserError(f"{what} is {text!r}; it must be {needed}. Fix: another value.") from error
    return text


def shard_of(text: str) -> tuple[int, int]:
    """ "2/8", or "auto": by a launch's or a Slurm array's variables.

    Raises:
        UserError: neither.
    """
    if text == "auto":
        for index, count, first in (
            ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
            ("RANK", "WORLD_SIZE", ""),
        ):
            if index in os.environ and count in os.environ:
                return int(os.environ[index]) - int(os.environ.get(first, 0)), int(os.environ[count])
        return 0, 1
    try:
        index_, count_ = map(int, text.split("/"))
        if 0 <= index_ < count_:
            return index_, count_
    except ValueError:
        pass
    raise UserError(f"shard is {text!r}; it must be I/N with 0 <= I < N, or auto. Fix: 0/8 for the first of eight.")


def _known() -> list[str]:
    return [*ROLES, *(o.lstrip("-") for action in _parser()._actions for o in action.option_strings)]


def _mapping(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("no mapping")  # argparse says which setting it is
    return value


def _parser() -> argparse.ArgumentParser:
    top = OptionParser(
        prog="llmdistill generate",
        usage="llmdistill generate --prompts SOURCE --teacher MODEL_OR_URL --out FILE [--key value ...]",
        description="Traces of prompts, each call kept as it is answered: kill it at any moment, and the same command "
        "goes on. FILE.calls holds the answers, FILE.manifest.json tells how the file came to be.",
        epilog="roles: " + ", ".join(f"--{role}" for role in ROLES) + ", each with "
        + ", ".join(f".{field.name}" for field in dataclasses.fields(RoleConfig)),
        allow_abbrev=False,
    )  # fmt: skip
    add = top.add_argument
    add(
        "--prompts", required=True, metavar="SOURCE", help="file, hub dataset (NAME:CONFIG), or reasoning_gym:TASK,TASK"
    )
    add("--out", required=True, metavar="FILE", help=".jsonl, .jsonl.gz or .parquet")
    add(
        "--writer",
        default="plain",
        help="plain, first_thought, privileged, few_shot, capped, planned, debate, or module:function",
    )
    add("--options", type=_mapping, default={}, metavar="JSON", help="of the writer")
    add("--n", type=int, default=1, help="samples of every prompt [1]")
    add("--max_new_tokens", type=int, default=MAX_NEW_TOKENS, help=f"longest completion [{MAX_NEW_TOKENS}]")
    add("--temperature", type=float, default=1.0, help="sampling temperature [1.0]")
    add("--temperatures", type=float, nargs="+", default=[], help="several, low ones first: the samples are shared out")
    add("--top_p", type=float, default=1.0, help="nucleus sampling [1.0]")
    add("--top_k", type=int, default=0, help="sample among so many tokens; 0: all [0]")
    add("--seed", type=int, default=0, help="of the dataset [0]")
    add("--judge", default="", help="verdicts as traces come: auto, math, choice, code, or module:function")
    add("--allow_unsafe_exec", action="store_true", help="run what a model wrote where nothing confines it")
    add("--prompt_column", default="", help="column of the prompt: text or messages [the usual names]")
    add("--answer_column", default="", help="column of the right answer [the usual names]")
    add("--template", default="", help="prompt template around questions (boxed, choice, function, ...)")
    add("--system_prompt", default="", help="system message of prompts that have none")
    add("--split", default="train", help="split of a hub dataset [train]")
    add("--size", type=int, default=100, help="problems of each reasoning-gym task [100]")
    add("--settings", type=_mapping, default={}, metavar="JSON", help="of the reasoning-gym tasks")
    add("--prompts_seed", type=int, default=0, help="of the reasoning-gym tasks [0]")
    add("--limit", type=int, default=0, help="the first so many prompts; 0: all [0]")
    add(
        "--shard", default="0/1", metavar="I/N", help="every N-th row from the I-th on, into a file of its own; or auto"
    )
    add("--max_cost", type=float, default=0.0, help="cap, by the roles' prices; 0: none [0]")
    add("--max_rejected", type=float, default=MOST_REJECTED, help=f"share that may be rejected [{MOST_REJECTED}]")
    add("--debug", action="store_true", help=argparse.SUPPRESS)
    return top
