"""(arguments, expected value) cases: the answers come as plain data and are compared here, in the judge's process.

No object of the program's is ever stood for here: one request a case, one answer, and a form that is no plain data
equals nothing.
"""

from __future__ import annotations

from typing import Any

from llmdistill.verify.sandbox_literals import arguments, expected_value
from llmdistill.verify.sandbox_wire import Channel, Closed, Codec, Failed, Peer, same


class Opaque:
    """In the place of an object that stayed with the program. Equal to nothing but itself."""

    def __repr__(self) -> str:
        return "an object of the program's own class"


class CaseFailed(Exception):
    """The program raised on a case."""

    def __init__(self, index: int, failure: Failed) -> None:
        super().__init__(index)
        self.index, self.failure = index, failure


def compare_cases(task: dict[str, Any], channel: Channel) -> tuple[bool, str]:
    """Call the program with every case's arguments, until one differs.

    Returns:
        Whether all agree, and what differs (or how many there are).
    Raises:
        CaseFailed: the program raised.
        Closed: it ended, or answers nonsense.
        ValueError: a case's arguments are none (sandbox_literals.arguments).
    """
    peer, codec = Peer(channel, _refuse_request), Codec(_refuse_value, _opaque)
    for index, (given, wanted) in enumerate(task["cases"]):
        positional, named = arguments(given)
        request = ("entry", task["entry_point"], codec.encode(positional), codec.encode(named))
        expected = expected_value(wanted)
        try:
            got = codec.decode(peer.ask(*request))
        except Failed as failure:
            raise CaseFailed(index, failure) from None
        except (Closed, MemoryError):
            raise
        except Exception as problem:  # whatever a form that says nothing runs into
            raise Closed(f"and its answer is no plain data: {type(problem).__name__}: {problem}"[:500]) from None
        if not same(expected, got):
            return False, f"case {index}: expected {_short(expected)}, got {_short(got)}"
    return True, f"{len(task['cases'])} cases"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]}... ({len(text)} characters)"


def _opaque(tag: str, payload: Any) -> Any:
    if tag != "handle":
        raise ValueError(f"unknown kind of value {tag!r}"[:100])
    return Opaque()


def _refuse_value(value: Any) -> dict[str, Any]:
    raise TypeError(f"a {type(value).__name__} is no literal")


def _refuse_request(request: list[Any]) -> Any:
    raise Closed("and asks the judge for something")
