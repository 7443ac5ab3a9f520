"""A chat endpoint whose answers are a function of what it is asked: right, wrong or cut off, as the seed has it.

It stands behind tests.service.faulty.Faulty, which breaks what goes over the wire. What it was asked is kept, so that a
test can see what was asked twice.
"""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections import Counter
from typing import Any

from llmdistill.datagen.engines.endpoint import CHAT, MODELS
from llmdistill.datagen.engines.probe import PROMPTS as PROBES
from tests.service.faulty import Faulty, _write
from tests.service.small import Answer, Seen, error

PROMPTS = [{"prompt": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(2, 8) for b in range(3, 7)]


class ChatEndpoint:
    """Attributes may be changed while it runs.

    Args:
        vllm: it tells its context, and gives token ids and log-probs, as vLLM does.
    """

    def __init__(self, name: str = "adder", *, vllm: bool = True) -> None:
        self.name, self.vllm, self.root, self.system = name, vllm, name, ""
        self.weights = 0  # others give other log-probs under the same name
        self.tells = True  # log-probs, to the probes
        self.refused = ""  # calls whose last message holds this are answered with HTTP 400
        self.delay_s = 0.0  # before an answer, so that a test can catch it in between
        self.extra_choices = 0  # answers that have a choice too many, from now on
        self.seeds = Counter[int]()  # of the calls that were answered
        self.bodies: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def answer(self, seen: Seen) -> Answer:
        if seen.path == MODELS:
            card = {"id": self.name, "root": self.root, "max_model_len": 4096 if self.vllm else None}
            return Answer(200, json.dumps({"data": [card]}).encode())
        if seen.path != CHAT or seen.method != "POST":
            return error(404, "no such path")
        body = json.loads(seen.body)
        if is_probe(seen):
            return Answer(200, json.dumps({"choices": [self._probed(body["messages"][0]["content"])]}).encode())
        time.sleep(self.delay_s)
        if self.refused and self.refused in body["messages"][-1]["content"]:
            return error(400, "this is not answered")
        with self._lock:
            self.seeds[body["seed"]] += 1
            self.bodies.append(body)
            choices = [self._choice(body)] * (2 if self.extra_choices > 0 else 1)
            self.extra_choices -= 1
        usage = {"prompt_tokens": 7, "completion_tokens": len(choices[0]["message"]["content"].split())}
        found = {"choices": choices, "usage": usage, "system_fingerprint": self.system or None}
        return Answer(200, json.dumps({**found, **({"prompt_token_ids": [1, 2, 3]} if self.vllm else {})}).encode())

    def _probed(self, prompt: str) -> dict[str, Any]:
        """A word at a time, with noise as another batch would make it."""
        drawn, noise = random.Random(f"{self.weights} {prompt}"), random.Random()
        entries = [{"token": w, "logprob": -1.5 * drawn.random() + noise.gauss(0, 0.02)} for w in prompt.split()]
        choice = {"message": {"content": prompt}, "finish_reason": "length"}
        return {**choice, **({"logprobs": {"content": entries}} if self.tells else {})}

    def _choice(self, body: dict[str, Any]) -> dict[str, Any]:
        drawn = random.Random(f"{body['seed']} {body['messages']}")
        numbers = [int(x) for x in re.findall(r"\d+", body["messages"][0]["content"])[:2]]
        total = sum(numbers) + (0 if drawn.random() < 0.6 else drawn.choice([-1, 1, 10]))
        words = f"Adding {' and '.join(map(str, numbers))} gives {total}. The answer is \\boxed{{{total}}}.".split()
        if body.get("continue_final_message"):
            words = words[len(words) // 2 :]
        end = "stop"
        if drawn.random() < 0.15 or len(words) > body["max_tokens"]:
            words, end = words[: min(body["max_tokens"], 5)], "length"
        choice: dict[str, Any] = {"message": {"content": " ".join(words)}, "finish_reason": end}
        if body.get("logprobs"):
            choice["logprobs"] = {"content": [{"logprob": -round(drawn.random(), 4)} for _ in words]}
            choice["token_ids"] = [len(word) for word in words]
        return choice


def is_probe(seen: Seen) -> bool:
    return seen.method == "POST" and json.loads(seen.body)["messages"][0]["content"] in PROBES


class _Served(Faulty):
    """Its faults are those of the calls."""

    async def _respond(self, seen: Seen, writer: Any) -> bool:
        if is_probe(seen):
            await _write(writer, await self._answer(seen))
            return True
        return await super()._respond(seen, writer)


def served(endpoint: ChatEndpoint, **options: Any) -> Faulty:
    """The endpoint on a port of its own. It keeps no answers, as no endpoint does."""
    server = _Served(small=endpoint, **options)
    server.keeps = False
    return server
