"""llmdistill: large language models into small ones.

``from llmdistill import OPDTrainer`` works, and importing the package alone loads nothing heavy.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "CrossTokenizerConfig": "llmdistill.cross_tokenizer",
    "CrossTokenizerTrainer": "llmdistill.cross_tokenizer",
    "DistillationConfig": "llmdistill.recipe.config",
    "DataConfig": "llmdistill.recipe.data_config",
    "RolloutConfig": "llmdistill.recipe.config",
    "DistillationTrainer": "llmdistill.training.trainer",
    "Ask": "llmdistill.composition.term",
    "Method": "llmdistill.composition.method",
    "MethodTrainer": "llmdistill.training.method_trainer",
    "Term": "llmdistill.composition.term",
    "OPDConfig": "llmdistill.opd",
    "OPDTrainer": "llmdistill.opd",
    "REDIConfig": "llmdistill.methods.redi_config",
    "REDITrainer": "llmdistill.redi",
    "TAIDConfig": "llmdistill.taid",
    "TAIDTrainer": "llmdistill.taid",
    "UserError": "llmdistill.errors",
}
__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from llmdistill.composition.method import Method as Method
    from llmdistill.composition.term import Ask as Ask
    from llmdistill.composition.term import Term as Term
    from llmdistill.cross_tokenizer import CrossTokenizerConfig as CrossTokenizerConfig
    from llmdistill.cross_tokenizer import CrossTokenizerTrainer as CrossTokenizerTrainer
    from llmdistill.errors import UserError as UserError
    from llmdistill.methods.redi_config import REDIConfig as REDIConfig
    from llmdistill.opd import OPDConfig as OPDConfig
    from llmdistill.opd import OPDTrainer as OPDTrainer
    from llmdistill.recipe.config import DistillationConfig as DistillationConfig
    from llmdistill.recipe.config import RolloutConfig as RolloutConfig
    from llmdistill.recipe.data_config import DataConfig as DataConfig
    from llmdistill.redi import REDITrainer as REDITrainer
    from llmdistill.taid import TAIDConfig as TAIDConfig
    from llmdistill.taid import TAIDTrainer as TAIDTrainer
    from llmdistill.training.method_trainer import MethodTrainer as MethodTrainer
    from llmdistill.training.trainer import DistillationTrainer as DistillationTrainer


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
