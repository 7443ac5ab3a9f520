"""A round as it was drawn, and how it rests in a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from llmdistill.composition.batch import Text
from llmdistill.errors import UserError
from llmdistill.teachers.base import Teacher
from llmdistill.teachers.prescored import Prescored
from llmdistill.texts import Prompt, Rollout
from llmdistill.texts.buffer import prompt_of, prompt_state

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Made:
    """The texts of one optimizer step, before rewards, and the judges that are asked about them."""

    step: int  # optimizer steps done when it is trained on
    parts: int  # micro-batches
    examples: list[Any]  # that were drawn for
    texts: dict[str, Text]
    judges: Mapping[str, Teacher]
    inputs: int | None = None  # of transformers' loop, where they are not one for each micro-batch
    received: int | None = None  # bytes of the teacher's answers, where it was asked ahead

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors. Prompts that are among the examples are numbers: they are read with the rows."""
        number = {id(example): i for i, example in enumerate(self.examples)}
        return {
            "texts": {
                name: {
                    "rollout": {f.name: getattr(text.rollout, f.name) for f in fields(Rollout)},
                    "prompts": [number.get(id(p), -1) for p in text.prompts],
                    "others": [prompt_state(p) for p in text.prompts if id(p) not in number],
                    "author": text.author,
                }
                for name, text in self.texts.items()
            },
            "judges": {name: judge.state_dict() for name, judge in self.judges.items() if isinstance(judge, Prescored)},
            "received": self.received,
        }

    @classmethod
    def restored(
        cls, step: int, parts: int, examples: Sequence[Any], judges: Mapping[str, Teacher], state: Mapping[str, Any]
    ) -> Made:
        """The round of :meth:`state_dict` for the same examples."""
        for name, answers in state["judges"].items():
            judge = judges.get(name)
            if isinstance(judge, Prescored):
                judge.load_state_dict(answers)
        texts = {}
        for name, of in state["texts"].items():
            others = iter(of["others"])
            prompts: list[Prompt] = [examples[i] if i >= 0 else prompt_of(next(others)) for i in of["prompts"]]
            texts[name] = Text(Rollout(**of["rollout"]), prompts, author=of["author"])
        return cls(step, parts, list(examples), texts, judges, received=state["received"])


def save_rounds(checkpoint: str | Path, rounds: Mapping[int, Mapping[str, Any]], args: Any) -> None:
    """Writes what this rank has of the rounds, by step; beside a checkpoint."""
    torch.save({"rounds": dict(rounds), "layout": _layout(args)}, _file(checkpoint, args))


def rounds_of(checkpoint: str | Path, args: Any) -> dict[int, Mapping[str, Any]]:
    """The rounds under way that a checkpoint holds for this rank; none of a run that made none ahead.

    Raises:
        UserError: the file is damaged.
    """
    file = _file(checkpoint, args)
    if not file.is_file():
        return {}
    try:
        stored = torch.load(file, weights_only=True)
        rounds, layout = dict(stored["rounds"]), stored["layout"]
    except Exception as error:  # torch.load raises nearly anything on bytes that are no checkpoint
        raise UserError(
            f"{file} does not hold the rounds that were under way ({type(error).__name__}). Fix: --resume from an "
            "earlier checkpoint; without this file they are written anew."
        ) from error
    if layout != _layout(args):
        logger.warning(
            "%s has the rounds under way of %s; this run has %s. They are written anew.", file, layout, _layout(args)
        )
        return {}
    return rounds


def _layout(args: Any) -> dict[str, int]:
    """By which the rows of a step are shared out."""
    return {
        "processes": args.world_size,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "samples_per_prompt": args.rollouts.samples_per_prompt,
    }


def _file(checkpoint: str | Path, args: Any) -> Path:
    return Path(checkpoint) / f"rounds_{args.process_index}.pt"
