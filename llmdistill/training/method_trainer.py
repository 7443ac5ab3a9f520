"""MethodTrainer: any method of :mod:`llmdistill.methods`, from its settings."""

from __future__ import annotations

from typing import Any

from llmdistill.training.rewards import Reward, load_reward
from llmdistill.training.trainer import DistillationTrainer


class MethodTrainer(DistillationTrainer):
    """Trains ``model`` with the method that ``args`` are the settings of.

    ``reward`` (a function of prompts and completions) goes before ``args.reward``.

    Example::

        args = llmdistill.methods.config_class("tip")(output_dir="run", keep=0.3)
        MethodTrainer("student", args, "teacher", train_dataset=prompts).train()
    """

    def __init__(
        self, model: Any, args: Any, teacher: Any = None, *, reward: Reward | None = None, **kwargs: Any
    ) -> None:
        named = getattr(args, "reward", None)
        if reward is None and named:
            reward = load_reward(named)
        super().__init__(model, args, teacher, method=args.build(), reward=reward, **kwargs)
