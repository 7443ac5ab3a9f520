"""Values between the process that runs the tests and the one that runs the program: plain data only, never pickle.

Each message is a length and JSON. JSON's own types stand for themselves; a JSON object {tag: payload} stands for every
other type that both sides know. Decoding builds exact builtin types (and numpy's, datetime's, ...) whatever the sender
meant, so a program cannot hand over an object of a class of its own. Objects that are no plain data stay where they
are and travel as numbers: ``outside`` and ``inside`` turn them into numbers and back.
"""

from __future__ import annotations

import base64
import builtins
import collections
import datetime
import decimal
import fractions
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

LARGEST_MESSAGE = 1 << 29  # bytes
_SMALL_INT = 1 << 62
_AS_THEY_ARE = {type(None), bool, str, float}
_DECODED = _AS_THEY_ARE | {int}
_KINDS: tuple[type[Any], ...] = (datetime.date, datetime.time, datetime.datetime, datetime.timedelta)
_DATES = {kind.__name__: kind for kind in _KINDS}
# Types that may travel as themselves (`candidate(int)`, a function that returns a type), by name.
_TYPES = {
    name: kind
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and not issubclass(kind, BaseException) and kind is not type
}
_CONTAINERS: tuple[Callable[[Any], Any], ...] = (list, tuple, dict, set, frozenset, bytes)
_TYPE_NAMES = {kind: name for name, kind in _TYPES.items()}


_MRO, _NAME = type.__dict__["__mro__"].__get__, type.__dict__["__name__"].__get__
_ERRNO = OSError.__dict__["errno"].__get__


class Closed(Exception):
    """The other process is gone or does not speak the protocol."""


def read_exactly(fd: int, size: int) -> bytes:
    """Raises Closed at the end of the file."""
    parts, missing = [], size
    while missing:
        part = os.read(fd, min(missing, 1 << 20))
        if not part:
            raise Closed
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def write_all(fd: int, data: bytes) -> None:
    """Raises Closed where nobody reads."""
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except BrokenPipeError:
        raise Closed from None


def read_whole(fd: int, limit: int = 1 << 30) -> bytes:
    """A memory file's content, wherever its position is."""
    size = min(os.fstat(fd).st_size, limit)
    parts, at = [], 0
    while at < size:
        part = os.pread(fd, min(size - at, 1 << 24), at)
        if not part:
            break
        parts.append(part)
        at += len(part)
    return b"".join(parts)


class Channel:
    """JSON messages over two pipe ends."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self.read_fd, self.write_fd = read_fd, write_fd
        self._dumps = json.JSONEncoder(check_circular=False, separators=(",", ":")).encode
        self._loads = json.JSONDecoder().decode

    def send(self, message: Any) -> None:
        data = self._dumps(message).encode()
        write_all(self.write_fd, len(data).to_bytes(8, "little") + data)

    def receive(self) -> Any:
        """Raises Closed, and ValueError or RecursionError for what is no message."""
        size = int.from_bytes(read_exactly(self.read_fd, 8), "little")
        if size > LARGEST_MESSAGE:
            raise Closed(f"a message of {size} bytes; {LARGEST_MESSAGE} are allowed")
        return self._loads(read_exactly(self.read_fd, size).decode())


class Failed(Exception):
    """What the other side's code raised: names of its classes (nearest first), message, errno or None."""

    def __init__(self, classes: list[str], message: str, number: int | None) -> None:
        super().__init__(message)
        self.classes, self.message, self.number = classes, message, number


class Peer:
    """Requests over a channel, answered in turn; the one who answers may ask back before it does.

    Args:
        serve: answers the other side's request; what it raises travels back as Failed.
    """

    def __init__(self, channel: Channel, serve: Callable[[list[Any]], Any]) -> None:
        self.channel, self.serve = channel, serve

    def ask(self, *request: Any) -> Any:
        """Raises Failed with what the other side raised, Closed when it is gone."""
        self.channel.send(["?", list(request)])
        return self.listen()

    def listen(self) -> Any:
        """Answer requests until a reply arrives."""
        while True:
            mark, *rest = self.channel.receive()
            if mark == "=":
                return rest[0]
            if mark == "!":
                raise Failed([str(name) for name in rest[0]], str(rest[1]), rest[2] if type(rest[2]) is int else None)
            if mark != "?":
                raise Closed(f"a message of kind {mark!r}"[:100])
            self._answer(rest[0])

    def _answer(self, request: list[Any]) -> None:
        try:
            reply: list[Any] = ["=", self.serve(request)]
        except Closed:
            raise
        except BaseException as error:  # a program may raise SystemExit: it ends the call, not this process
            reply = ["!", *describe_exception(error)]
        try:
            self.channel.send(reply)
        except (RecursionError, MemoryError, UnicodeError) as error:
            self.channel.send(["!", *describe_exception(error)])


def describe_exception(error: BaseException) -> tuple[list[str], str, int | None]:
    """Names of the classes it belongs to, message (at most 2,000 characters), errno. Never raises, whatever the
    error's class does when it is looked at."""
    kinds = _MRO(type(error))  # not type(error).__mro__, which a metaclass may define
    classes = [_NAME(kind) for kind in kinds[:64]]
    try:
        text = str(error)
        message = str.__getitem__(text, slice(0, 2000)) if type(text) is str else "<its message is no text>"
    except BaseException:
        message = "<its message cannot be shown>"
    if kinds[0] is not vars(builtins).get(classes[0]):
        message = f"{classes[0]}: {message}"
    number = _ERRNO(error) if OSError in kinds else None
    return classes, message, number if type(number) is int else None


class Codec:
    """Values to what JSON can say and back.

    Args:
        outside: gives the tagged form {tag: ...} of an object that is no plain data; raises TypeError to refuse.
        inside: gives the object of such a form, (tag, payload).
    """

    def __init__(self, outside: Callable[[Any], dict[str, Any]], inside: Callable[[str, Any], Any]) -> None:
        self.outside, self.inside = outside, inside

    def encode(self, value: Any) -> Any:
        kind = type(value)
        if value is None or kind is bool or kind is str or kind is float:
            return value
        if kind is int:
            return value if -_SMALL_INT < value < _SMALL_INT else {"i": hex(value)}
        if kind is list:
            return self._encode_list(value)
        special = _ENCODERS.get(kind)
        if special is not None:
            return special(self, value)
        return self._encode_kin(value)

    def _encode_list(self, value: list[Any]) -> Any:
        kinds = set(map(type, value))
        if kinds <= _AS_THEY_ARE or (kinds == {int} and min(value) > -_SMALL_INT and max(value) < _SMALL_INT):
            return value
        if kinds == {tuple}:  # a dictionary for each of a million pairs would be most of the memory
            if len(value) > 1000 and (pooled := self._pooled(value)) is not None:
                return pooled
            return {"tuples": [self._encode_list(list(item)) for item in value]}
        return [self.encode(item) for item in value]

    def _pooled(self, value: list[tuple[Any, ...]]) -> dict[str, Any] | None:
        """Combinations of a few things: the things once and a byte for each place, a tenth of the memory. (The tests
        of Mbpp/255 compare 120 million places.) None where that does not fit."""

        def flat(part: list[tuple[Any, ...]]) -> Iterable[Any]:
            return itertools.chain.from_iterable(part)

        if len({id(item) for item in flat(value[:1000])}) > 255:
            return None
        pool = dict(zip(map(id, flat(value)), flat(value), strict=True))
        if len(pool) > 255 or not set(map(type, pool.values())) <= _DECODED:
            return None
        index = {key: i for i, key in enumerate(pool)}
        places = bytes(map(index.__getitem__, map(id, flat(value))))
        return {"pooled": [self.encode(list(pool.values())), list(map(len, value)), base64.b64encode(places).decode()]}

    def _encode_kin(self, value: Any) -> Any:
        """A subclass of a plain type counts as that type: a Counter is a dict, an IntEnum member an int."""
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, numpy.ndarray):
            if value.dtype.kind in "biufcSU":
                packed = base64.b64encode(numpy.ascontiguousarray(value).tobytes()).decode()
                return {"array": [value.dtype.str, list(value.shape), packed]}
            return self.encode(value.tolist())
        if numpy is not None and isinstance(value, numpy.generic) and value.dtype.kind in "biufc":
            return {"scalar": [value.dtype.str, base64.b64encode(value.tobytes()).decode()]}
        if isinstance(value, type) and value in _TYPE_NAMES:
            return {"type": _TYPE_NAMES[value]}
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, int):
            return self.encode(int.__int__(value))
        if isinstance(value, float):
            return float.__float__(value)
        for base in _CONTAINERS:
            if isinstance(value, base):  # type: ignore[arg-type]
                return self.encode(base(value))
        return self.outside(value)

    def decode(self, form: Any) -> Any:
        """Raises ValueError, TypeError and the like for forms that say nothing."""
        if type(form) is list:
            return list(form) if set(map(type, form)) <= _DECODED else [self.decode(item) for item in form]
        if type(form) is not dict:
            return form
        ((tag, payload),) = form.items()
        special = _DECODERS.get(tag)
        return special(self, payload) if special is not None else self.inside(tag, payload)

    def decode_all(self, forms: Iterable[Any]) -> list[Any]:
        return [self.decode(form) for form in forms]


def _items(tag: str) -> Callable[[Codec, Any], Any]:
    return lambda codec, value: {tag: [codec.encode(item) for item in value]}


def _encode_date(codec: Codec, value: Any) -> Any:
    name = type(value).__name__
    if name == "timedelta":
        return {"date": [name, value.days, value.seconds, value.microseconds]}
    if getattr(value, "tzinfo", None) is not None:
        return codec.outside(value)
    fields = {"date": ("year", "month", "day"), "time": ("hour", "minute", "second", "microsecond")}
    names = fields["date"] + fields["time"] if name == "datetime" else fields[name]
    return {"date": [name, *(getattr(value, field) for field in names)]}


_ENCODERS: dict[type, Callable[[Codec, Any], Any]] = {
    tuple: lambda c, value: {"tuple": c._encode_list(list(value))},
    set: _items("set"),
    frozenset: _items("frozenset"),
    collections.deque: _items("deque"),
    dict: lambda c, value: {"dict": [[c.encode(k), c.encode(v)] for k, v in value.items()]},
    bytes: lambda c, value: {"bytes": value.decode("latin-1")},
    bytearray: lambda c, value: {"bytearray": value.decode("latin-1")},
    complex: lambda c, value: {"complex": [value.real, value.imag]},
    range: lambda c, value: {"range": [c.encode(n) for n in (value.start, value.stop, value.step)]},
    decimal.Decimal: lambda c, value: {"decimal": str(value)},
    fractions.Fraction: lambda c, value: {"fraction": [c.encode(value.numerator), c.encode(value.denominator)]},
    type(...): lambda c, value: {"ellipsis": 0},
    **{kind: _encode_date for kind in _DATES.values()},
}


def _unpooled(codec: Codec, payload: Any) -> Any:
    pool, lengths, packed = payload
    things = iter(map(codec.decode(pool).__getitem__, base64.b64decode(packed)))
    return [tuple(itertools.islice(things, int(length))) for length in lengths]


def _array(codec: Codec, payload: Any) -> Any:
    import numpy

    dtype, shape, packed = payload
    kind = numpy.dtype(str(dtype))
    if kind.kind not in "biufcSU" or kind.hasobject:
        raise ValueError(f"an array of {kind}")
    return numpy.frombuffer(base64.b64decode(packed), dtype=kind).reshape([int(n) for n in shape]).copy()


def _scalar(codec: Codec, payload: Any) -> Any:
    import numpy

    kind = numpy.dtype(str(payload[0]))
    if kind.kind not in "biufc":
        raise ValueError(f"a number of {kind}")
    return numpy.frombuffer(base64.b64decode(payload[1]), dtype=kind)[0]


_DECODERS: dict[str, Callable[[Codec, Any], Any]] = {
    "i": lambda c, p: int(p, 16),
    "tuple": lambda c, p: tuple(c.decode(p)),
    "tuples": lambda c, p: [tuple(c.decode(form)) for form in p],
    "set": lambda c, p: set(c.decode_all(p)),
    "frozenset": lambda c, p: frozenset(c.decode_all(p)),
    "deque": lambda c, p: collections.deque(c.decode_all(p)),
    "dict": lambda c, p: {c.decode(k): c.decode(v) for k, v in p},
    "bytes": lambda c, p: p.encode("latin-1"),
    "bytearray": lambda c, p: bytearray(p.encode("latin-1")),
    "complex": lambda c, p: complex(*map(float, p)),
    "pooled": _unpooled,
    "range": lambda c, p: range(*map(int, c.decode_all(p))),
    "decimal": lambda c, p: decimal.Decimal(str(p)),
    "fraction": lambda c, p: fractions.Fraction(*map(int, c.decode_all(p))),
    "ellipsis": lambda c, p: ...,
    "date": lambda c, p: _DATES[p[0]](*map(int, p[1:])),  # text would be taken for a pickled state, unchecked
    "array": _array,
    "scalar": _scalar,
    "type": lambda c, p: _TYPES[p],
}


def same(expected: Any, got: Any, relative: float = 1e-6, absolute: float = 1e-6) -> bool:
    """Equality of plain data: sequences item by item whether list or tuple, numbers within a tolerance where one of
    them is a float, NaN never."""
    if isinstance(expected, list | tuple) and isinstance(got, list | tuple):
        return len(expected) == len(got) and all(same(a, b) for a, b in zip(expected, got, strict=True))
    if isinstance(expected, dict) and isinstance(got, dict):
        return expected.keys() == got.keys() and all(same(value, got[key]) for key, value in expected.items())
    if isinstance(expected, float) or isinstance(got, float):
        if not (isinstance(expected, int | float) and isinstance(got, int | float)):
            return False
        try:
            return expected == got or math.isclose(expected, got, rel_tol=relative, abs_tol=absolute)
        except OverflowError:  # an int that no float holds
            return False
    return type(expected) in (type(got), bool, int) and bool(expected == got)
