"""What a student is scored on in the task "recovery"."""

from __future__ import annotations

import random
from dataclasses import dataclass

from models import EOS_ID, PAD_ID
from recovery_models import as_prompt, scored
from recovery_task import TOKENS, everything
from scores import distance
from transformers import PreTrainedModel

from llmdistill.models.generation import generate
from llmdistill.teachers.base import Teacher
from llmdistill.texts import Sampling

SCORED, COMPARED = 256, 64  # prompts, of the few that exist: nobody's are held out


@dataclass
class Recovery:
    """Exact traces greedily (``exact``) and at temperature 1 (``exact_t1``), of the samples also the shares of right
    steps, right guesses and repaired ones; and nats a token from the teacher on either text."""

    teacher: Teacher
    size: int

    def __post_init__(self) -> None:
        problems = everything(self.size)
        self.problems = random.Random(9).sample(problems, min(SCORED, len(problems)))
        self.prompts = [as_prompt(p) for p in self.problems[:COMPARED]]
        self.text = self.teacher.generate(self.prompts, Sampling(TOKENS, seed=11))

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        drawn = scored(model, self.problems, 1.0, seed=14)
        own = generate(model, self.prompts, Sampling(TOKENS, seed=12), eos_ids=(EOS_ID,), pad_id=PAD_ID)
        return {
            "exact": scored(model, self.problems, 0.0)["exact"],
            "exact_t1": drawn.pop("exact"),
            **drawn,
            "forward_kl": distance(model, self.teacher, self.text).mean("forward_kl"),
            "reverse_kl": distance(model, self.teacher, own).mean("reverse_kl"),
        }
