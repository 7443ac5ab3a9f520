"""A bounded memory of sequences the student wrote, to be trained on again (DistiLLM, arXiv 2402.03898, section 3.2)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from llmdistill.texts.rollout import Finish, Prompt, Rollout, collate


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
            lp = rollout.behavior_logprobs
            self.samples.append(
                Sample(
                    prompt,
                    rollout.input_ids[b, start:end].tolist(),
                    None if lp is None else lp[b, start:end].tolist(),
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
        chosen = random_.sample(self.samples, n) if n <= len(self) else random_.choices(self.samples, k=n)
        logprobs = [s.logprobs for s in chosen]
        rollout = collate(
            [s.prompt.ids for s in chosen],
            [s.completion for s in chosen],
            pad_id=pad_id,
            behavior_logprobs=None if None in logprobs else [lp for lp in logprobs if lp is not None],
            finish=[s.finish for s in chosen if s.finish is not None] if all(s.finish for s in chosen) else (),
            domain=[s.prompt.domain for s in chosen],
            policy_version=min(s.policy_version for s in chosen),
        )
        return rollout, [s.prompt for s in chosen]

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
            "prompts": [asdict(replace(s.prompt, ids=[], record=None)) for s in samples],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.samples, ids, logprobs = [], state["ids"].tolist(), state["logprobs"].tolist()
        at = drawn_at = 0
        for k, (prompt, completion) in enumerate(state["lengths"]):
            written = ids[at + prompt : at + prompt + completion]
            own = logprobs[drawn_at : drawn_at + completion] if state["drawn"][k] else None
            drawn_at += completion if own is not None else 0
            self.samples.append(
                Sample(
                    _prompt({**state["prompts"][k], "ids": ids[at : at + prompt]}),
                    written,
                    own,
                    state["finish"][k],
                    state["policy_version"][k],
                )
            )
            at += prompt + completion


def _prompt(entry: dict[str, Any]) -> Prompt:
    weight = entry.get("weight", 1.0)
    contexts = {name: tuple(ids) for name, ids in entry.get("contexts", {}).items()}
    return Prompt(
        **{
            **entry,
            "completion": tuple(entry["completion"]),
            "weight": tuple(weight) if isinstance(weight, list) else weight,
            "contexts": contexts,
        }
    )
