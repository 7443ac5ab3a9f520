"""From a recipe and ``--key value`` overrides to the config dataclasses, with errors people can act on.

Reading types and choices off a dataclass is transformers' ``HfArgumentParser``; what is ours is the sections, the
did-you-mean and a ``--help`` that fits a screen.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from transformers import TrainingArguments

from llmdistill.errors import UserError
from llmdistill.failures import reported
from llmdistill.options import underscored
from llmdistill.recipe.config import DistillationConfig, EvalsConfig, RolloutConfig, StudentConfig, TeacherConfig
from llmdistill.recipe.data_config import DataConfig
from llmdistill.recipe.elsewhere import ELSEWHERE
from llmdistill.recipe.groups import in_section, teacher_groups
from llmdistill.recipe.heads import launched, no_recipe
from llmdistill.recipe.values import build, kinds_of, own_fields

# The handful of transformers.TrainingArguments that --help lists; all the others are accepted too.
COMMON_TRAIN = [
    *("output_dir", "learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "bf16"),
    *("gradient_checkpointing", "logging_steps", "save_steps", "save_total_limit", "eval_strategy", "eval_steps"),
    *("seed", "report_to"),
]

# Switches of a command among the fields of its recipe: config.yaml, from which a run is begun anew, has none of them.
OF_THE_COMMAND = ("resume_from_checkpoint", "restart_optimizer")
AMONG_SEVERAL = ("name", "domains", "weight")  # keys that tell teachers apart


@dataclass
class Flags:
    """Switches of the command itself; they never enter a recipe."""

    resume: bool = False
    debug: bool = False
    skip_checks: tuple[str, ...] = ()


@dataclass
class Recipe:
    """A resolved recipe."""

    student: StudentConfig
    teachers: list[TeacherConfig]
    data: DataConfig
    args: DistillationConfig
    flags: Flags
    evals: EvalsConfig = field(default_factory=EvalsConfig)
    listed: bool = False  # it has teachers:, a list, and not teacher:

    @property
    def teacher(self) -> TeacherConfig:
        """The only teacher.

        Raises:
            UserError: there are several.
        """
        if len(self.teachers) > 1:
            raise UserError(
                f"the recipe has {len(self.teachers)} teachers; this takes one. Fix: teacher: for teachers:."
            )
        return self.teachers[0]

    @property
    def teacher_sections(self) -> list[str]:
        """How messages name each of ``teachers``."""
        return [f"teachers[{i}]" for i in range(len(self.teachers))] if self.listed else ["teacher"]

    def default(self, section: str, key: str, missing: Any) -> Any:
        """What a setting is where :meth:`resolved` leaves it out, or ``missing`` if there is none of that name."""
        cls = TrainingArguments if section == "train" else _sections(type(self.args)).get(section, Flags)
        fld = next((f for f in dataclasses.fields(cls) if f.name == key), None)  # type: ignore[arg-type]
        if fld is None:
            return missing
        if fld.default_factory is not dataclasses.MISSING:
            return fld.default_factory()
        return None if fld.default is dataclasses.MISSING else fld.default

    def resolved(self) -> dict[str, Any]:
        """Everything that decides the run, section by section, as written to ``config.yaml``."""
        args = self.args.to_dict()
        objective = {k: args[k] for k in own_fields(type(self.args))}
        # Only what differs from transformers' defaults: the other hundred would bury it. They are read off the fields,
        # since making a TrainingArguments resets the process's accelerator state.
        fields = dataclasses.fields(TrainingArguments)
        defaults = {f.name: f.default for f in fields if f.init and f.name not in OF_THE_COMMAND}
        train = {k: v for k, v in args.items() if k in defaults and v != defaults[k] and _plain(v) and v != []}
        return {
            "student": dataclasses.asdict(self.student),
            **(
                {"teachers": [dataclasses.asdict(t) for t in self.teachers]}
                if self.listed
                else {"teacher": dataclasses.asdict(self.teacher)}
            ),
            "data": dataclasses.asdict(self.data),
            "rollouts": args["rollouts"],
            "evals": dataclasses.asdict(self.evals),
            "objective": objective,
            "train": {"output_dir": self.args.output_dir, **train},
        }


def parse(config_class: type[DistillationConfig], argv: Sequence[str]) -> Recipe:
    """Builds a :class:`Recipe` from ``--config FILE`` and ``--section.key value`` or ``--key value`` overrides.

    Raises:
        UserError: an unknown section or key (with the nearest known one), a value of the wrong type, a missing file.
    """
    sections = _sections(config_class)
    values: dict[str, Any] = {name: {} for name in sections}
    flags, overrides = _split_argv(argv, values, sections)
    for section, key, value in overrides:
        place = _entry(section, key, values.get("teachers", [])) if section not in sections else values[section]
        place[key] = value
    listed = "teachers" in values
    teachers = _teachers(values.pop("teacher"), values.pop("teachers", []), listed)
    built = {name: build(cls, values[name], name) for name, cls in _plain_sections().items() if name in values}
    own = {**values["objective"], **values["train"]}
    args = build(config_class, own, "train", rollouts=built.pop("rollouts"))
    flags.resume = flags.resume or bool(args.resume_from_checkpoint)
    return Recipe(**built, teachers=teachers, args=args, flags=flags, listed=listed)


def named(argv: Sequence[str], section: str, key: str) -> str | None:
    """The value that a recipe and its overrides give one setting, before anything else of them is read."""
    value, words = None, list(argv)
    for i, word in enumerate(words):
        name, _, given = word.removeprefix("--").partition("=")
        name = underscored(name)
        given = given or (words[i + 1] if i + 1 < len(words) else "")
        if name == "config" and Path(given).is_file():
            try:
                recipe = yaml.safe_load(Path(given).read_text())
                value = (recipe.get(section) or {}).get(key, value)
            except (yaml.YAMLError, AttributeError):
                continue  # parse() says what is wrong with it
        elif word.startswith("--") and name in (key, f"{section}.{key}"):
            value = given
    return value


def run_front_door(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> None:
    """Runs ``main`` and exits with its status. Whatever ends it early is one line on stderr
    (:mod:`llmdistill.failures`); the traceback of a fault goes into the run's folder."""

    def folder() -> Path:
        return Path(named(argv, "train", "output_dir") or "runs/default")

    sys.exit(reported(lambda: main(argv), argv, folder=folder, interrupted="interrupted; continue with --resume"))


def help_text(
    config_class: type[DistillationConfig], command: str, summary: str, *, without: Collection[str] = ()
) -> str:
    """Every section's keys with defaults, and where the rest is; not of sections that are not read."""
    lines = [
        f"usage: accelerate launch -m {command} --config recipes/NAME.yaml [--key value ...]",
        "",
        summary,
        "",
        "  --config FILE          the recipe",
        "  --resume               continue from the newest complete checkpoint of train.output_dir",
        "  --debug                show tracebacks",
        "  --KEY VALUE            override a key below; --section.KEY where two sections share a name",
    ]
    if "teacher" not in without:
        several = "where the recipe lists teachers: a key of the Nth (from 0), or of the one named N"
        lines.append(f"  --teachers.N.KEY VALUE {several}")
    lines.append("  --skip-check NAME      go on although this preflight check fails (repeatable)")
    for name, cls in _sections(config_class).items():
        if name in without:
            continue
        keys = {f.name: f for f in dataclasses.fields(cls)}
        if name == "objective":
            keys = {k: keys[k] for k in own_fields(config_class)}
        elif name == "train":
            keys = {k: keys[k] for k in COMMON_TRAIN if k in keys}
        lines += ["", f"{name}:"]
        for key, fld in keys.items():
            text = str(fld.metadata.get("help", "")).split(". ")[0].strip().replace("%%", "%")
            shown = textwrap.shorten(text, 90, placeholder=" …")
            lines.append(f"  {key:<28} {shown} [{_default(fld)}]")
    lines += ["", "train: also takes every other field of transformers.TrainingArguments."]
    return "\n".join(lines)


def _sections(config_class: type[DistillationConfig]) -> dict[str, type]:
    return {**_plain_sections(), "objective": config_class, "train": config_class}


def _plain_sections() -> dict[str, type]:
    return {
        "student": StudentConfig,
        "teacher": TeacherConfig,
        "data": DataConfig,
        "rollouts": RolloutConfig,
        "evals": EvalsConfig,
    }


def _keys(config_class: type, section: str) -> list[str]:
    own = own_fields(config_class)
    names = [f.name for f in dataclasses.fields(config_class) if f.init]
    if section == "objective":
        return own
    return [n for n in names if n not in own and n != "rollouts"] if section == "train" else names


def _split_argv(
    argv: Sequence[str], values: dict[str, Any], sections: Mapping[str, type]
) -> tuple[Flags, list[tuple[str, str, Any]]]:
    """Reads the recipe file into ``values`` and returns the flags and the command line's overrides."""
    flags, overrides, words = Flags(), [], list(argv)
    while words:
        word = words.pop(0)
        if word in ("--resume", "--debug"):
            setattr(flags, word[2:], True)
            continue
        if not word.startswith("--"):
            fix = f" Fix: --config {word}." if word.endswith((".yaml", ".yml")) else ""
            raise UserError(f"{word!r} is not an option; overrides are written --key value.{fix}")
        name, given, value = word[2:].partition("=")
        name = underscored(name)
        section, key, kinds = "", "", {str}
        if name not in ("config", "skip_check"):
            section, key = _locate(name, sections)
            cls = sections["teacher" if section.startswith("teachers.") else section]
            kinds = kinds_of(get_type_hints(cls)[key])
        if not given:  # behind "=" stands the value, and nothing is a value too
            value = _following(name, kinds, words)
        if name == "config":
            _read_recipe(Path(value), values, sections)
        elif name == "skip_check":
            flags.skip_checks += (value,)
        else:
            overrides.append((section, key, value))
    return flags, overrides


def _following(name: str, kinds: set[Any], words: list[str]) -> Any:
    """The value that stands behind an option; taken out of ``words``. A switch needs none, a list may have several."""
    mine = list(itertools.takewhile(lambda word: not word.startswith("--"), words))
    if not mine and bool in kinds:
        return "true"
    if not mine:
        behind = f"{words[0]!r} is an option; one that begins so is written --{name}=VALUE" if words else "none follows"
        raise UserError(f"--{name} needs a value, and {behind}")
    taken = mine if list in kinds and len(mine) > 1 else mine[:1]
    del words[: len(taken)]
    return taken if len(taken) > 1 else taken[0]


def _read_recipe(path: Path, values: dict[str, Any], sections: Mapping[str, type]) -> None:
    if not path.is_file():
        raise no_recipe(path)
    text = path.read_text()
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"--config {path} holds no mapping; it needs the sections {', '.join(sections)}")
    for section, content in recipe.items():
        if section == "teachers":
            values[section] = [
                _known(entry, f"teachers[{i}]", sections["teacher"], path) for i, entry in _items(content)
            ]
        elif section not in sections:
            raise UserError(f"{path}: unknown section {section!r}{_hint(section, [*sections, 'teachers'])}")
        else:
            try:
                values[section] |= _known(content or {}, section, sections[section], path)
            except UserError as error:
                raise UserError(f"{error}{launched(text)}") from None


def _items(content: Any) -> list[tuple[int, Any]]:
    if not isinstance(content, list):
        raise UserError(
            f"teachers is a {type(content).__name__}; it must be a list. Fix: '- model: ...' for each of them."
        )
    return list(enumerate(content))


def _known(content: Any, section: str, cls: type, path: Path) -> dict[str, Any]:
    """``content`` if it is a mapping of keys that ``cls`` has."""
    if not isinstance(content, dict):
        fix = f" Fix: {section}: {{model: {content}}}." if "model" in _keys(cls, section) and content else ""
        raise UserError(f"{path}: {section} is {content!r}; it must be a mapping of keys to values.{fix}")
    for key in content:
        if key not in (known := _keys(cls, section)):
            raise UserError(f"{path}: unknown key {section}.{key}{_hint(key, known)}")
    return dict(content)


def _entry(section: str, key: str, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The entry of ``teachers`` that an override ``--teachers.WHICH.KEY`` speaks of."""
    which = section.removeprefix("teachers.")
    found = [e for i, e in enumerate(entries) if which in (str(i), e.get("name"))]
    if found:
        return found[0]
    if not entries:
        raise UserError(f"--{section}.{key}: the recipe has no list teachers. Fix: --teacher.{key}.")
    known = ", ".join(f"{i} ({e['name']})" if e.get("name") else str(i) for i, e in enumerate(entries))
    raise UserError(f"--{section}.{key}: the recipe has no teacher {which!r}; it has {known}")


def _teachers(single: dict[str, Any], several: list[dict[str, Any]], listed: bool) -> list[TeacherConfig]:
    """The teachers of a recipe, each named by its place in messages."""
    if listed and single:
        raise UserError(
            f"the recipe has a list teachers, and teacher.{next(iter(single))} is set too. Fix: move it into the list "
            "(on the command line --teachers.0.KEY), or take the list out."
        )
    if not listed:
        configs = [build(TeacherConfig, single, "teacher")]
    else:
        configs = [_build_entry(entry, f"teachers[{i}]") for i, entry in enumerate(several)]
    try:
        teacher_groups(configs)
    except UserError as error:
        raise error if listed else UserError(str(error).replace("teachers[0]", "teacher")) from None
    return configs


def _build_entry(entry: dict[str, Any], section: str) -> TeacherConfig:
    try:
        return build(TeacherConfig, entry, section)  # type: ignore[no-any-return]
    except UserError as error:
        raise in_section(error, section) from None


def _locate(name: str, sections: Mapping[str, type]) -> tuple[str, str]:
    """Section and key that an override names."""
    section, _, key = name.rpartition(".")
    if section == "teachers":
        raise UserError(f"--{name}: of which teacher? Fix: --teachers.0.{key} for the first, or its name for the 0.")
    if section:
        cls = sections.get("teacher" if section.startswith("teachers.") else section)
        if cls is None:
            raise UserError(f"--{name}: unknown section {section!r}{_hint(section, [*sections, 'teachers'])}")
        if key not in (known := _keys(cls, section)):
            raise UserError(f"--{name}: unknown key {key!r} in {section}{_hint(key, known)}")
        return section, key
    homes = [s for s, cls in sections.items() if name in _keys(cls, s)]
    if len(homes) > 1 and name in AMONG_SEVERAL:  # what they mean to a single teacher is worth no ambiguity
        homes.remove("teacher")
    if len(homes) == 1:
        return homes[0], name
    if homes:
        raise UserError(f"--{name} is ambiguous; write {' or '.join(f'--{s}.{name}' for s in homes)}")
    every = [k for s, cls in sections.items() for k in _keys(cls, s)]
    raise UserError(f"unknown option --{name}{_hint(name, every)}")


def _hint(word: str, known: Any) -> str:
    if there := ELSEWHERE.get(str(word)):
        return f"; {there}"
    near = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; --help lists the known ones ({len(list(known))})"


def _default(fld: dataclasses.Field[Any]) -> Any:
    return fld.default if fld.default is not dataclasses.MISSING else "-"


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list, dict))
