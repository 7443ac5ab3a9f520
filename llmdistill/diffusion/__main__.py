"""Masked diffusion language models: from an autoregressive one, on text, from a teacher, by rewards, in fewer steps.

    accelerate launch -m llmdistill.diffusion --config recipes/diffusion-sft-cpu.yaml

``objective.stage`` says what is done, and which settings there are:

- ``from_ar``: a causal model becomes a denoiser on documents or completions (DiffuLLaMA, arXiv 2410.17891).
- ``sft``: a denoiser, or a causal model, is trained on completions; prompts are never masked (LLaDA, arXiv 2502.09992).
- ``distill_ar``: an autoregressive teacher's text, and what it says of it, in a form without bias.
- ``opd``: an autoregressive teacher, on the states that a block-diffusion student writes through (OPDLM, 2606.06712).
- ``rl``: rewards of what the student writes, on slices of the states it wrote it in (TraceRL, 2509.06949).
- ``distill_steps``: many denoising steps into few, the student its own teacher (MCD, 2602.00792; SDTT, 2410.21035).

What is saved is a plain checkpoint; ``llmdistill eval SUITE --model FOLDER --engine diffusion`` scores it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

from llmdistill.errors import UserError
from llmdistill.recipe.command_line import help_text, named, parse, run_front_door

SUMMARY = "Masked diffusion language models: --stage from_ar, sft, distill_ar, opd, rl or distill_steps."
_HERE = "llmdistill.diffusion"
_STAGES, _TRAINERS = f"{_HERE}.stages", f"{_HERE}.trainers"
# stage -> where its settings are, and its trainer
STAGES = {
    "from_ar": (f"{_STAGES}:FromARConfig", f"{_TRAINERS}:MaskedDiffusionTrainer"),
    "sft": (f"{_STAGES}:SFTConfig", f"{_TRAINERS}:MaskedDiffusionTrainer"),
    "distill_ar": (f"{_STAGES}:ARDistillationConfig", f"{_TRAINERS}:ARDistillationTrainer"),
    "opd": (f"{_STAGES}:DiffusionOPDConfig", f"{_TRAINERS}:ARDistillationTrainer"),
    "rl": (f"{_HERE}.rl_stage:DiffusionRLConfig", f"{_HERE}.rl_trainer:DiffusionRLTrainer"),
    "distill_steps": (
        f"{_HERE}.steps_stage:StepDistillationConfig",
        f"{_HERE}.steps_trainer:StepDistillationTrainer",
    ),
}


def of_stage(name: str) -> tuple[Any, Any]:
    """The settings and the trainer of a stage.

    Raises:
        UserError: there is no such stage.
    """
    if name not in STAGES:
        raise UserError(f"objective.stage is {name!r}; there are {', '.join(STAGES)}. Fix: --stage sft.")
    places = (place.split(":") for place in STAGES[name])
    config, trainer = (getattr(importlib.import_module(module), attribute) for module, attribute in places)
    return config, trainer


def main(argv: Sequence[str]) -> int:
    """The command. Returns its exit status."""
    config, trainer = of_stage(named(argv, "objective", "stage") or "sft")
    if "--help" in argv or "-h" in argv:
        print(help_text(config, "llmdistill.diffusion", SUMMARY, without=getattr(config, "unread", ())))
        return 0
    from llmdistill.pipeline.run import run

    return run(parse(config, argv), trainer)


if __name__ == "__main__":
    run_front_door(main, sys.argv[1:])
