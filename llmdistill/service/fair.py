"""Whose request is next: one service, several trainers of many ranks each, and none of them starves.

Every client has a counter of the tokens it was served, and the one with the smallest is next: the virtual token counter
of "Fairness in Serving Large Language Models" (arXiv 2401.00588, algorithm 2). Who comes back after a while starts no
lower than the others less a bounded credit, so that nobody saves up; who was sent away keeps its place in that order.
Where there is no room for one more, the request that would be served last goes, whether it is the newcomer or not: a
client with a hundred waiting does not shut out one that has none.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from contextvars import ContextVar
from dataclasses import dataclass, field

CLIENT: ContextVar[str] = ContextVar("client", default="")  # who asks, in the task of a request and those it starts
MOST_CLIENTS = 4096  # that are remembered


@dataclass(eq=False)
class Place:
    """One request in the queue, and afterwards at work."""

    client: str
    tokens: int  # that it is expected to cost
    ready: asyncio.Future[None]  # done when it is its turn
    taken: bool = False  # it is at work
    out: bool = False  # another one has its place
    used: int | None = None  # what it did cost; None: as expected


@dataclass(eq=False)
class _Client:
    served: float = 0.0  # tokens
    turn: int = 0  # when it was served last: of several with as many tokens that one waits which was
    waiting: deque[Place] = field(default_factory=deque)
    queued: int = 0  # tokens of those


class FairQueue:
    """Requests that wait for the engine.

    Args:
        credit: tokens that a client may be behind the others and catch up with.
    """

    def __init__(self, credit: float) -> None:
        self.credit = credit
        self._clients: OrderedDict[str, _Client] = OrderedDict()
        self._turn = 0
        self._now = 0.0  # the counter of whoever was served last

    def join(self, place: Place) -> None:
        client = self._known(place.client)
        client.waiting.append(place)
        client.queued += place.tokens

    def first(self) -> Place | None:
        """The next to be served."""
        waiting = self._waiting()
        return min(waiting, key=lambda c: (c.served, c.turn)).waiting[0] if waiting else None

    def last(self) -> Place | None:
        """The one that would be served last."""
        waiting = self._waiting()
        return max(waiting, key=lambda c: c.served + c.queued - c.waiting[-1].tokens).waiting[-1] if waiting else None

    def comes_before(self, name: str, place: Place) -> bool:
        """Whether another request of that client would be served before ``place``, which is the last of its own."""
        client, other = self._known(name), self._clients[place.client]
        return client is not other and client.served + client.queued < other.served + other.queued - place.tokens

    def take(self, place: Place) -> None:
        """It is at work."""
        self.leave(place)
        client = self._clients[place.client]
        self._now = max(self._now, client.served)
        self._turn += 1
        client.served, client.turn = client.served + place.tokens, self._turn
        place.taken = True

    def leave(self, place: Place) -> None:
        """It waits no longer."""
        client = self._clients[place.client]
        client.waiting.remove(place)
        client.queued -= place.tokens

    def settle(self, place: Place) -> None:
        """What it was expected to cost becomes what it did."""
        if place.used is not None and (client := self._clients.get(place.client)) is not None:
            client.served += place.used - place.tokens

    def _waiting(self) -> list[_Client]:
        return [client for client in self._clients.values() if client.waiting]

    def _known(self, name: str) -> _Client:
        floor = min((client.served for client in self._waiting()), default=self._now)
        client = self._clients.get(name)
        if client is None:
            client = self._clients[name] = _Client(floor)
            self._forget()
        elif not client.waiting:
            client.served = max(client.served, floor - self.credit)
        self._clients.move_to_end(name)
        return client

    def _forget(self) -> None:
        """Of more clients than are remembered, those go that have not come for the longest time."""
        excess = len(self._clients) - MOST_CLIENTS
        for name in [n for n, client in self._clients.items() if not client.waiting][: max(excess, 0)]:
            del self._clients[name]
