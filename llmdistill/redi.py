"""REDI: learn from a teacher's correct answers, then from what tells them apart from its wrong ones.

    accelerate launch -m llmdistill.redi --config recipes/redi.yaml

Stage 1 fine-tunes on the correct answers (TRL's SFTTrainer). Stage 2 trains on pairs (arXiv 2505.24850, METHODS 4.1):
-log p(chosen) / |chosen| + alpha log p(rejected) / |rejected|. No teacher runs: its answers are the data. The other
methods are what REDI is compared with, behind the same first stage:

- ``sft``: stage 1 alone.
- ``symmetric``: alpha = 1, both sides alike.
- ``simpo``: length-normalised, saturating, reference-free.
- ``dpo``: against the student as stage 1 left it (TRL's DPOTrainer).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

from llmdistill.methods.redi_config import REDIConfig
from llmdistill.training.pair_trainer import PairTrainer


class REDITrainer(PairTrainer):
    """Stage 2: trains ``model``, an SFT checkpoint, on pairs.

    Example::

        trainer = REDITrainer("student", REDIConfig(output_dir="run"), train_dataset=pairs)
        trainer.train()
    """

    def __init__(self, model: Any, args: REDIConfig, teacher: Any = None, **kwargs: Any) -> None:
        if teacher is not None:  # in the place that all trainers have it; its answers are the pairs
            warnings.warn("REDITrainer learns from pairs alone: the teacher is not asked anything", stacklevel=2)
        super().__init__(model, args, loss=args.loss(), **kwargs)


SUMMARY = "REDI: fine-tuning on a teacher's correct answers, then on pairs of a correct and a wrong one."


def main(argv: Sequence[str]) -> int:
    """The command. Returns its exit status."""
    from llmdistill.recipe.command_line import help_text, parse

    if "--help" in argv or "-h" in argv:
        print(help_text(REDIConfig, "llmdistill.redi", SUMMARY, without=REDIConfig.unread))
        return 0
    from llmdistill.pipeline.redi_stages import run_stages  # TRL is imported there, which --help need not wait for

    return run_stages(parse(REDIConfig, argv), REDITrainer)


if __name__ == "__main__":
    from llmdistill.recipe.command_line import run_front_door

    run_front_door(main, sys.argv[1:])
