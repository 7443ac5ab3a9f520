"""What stands for the weights of an endpoint, which tells only their name: how likely it finds its own greedy words.

The same few prompts are asked when it is met, when it comes back after an outage, when all calls are answered, and when
a dataset is gone on with: some 100 tokens, which no price counts.
Rounding moves log-probs by thousandths (float32) to hundredths (16 bits, another company in the batch) and may tip a
near tie; other weights move most of them by far more. :data:`NATS` is between the two: a checkpoint that is nearer to
the one before than that is taken for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

NAMED = "name:"  # before the name of an endpoint's model, in place of a fingerprint
PROMPTS = ("Write one sentence about the sea.", "Count from one to twelve, in words.")
TOKENS = 16  # of each answer
NATS = 0.1  # mean difference of log-probs, from which on they are other weights
SLACK = 0.1  # above 1, of the probabilities of two tokens in one distribution, each as another run gave it


@dataclass(frozen=True)
class Probe:
    """The greedy tokens of each prompt, and their log-probs."""

    tokens: list[list[str]]
    logprobs: list[list[float]]

    def stored(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Probe:
        """Raises TypeError for what is none."""
        return cls(**stored)

    def other(self, now: Probe) -> str:
        """In which way another probe is of other weights; empty where it may be of these."""
        found = list[float]()
        for then_and_now in zip(self.tokens, self.logprobs, now.tokens, now.logprobs, strict=True):
            for token, logprob, token_now, logprob_now in _compared(*then_and_now):
                found.append(abs(logprob - logprob_now))
                if token != token_now and math.exp(logprob) + math.exp(logprob_now) > 1 + SLACK:
                    return f"where it was sure of {token!r} it is now sure of {token_now!r}"
        mean = sum(found) / max(len(found), 1)
        return f"log-probs of its own words are {mean:.2f} nats off in the mean" if mean > NATS else ""


def _compared(
    tokens: list[str], logprobs: list[float], tokens_now: list[str], logprobs_now: list[float]
) -> Iterator[tuple[str, float, str, float]]:
    """Place by place, up to the first where the words part: behind it they stand behind different words."""
    for place in zip(tokens, logprobs, tokens_now, logprobs_now, strict=False):
        yield place
        if place[0] != place[2]:
            return


def body(model: str, prompt: str, more: Mapping[str, Any]) -> bytes:
    """The request."""
    asked = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": TOKENS}
    return json.dumps({**asked, "temperature": 0, "logprobs": True, **more}).encode()


def read_answer(answer: Mapping[str, Any]) -> tuple[list[str], list[float]] | None:
    """Tokens and log-probs of an answer; None where it has none.

    Raises:
        LookupError, TypeError, ValueError: it is no answer.
    """
    listed = (answer["choices"][0].get("logprobs") or {}).get("content")
    if not listed:
        return None
    return [str(entry["token"]) for entry in listed], [round(float(entry["logprob"]), 5) for entry in listed]
