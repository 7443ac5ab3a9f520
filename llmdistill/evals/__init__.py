"""Evaluation: suites, samples, verdicts, metrics with confidence intervals."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmdistill.evals.config import EvalConfig as EvalConfig
    from llmdistill.evals.runner import Evaluation as Evaluation
    from llmdistill.evals.runner import evaluate as evaluate

_HOME = {"evaluate": "runner", "Evaluation": "runner", "EvalConfig": "config"}


def __getattr__(name: str) -> Any:
    # evals.metrics is imported by the trainer, which needs neither engines nor verifiers
    if name in _HOME:
        return getattr(import_module(f"llmdistill.evals.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
