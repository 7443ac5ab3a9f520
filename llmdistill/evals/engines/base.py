"""What an evaluation asks of an engine, and the settings that make one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, Protocol

from llmdistill.evals.records import Sample
from llmdistill.texts.rollout import Sampling

EngineName = Literal["vllm", "hf", "diffusion", "openai", "remote"]


@dataclass(frozen=True)
class Asked:
    """One sample to be drawn: sample ``index`` of a problem, with a seed of its own.

    Attributes:
        messages: the chat, for endpoints that apply their own template.
        prefill: words the assistant has begun with.
        text, ids: the rendered prompt; empty for such endpoints.
        room: the most new tokens; less than asked for where the prompt takes too much of the context; 0: as many as
            there is room for, where an endpoint knows that and we do not.
        opened: the thinking tag that the chat template wrote as the assistant's first word, "" if it did not.
    """

    problem: str
    index: int
    seed: int
    messages: tuple[dict[str, str], ...]
    text: str = ""
    ids: tuple[int, ...] = ()
    prefill: str = ""
    room: int = 0
    opened: str = ""

    def sample(self, text: str, tokens: int, finish: str, stop: Sequence[str] = ()) -> Sample:
        """The record of what was drawn. Text from the first stop string on is cut off, which ends it properly.

        A thinking tag that the template opened is part of it: without the tag, thoughts that never ended would be
        judged as an answer.
        """
        ends = [at for word in stop if (at := text.find(word)) >= 0]
        if ends:
            text, finish = text[: min(ends)], "stop"
        text = self.opened + text
        return Sample(
            self.problem, self.index, text, tokens, "length" if finish == "length" else "stop", seed=self.seed
        )


class Engine(Protocol):
    """Draws samples. Results come as they are finished, in any order."""

    def draw(self, asked: Sequence[Asked], sampling: Sampling, stop: Sequence[str]) -> Iterator[Sample]:
        """One sample for each of ``asked``; ``sampling.samples_per_prompt`` and ``sampling.seed`` are not used.

        Raises:
            UserError: the engine cannot go on. What was yielded before stands.
        """
        ...

    def close(self) -> None: ...


def batches(asked: Sequence[Asked], size: int) -> Iterator[list[Asked]]:
    """Batches of at most ``size``, longest prompts first (what does not fit fails at once).

    All of a batch have one length limit: what a sample may write must not depend on its company.
    """
    ordered = sorted(asked, key=lambda one: (-one.room, -len(one.ids)))
    for _, alike in groupby(ordered, key=lambda one: one.room):
        rest = list(alike)
        for start in range(0, len(rest), size):
            yield rest[start : start + size]


def sample_seed(seed: int, problem: str, index: int) -> int:
    """Of one sample: the same in whatever order and company, and in a run that is resumed."""
    digest = hashlib.blake2b(f"{seed}:{problem}:{index}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
