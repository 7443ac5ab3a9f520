"""What generation has cost so far, and what it may."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from llmdistill.datagen.calls import Call, Drawn
from llmdistill.errors import UserError

CHARS_PER_TOKEN = 2.0  # of a prompt that was not counted yet: a bound for most languages
PER = 1_000_000  # tokens that a price is of


@dataclass(frozen=True)
class Price:
    """Of a model, for a million tokens, in whatever currency."""

    prompt: float = 0.0
    completion: float = 0.0

    def of(self, prompt_tokens: float, tokens: float) -> float:
        return (self.prompt * prompt_tokens + self.completion * tokens) / PER

    def most(self, call: Call) -> float:
        """What a call can cost at most."""
        chars = sum(len(message["content"]) for message in call.messages) + len(call.prefix)
        return self.of(chars / CHARS_PER_TOKEN, call.sampling.max_new_tokens)


class Purse:
    """Pays for calls, and lets none begin that could exceed the cap. Of one event loop.

    Args:
        most: cap over the whole dataset, what was spent before an interruption included; 0: none.
    """

    def __init__(self, most: float = 0.0, spent: float = 0.0) -> None:
        self.most, self.spent, self.reserved = most, spent, 0.0
        self._changed = asyncio.Condition()

    async def reserve(self, worst: float) -> None:
        """Returns when a call of that worst cost may begin; calls that are under way may turn out cheaper.

        Raises:
            UserError: none is under way, and it may not.
        """
        async with self._changed:
            while self.most and self.spent + self.reserved + worst > self.most:
                if not self.reserved:
                    raise UserError(
                        f"max_cost is {self.most:g}; {self.spent:.4g} is spent and the next call may cost {worst:.4g}. "
                        "What was paid for is kept. Fix: raise it, then the same command again."
                    )
                await self._changed.wait()
            self.reserved += worst

    async def pay(self, worst: float, price: Price, drawn: Drawn | None) -> None:
        """The call that was reserved has ended; without an answer it cost nothing."""
        async with self._changed:
            self.reserved = max(0.0, self.reserved - worst)
            self.spent += 0.0 if drawn is None else price.of(drawn.prompt_tokens, drawn.tokens)
            self._changed.notify_all()
