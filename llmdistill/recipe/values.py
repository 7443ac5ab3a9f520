"""From the values of a recipe and a command line to a config dataclass, coerced to the types of its fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from llmdistill.errors import UserError

# Fields that are a word, a truth value or a list; the parser takes one kind of them.
AS_WRITTEN = ("report_to", "include_num_input_tokens_seen", "resume_from_checkpoint", "init_lora_weights", "fsdp")


def build(cls: type, values: Mapping[str, Any], section: str, **ready: Any) -> Any:
    """An instance of ``cls``, its values coerced to the types of its fields."""
    words: list[str] = []
    left_out = set[str]()
    lists: dict[str, Any] = {}  # what the parser cannot read: as it is
    types = get_type_hints(cls)
    defaults = {f.name: None if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(cls)}
    for key, value in values.items():
        home = "objective" if section == "train" and key in own_fields(cls) else section
        kinds = kinds_of(types[key])
        if value == "null" and NoneType in kinds:  # as YAML has it, on the command line
            value = None
        if value is None and not {NoneType, Any} & kinds:
            if not defaults[key]:
                left_out.add(key)  # nothing, which its default is too
                continue
            raise UserError(f"{home}.{key} is null; it must be {_called(kinds)}. Fix: leave it out for its default.")
        if get_origin(types[key]) is list and (isinstance(value, list) or str(value).startswith("[")):
            lists[key] = _list(value, f"{home}.{key}", get_args(types[key])[0])
        elif dict in kinds and isinstance(value, list):
            raise UserError(f"{home}.{key} is {value!r}; it must be a mapping. Fix: {key}: {{NAME: VALUE}}.")
        elif value is None or isinstance(value, list | dict) or key in AS_WRITTEN:
            lists[key] = value
        elif get_origin(types[key]) is dict:
            lists[key] = _mapping(value, f"{home}.{key}")
        elif isinstance(value, bool) and not {bool, Any} & kinds:
            words += [f"--{key}", _unquoted(value, f"{home}.{key}")]
        else:
            words += [f"--{key}={value}"]
    try:
        # The nested section is built already; the parser only has to know the flat fields.
        parser = _Parser(_flat(cls) if ready else cls)  # type: ignore[arg-type]
        (parsed,) = parser.parse_args_into_dataclasses(words)
    except _BadWord as error:
        option, _, reason = str(error).removeprefix("argument ").partition(":")
        key = option.split("/")[0].removeprefix("--")
        home = "objective" if section == "train" and key in own_fields(cls) else section
        raise UserError(f"{home}.{key}:{reason}") from None
    given = {key: getattr(parsed, key) for key in values if key not in lists and key not in left_out}
    try:
        return cls(**given, **lists, **ready)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"{section}: {error}".splitlines()[0]) from error


def kinds_of(given: Any) -> set[Any]:
    """What a setting of such a type may be: it, or those of a union, without their parameters."""
    parts = get_args(given) if get_origin(given) in (Union, UnionType) else (given,)
    return {get_origin(part) or part for part in parts}


def own_fields(config_class: type) -> list[str]:
    """The fields of a config class that are the method's, not transformers'."""
    return [f.name for f in dataclasses.fields(config_class) if f.metadata.get("section") == "objective"]


class _BadWord(UserError):
    """What argparse says of one option; a config class says of its own settings itself."""


class _Parser(HfArgumentParser):
    def error(self, message: str) -> Any:
        raise _BadWord(message)


def _called(kinds: set[Any]) -> str:
    """How a type is spoken of."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list"}
    names[dict] = "a mapping"
    return " or ".join(sorted({names.get(kind, "one of its choices") for kind in kinds}))


def _unquoted(value: bool, setting: str) -> str:
    """What YAML read as a truth value where a word is meant: ``eval_strategy: no``."""
    if not value:
        return "no"
    raise UserError(f"{setting} is true, which YAML makes of yes and on too; it must be text. Fix: put it in quotes.")


def _list(given: Any, setting: str, kind: type) -> list[Any]:
    """As a recipe has it, or of the command line, in YAML or JSON."""
    value = given
    if isinstance(given, str):
        try:
            value = yaml.safe_load(given)
        except yaml.YAMLError:
            value = None
    sound = isinstance(value, list) and (kind is not int or all(type(x) is int for x in value))
    if not sound:
        what = "whole numbers" if kind is int else "values"
        raise UserError(f"{setting} is {given!r}; it must be a list of {what}. Fix: --{setting} '[A, B]'.")
    return value


def _mapping(text: Any, setting: str) -> dict[str, Any]:
    """Of the command line, in YAML or JSON."""
    try:
        value = yaml.safe_load(str(text))
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{setting} is {text!r}; it must be a mapping. Fix: --{setting} '{{NAME: VALUE}}'.")
    return value


def _flat(cls: type) -> Any:
    """``cls`` without its nested section and without running transformers' ``__post_init__`` on half a config."""
    types = get_type_hints(cls)
    fields = []
    for f in dataclasses.fields(cls):
        if not f.init or f.name == "rollouts":
            continue
        # argparse is handed the metadata as keyword arguments: only the ones it knows.
        metadata = {k: v for k, v in f.metadata.items() if k in ("help", "aliases")}
        if f.default_factory is not dataclasses.MISSING:
            fld = dataclasses.field(default_factory=f.default_factory, metadata=metadata)
        else:
            fld = dataclasses.field(default=f.default, metadata=metadata)
        fields.append((f.name, types[f.name], fld))
    return dataclasses.make_dataclass(f"{cls.__name__}Fields", fields)
