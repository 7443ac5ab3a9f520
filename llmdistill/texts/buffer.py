"""A bounded memory of sequences the student wrote, to be trained on again (DistiLLM, arXiv 2402.03898, section 3.2)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from llmdistill.texts.rollout import Finish, Prompt, Reading, Rollout, collate


@dataclass(frozen=True)
class Sample:
    """One completion as it was drawn."""

    prompt: Prompt
    completion: list[int]
    logprobs: list[float] | None  # of its tokens, under the policy that drew them
    finish: Finish | None
    policy_version: int  # optimizer step of that policy


class ReplayBuffer:
    """Keeps the newest ``capacity`` samples; the oldest leave first.

    Args:
        capacity: samples of this process.

    Raises:
        ValueError: capacity < 1.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}; a buffer holds at least one sample")
        self.capacity = capacity
        self.samples: list[Sample] = []

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def full(self) -> bool:
        return len(self.samples) >= self.capacity

    def add(self, rollout: Rollout, prompts: Sequence[Prompt]) -> None:
        """Every sequence of ``rollout``; ``prompts`` has one for each."""
        for b, prompt in enumerate(prompts):
            start, end = len(prompt.ids), int(rollout.attention_mask[b].sum())
            behavior_logprobs = rollout.behavior_logprobs
            self.samples.append(
                Sample(
                    prompt,
                    rollout.input_ids[b, start:end].tolist(),
                    None if behavior_logprobs is None else behavior_logprobs[b, start:end].tolist(),
                    rollout.finish[b] if rollout.finish else None,
                    rollout.policy_version,
                )
            )
        del self.samples[: -self.capacity]

    def draw(self, n: int, seed: int, pad_id: int) -> tuple[Rollout, list[Prompt]]:
        """``n`` samples at random (without repetition while there are enough) and their prompts.

        ``policy_version`` is the oldest of theirs: staleness is what it can be at most.
        """
        random_ = random.Random(seed)
        samples = random_.sample(self.samples, n) if n <= len(self) else random_.choices(self.samples, k=n)
        logprobs = [s.logprobs for s in samples]
        rollout = collate(
            [s.prompt.ids for s in samples],
            [s.completion for s in samples],
            pad_id=pad_id,
            behavior_logprobs=None if None in logprobs else [lp for lp in logprobs if lp is not None],
            finish=[s.finish for s in samples if s.finish is not None] if all(s.finish for s in samples) else (),
            domain=[s.prompt.domain for s in samples],
            policy_version=min(s.policy_version for s in samples),
        )
        return rollout, [s.prompt for s in samples]

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: ids and log-probs end to end as tensors, 8 bytes a token, and what else a sample has."""
        samples = self.samples
        return {
            "ids": torch.tensor([i for s in samples for i in (*s.prompt.ids, *s.completion)], dtype=torch.int32),
            "lengths": [(len(s.prompt.ids), len(s.completion)) for s in samples],
            "logprobs": torch.tensor([x for s in samples for x in s.logprobs or ()]),
            "drawn": [s.logprobs is not None for s in samples],
            "finish": [s.finish for s in samples],
            "policy_version": [s.policy_version for s in samples],
            "prompts": [prompt_state(replace(s.prompt, ids=[])) for s in samples],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.samples, ids, logprobs = [], state["ids"].tolist(), state["logprobs"].tolist()
        offset = logprobs_offset = 0
        for k, (prompt, completion) in enumerate(state["lengths"]):
            completion_ids = ids[offset + prompt : offset + prompt + completion]
            behavior_logprobs = logprobs[logprobs_offset : logprobs_offset + completion] if state["drawn"][k] else None
            logprobs_offset += completion if behavior_logprobs is not None else 0
            self.samples.append(
                Sample(
                    prompt_of({**state["prompts"][k], "ids": ids[offset : offset + prompt]}),
                    completion_ids,
                    behavior_logprobs,
                    state["finish"][k],
                    state["policy_version"][k],
                )
            )
            offset += prompt + completion

    def take_share(self, states: Sequence[dict[str, Any]], rank: int, world: int) -> None:
        """Of what several buffers held, from the oldest on, every ``world``-th sample beginning with the ``rank``-th;
        the newest of them where they are more than this one holds."""
        every = list[Sample]()
        for state in states:
            held = ReplayBuffer(self.capacity)
            held.load_state_dict(state)
            every += held.samples
        every.sort(key=lambda sample: sample.policy_version)  # stable: of one step by rank
        self.samples = every[rank::world][-self.capacity :]


def prompt_state(prompt: Prompt) -> dict[str, Any]:
    """A prompt as plain data, without the row it was read from."""
    return asdict(replace(prompt, record=None))


def prompt_of(state: dict[str, Any]) -> Prompt:
    """The prompt of :func:`prompt_state`."""
    weight = state.get("weight", 1.0)
    return Prompt(
        **{
            **state,
            "completion": tuple(state["completion"]),
            "weight": tuple(weight) if isinstance(weight, list) else weight,
            "contexts": {name: tuple(ids) for name, ids in state.get("contexts", {}).items()},
            "readings": {name: Reading(**reading) for name, reading in state.get("readings", {}).items()},
        }
    )
