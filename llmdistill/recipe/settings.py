"""A setting's declaration: default, help, range, readers and conflicts; and the one place where they are checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmdistill.errors import UserError


@dataclass(frozen=True)
class Conflict:
    """Settings that do not go together: ``when(settings)`` says so, and the message says what to change."""

    when: Callable[[Any], bool]
    message: str  # with {name} for a setting's value
    fix: str


# Of methods that weigh sampled tokens: greedy ones were drawn from no distribution.
GREEDY = Conflict(
    lambda s: s.rollouts.temperature == 0,
    "rollouts.temperature is 0, and sampled tokens are weighed by the probability they were drawn with",
    "--rollouts.temperature 1",
)

# Their losses look at a position alone, and do not know which tokens the text had by then.
PENALISED = Conflict(
    lambda s: s.rollouts.repetition_penalty != 1,
    "rollouts.repetition_penalty is {rollouts.repetition_penalty:g}, and sampled tokens are weighed by the probability "
    "they were drawn with, which then depends on all that stands before them: the gradient would be biased",
    "--rollouts.repetition_penalty 1",
)


def option(default: Any, help: str) -> Any:
    """A dataclass field with its one line of help."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def setting(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    read_by: Mapping[str, Sequence[Any]] | None = None,
    default_by: Mapping[str, Mapping[Any, Any]] | None = None,
) -> Any:
    """A field of a recipe's section ``objective``.

    Args:
        at_least, above, at_most, below: its range; None as value is never out of it.
        read_by: other setting -> its values for which this one is read. Elsewhere anything but the default is refused.
        default_by: other setting -> its values for which this one is read, and what it is there where None is given.
            Elsewhere it becomes None, and is refused only where it asks for something that none of those has anyway:
            a recipe for one value runs with another.
    """
    rules = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    rules |= {"read_by": read_by, "default_by": default_by}  # type: ignore[dict-item]
    metadata = {"help": help, "section": "objective", **{k: v for k, v in rules.items() if v is not None}}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_settings(settings: Any, section: str = "objective") -> None:
    """Checks every declaration of a dataclass, and the ``conflicts`` of its class.

    Raises:
        UserError: a value out of its range, one that nothing reads, or two that contradict each other.
    """
    for f in dataclasses.fields(settings):
        _fill(f, settings, section)
    for f in dataclasses.fields(settings):
        _check_range(f, getattr(settings, f.name), section)
    for f in dataclasses.fields(settings):
        _check_readers(f, settings, section)
    for cls in reversed(type(settings).__mro__):  # a base's before its subclass's
        check_conflicts(settings, vars(cls).get("conflicts", ()))


def check_conflicts(settings: Any, conflicts: Iterable[Conflict]) -> None:
    """Raises:
    UserError: the first of them that there is.
    """
    for conflict in conflicts:
        if conflict.when(settings):
            raise UserError(f"{conflict.message.format_map(_Values(settings))}. Fix: {conflict.fix}.")


def require(ok: bool, setting: str, value: object, needed: str, fix: str) -> None:
    """Raises a :class:`UserError` in the house form unless ``ok``."""
    if not ok:
        raise UserError(f"{setting} is {value!r}; it must be {needed}. Fix: {fix}.")


class _Values(dict[str, Any]):
    """A settings object as what a message is filled from."""

    def __init__(self, settings: Any) -> None:
        super().__init__()
        self.settings = settings

    def __missing__(self, name: str) -> Any:
        value = getattr(self.settings, name)
        value = getattr(value, "value", value)  # of transformers' enumerations what one writes
        return f"{value:g}" if isinstance(value, float) else value


def _check_range(f: Any, value: Any, section: str) -> None:
    limits = {
        "at_least": (">=", lambda x, limit: x >= limit),
        "above": (">", lambda x, limit: x > limit),
        "at_most": ("<=", lambda x, limit: x <= limit),
        "below": ("<", lambda x, limit: x < limit),
    }
    given = {name: f.metadata[name] for name in limits if name in f.metadata}
    if value is None or not given:
        return
    numbers = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    needed = " and ".join(f"{limits[name][0]} {limit:g}" for name, limit in given.items())
    default = f.default if f.default is not dataclasses.MISSING else None
    fix = "leave it out" if default is None else f"use {default:g}" if isinstance(default, float) else f"use {default}"
    for x in numbers:
        number = isinstance(x, int | float)
        inside = number and all(limits[name][1](x, limit) for name, limit in given.items())
        require(inside, f"{section}.{f.name}", value, needed, fix)


def _fill(f: Any, settings: Any, section: str) -> None:
    """The value of a setting whose default another one decides."""
    for other, defaults in f.metadata.get("default_by", {}).items():
        chosen, value = getattr(settings, other), getattr(settings, f.name)
        if chosen in defaults:
            setattr(settings, f.name, defaults[chosen] if value is None else value)
        elif value is None or value in defaults.values():
            setattr(settings, f.name, None)
        else:
            raise UserError(
                f"{section}.{f.name} is set, and {section}.{other} {chosen} does not read it. "
                f"Fix: leave {f.name} out, or choose a {other} that has it."
            )


def _check_readers(f: Any, settings: Any, section: str) -> None:
    default = f.default_factory() if f.default is dataclasses.MISSING and callable(f.default_factory) else f.default
    value = getattr(settings, f.name)
    if value == default:
        return
    for other, readers in f.metadata.get("read_by", {}).items():
        if (chosen := getattr(settings, other)) not in readers:
            shown = f"{value:g}" if isinstance(value, float) else value
            raise UserError(
                f"{section}.{f.name} is {shown}, and {section}.{other} {chosen} does not read it. "
                f"Fix: leave it out, or --{other} {readers[0]}."
            )
