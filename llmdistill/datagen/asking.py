"""``ask(role, messages, sampling)``: one call to a model, content-hashed, cached on disk and resumable by itself."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmdistill.datagen.call_store import CallStore
from llmdistill.datagen.calls import Call, Drawn, Reply, Unanswerable
from llmdistill.datagen.engines.base import Engine
from llmdistill.datagen.roles import Role
from llmdistill.datagen.schema import Message, as_messages, digest
from llmdistill.datagen.spending import Purse
from llmdistill.errors import UserError
from llmdistill.texts.rollout import Sampling

FIRST_IN_FLIGHT = 4  # calls, before an engine says how many it likes
REFUSED_AT_LEAST = 20  # calls, before a share of them says anything


@dataclass
class Asked:
    """What was asked so far, for the progress line and the manifest."""

    calls: int = 0  # answered by a model in this process's life
    kept: int = 0  # answered from the folder
    tokens: int = 0
    prompt_tokens: int = 0
    refused: int = 0


class Desk:
    """Where calls of all writers come together: looked up, paid for, asked, kept.

    Args:
        roles: name -> model. An engine is opened when its role is first asked.
        store: of the answers.
        seed: of the dataset.
        most_cost: see :class:`~llmdistill.datagen.spending.Purse`.
        most_refused: share of the calls that may be refused before all stop: what is wrong with all of them is no
            fault of a row.
        replay: every call is there already; one that is not is a fault of the writer.
    """

    def __init__(
        self,
        roles: Mapping[str, Role],
        store: CallStore,
        *,
        seed: int,
        most_cost: float = 0.0,
        most_refused: float = 1.0,
        replay: bool = False,
    ) -> None:
        self.roles, self.store, self.seed, self.replay = roles, store, seed, replay
        self.most_refused = most_refused
        self.asked = Asked()
        tokens = store.tokens() if any(role.price.of(1, 1) for role in roles.values()) else {}
        self.purse = Purse(most_cost, sum(roles[name].price.of(*t) for name, t in tokens.items() if name in roles))
        self._identities = {name: digest(role.identity) for name, role in roles.items()}
        self._engines: dict[str, Engine] = {}

    def role(self, name: str) -> Role:
        """Raises UserError for a role that nobody has."""
        if name not in self.roles:
            raise UserError(
                f"the writer asks for {name!r}, and the roles are {', '.join(self.roles)}. Fix: --{name} MODEL_OR_URL."
            )
        return self.roles[name]

    async def answer(self, name: str, call: Call, sample: int, time: int) -> Reply:
        """Of a role, from the folder where it is there.

        Raises:
            Unanswerable: no try helps.
            UserError: the model is gone, the cap of costs is reached, the disk is full.
        """
        role = self.role(name)
        key, call = call.named(self._identities[name], self.seed, sample, time)
        drawn = self.store.get(key)
        if drawn is not None:
            self.asked.kept += 1
        elif self.replay:
            if (refused := self.store.refusal(key)) is not None:
                raise Unanswerable(refused)
            raise UserError(
                "the writer asks something else than it did the first time. Fix: a writer that is a function of the "
                "row and of what it hears (random numbers from the row's id, no clock)."
            )
        else:
            drawn = await self._draw(role, name, key, call)
        return Reply(name, role.model, role.fingerprint, role.tokenizer, call, key, drawn)

    def in_flight(self) -> int:
        """Calls worth having under way at one time, of all engines that are open; few before any is."""
        return max([engine.in_flight for engine in self._engines.values()], default=FIRST_IN_FLIGHT)

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()

    async def _draw(self, role: Role, name: str, key: str, call: Call) -> Drawn:
        worst = role.price.most(call)
        await self.purse.reserve(worst)
        drawn: Drawn | None = None
        try:
            drawn = await asyncio.wrap_future(self._engine(name, role).submit(call))
            self.store.put(key, drawn, role=name)
        except Unanswerable as reason:
            self.asked.refused += 1
            self.store.put(key, role=name, refused=str(reason))
            self._check_refused(name, str(reason))
            raise
        finally:
            await self.purse.pay(worst, role.price, drawn)
        self.asked.calls += 1
        self.asked.tokens += drawn.tokens
        self.asked.prompt_tokens += drawn.prompt_tokens
        return drawn

    def _check_refused(self, name: str, reason: str) -> None:
        refused, calls = self.asked.refused, self.asked.refused + self.asked.calls
        if refused >= REFUSED_AT_LEAST and refused > self.most_refused * calls:
            raise UserError(
                f"{refused} of {calls} calls were refused, more than the share {self.most_refused:g} that may be; the "
                f"last one of {name!r}: {reason}. Fix: the role's settings, or raise max_rejected."
            )

    def _engine(self, name: str, role: Role) -> Engine:
        """Opened when it is first asked. Roles that are one model share it."""
        whose = self._identities[name]
        if whose not in self._engines:
            self._engines[whose] = role.engine()
        return self._engines[whose]


class Ask:
    """What a writer is given for one sample of one row: ``await ask("teacher", messages)``.

    Attributes:
        sample: number of the sample, from 0.
        sampling: how this sample is drawn, where a call does not say otherwise.
        roles: the names that may be asked.
        options: of the writer.
    """

    def __init__(self, desk: Desk, sample: int, sampling: Sampling, options: Mapping[str, Any] | None = None) -> None:
        self._desk, self.sample, self.sampling = desk, sample, sampling
        self.options = dict(options or {})
        self._times = Counter[str]()

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(self._desk.roles)

    async def __call__(
        self,
        role: str,
        messages: str | Sequence[Message],
        sampling: Sampling | None = None,
        *,
        prefix: str = "",
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> Reply:
        """One completion. Equal calls of one sample are different draws; those of a resumed run are the same ones.

        Args:
            messages: the chat, or a user's text.
            prefix: words the answer begins with.
            max_new_tokens: in place of the sampling's.

        Raises:
            Unanswerable: the prompt is too long, or the endpoint refuses it. The sample is rejected, with the reason.
        """
        drawn_by = sampling or self.sampling
        if max_new_tokens is not None:
            drawn_by = replace(drawn_by, max_new_tokens=max_new_tokens)
        call = Call(tuple(as_messages(messages)), replace(drawn_by, seed=0), prefix, tuple(stop))
        same = digest([role, call.messages, prefix, call.drawn, call.stop])
        time = self._times[same]
        self._times[same] += 1
        return await self._desk.answer(role, call, self.sample, time)
