"""Masked-diffusion language models: backbone, training, sampling, likelihood, distillation, reinforcement.

``from llmdistill.diffusion import MaskedDiffusionLM, elbo`` works, and importing the package loads nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "ARDistillationConfig": "llmdistill.diffusion.stages",
    "ARDistillationTrainer": "llmdistill.diffusion.trainers",
    "DenoisingConfig": "llmdistill.diffusion.denoising",
    "DeterminantalRepulsion": "llmdistill.diffusion.diversity",
    "DiffusionGenerationConfig": "llmdistill.diffusion.generation_config",
    "DiffusionOPDConfig": "llmdistill.diffusion.stages",
    "DiffusionOutput": "llmdistill.diffusion.sampling",
    "DiffusionRLConfig": "llmdistill.diffusion.rl_stage",
    "DiffusionRLTrainer": "llmdistill.diffusion.rl_trainer",
    "FromARConfig": "llmdistill.diffusion.stages",
    "MaskedDiffusionLM": "llmdistill.diffusion.backbone",
    "MaskedDiffusionTrainer": "llmdistill.diffusion.trainers",
    "OrthogonalRepulsion": "llmdistill.diffusion.diversity",
    "SFTConfig": "llmdistill.diffusion.stages",
    "StepDistillationConfig": "llmdistill.diffusion.steps_stage",
    "StepDistillationTrainer": "llmdistill.diffusion.steps_trainer",
    "denoising_loss": "llmdistill.diffusion.denoising",
    "elbo": "llmdistill.diffusion.likelihood",
    "generate": "llmdistill.diffusion.sampling",
    "loglikelihood": "llmdistill.diffusion.likelihood",
    "perplexity": "llmdistill.diffusion.likelihood",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
