"""What a writer asks of a model, and what it hears: one call, named by its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from llmdistill.datagen.schema import Finish, LogprobsOf, Message
from llmdistill.texts.rollout import Sampling

DRAWN_BY = ("max_new_tokens", "temperature", "top_p", "top_k")


@dataclass(frozen=True)
class Call:
    """One request to one model for one completion.

    Attributes:
        messages: the chat.
        prefix: words the assistant's turn begins with; the model goes on behind them.
        sampling: how it is drawn; its seed is the call's own.
        stop: texts before which the completion ends.
    """

    messages: tuple[Message, ...]
    sampling: Sampling
    prefix: str = ""
    stop: tuple[str, ...] = ()

    @property
    def drawn(self) -> dict[str, Any]:
        """The settings of its sampling, without the seed."""
        return {name: getattr(self.sampling, name) for name in DRAWN_BY}

    def named(self, author: str, seed: int, sample: int, time: int) -> tuple[str, Call]:
        """The call's name and the call with a seed of its own.

        The name is 32 hex digits over all that decides what the answer says: equal for equal calls, in whatever order
        and company they are made.

        Args:
            author: what identifies the model: fingerprint of its weights and hash of its template.
            seed: of the dataset.
            sample: number of the sample of its prompt.
            time: how often the same was asked for this sample before.
        """
        content = [author, list(self.messages), self.prefix, self.drawn, list(self.stop), seed, sample, time]
        text = json.dumps(content, sort_keys=True, ensure_ascii=True)
        name = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        return name, replace(self, sampling=replace(self.sampling, seed=int(name[:16], 16) >> 1, samples_per_prompt=1))


@dataclass(frozen=True)
class Drawn:
    """What an engine says to a call.

    Attributes:
        text: behind the prefix; a thinking tag that the template opened is part of it.
        opened: how many characters of it that tag has.
        tokens, prompt_tokens: 0 where the engine does not say.
        prompt_ids, ids, logprobs, logprobs_of: as in llmdistill.datagen.schema; None where the engine does not say.
    """

    text: str
    finish: Finish
    tokens: int = 0
    prompt_tokens: int = 0
    opened: int = 0
    prompt_ids: Sequence[int] | None = None
    ids: Sequence[int] | None = None
    logprobs: Sequence[float] | None = None
    logprobs_of: LogprobsOf | None = None

    def stored(self) -> dict[str, Any]:
        """For a line of JSON; what is not known is left out."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) not in (None, 0)}

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Drawn:
        """Raises TypeError for what is none."""
        return cls(**stored)


@dataclass(frozen=True)
class Reply:
    """What a writer hears: what was drawn, and by whom."""

    role: str
    model: str
    fingerprint: str
    tokenizer: str | None
    call: Call
    name: str  # of the call
    drawn: Drawn

    @property
    def text(self) -> str:
        """What the model wrote, behind the prefix it was given."""
        return self.drawn.text

    @property
    def finished(self) -> bool:
        """Whether it ended by itself."""
        return self.drawn.finish == "stop"


class Unanswerable(ValueError):
    """A call that no try answers: its prompt is too long for the model, or the endpoint refuses its content."""


def sampled_from(sampling: Sampling) -> LogprobsOf:
    """What processed log-probs are of: those of the model where nothing was processed."""
    return "model" if sampling.plain else "sampling"
