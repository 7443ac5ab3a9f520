"""Placeholder until the vLLM part is here."""

from contextlib import contextmanager
from typing import Any


@contextmanager
def generation_ready(model: Any, accelerator: Any):
    from trl.models import unwrap_model_for_generation

    with unwrap_model_for_generation(model, accelerator) as m:
        yield m
