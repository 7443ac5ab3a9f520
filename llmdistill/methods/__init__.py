"""One file per method: its settings, and the composition they name.

A method's module has a dataclass ``Settings``, whose fields are settings of the recipe's section ``objective``, and a
function ``build(args) -> Method``. ``objective.method: NAME`` on ``llmdistill.opd`` takes ``llmdistill.methods.NAME``,
``package.module:NAME`` the module ``package.module.NAME`` of one's own; there is nothing to register.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llmdistill.errors import UserError
from llmdistill.recipe.config import DistillationConfig
from llmdistill.recipe.settings import setting

FRONT_DOORS = ("opd", "taid", "redi", "cross_tokenizer", "diffusion")  # of their own, for methods that are no file here


def names() -> list[str]:
    """The methods that come with the package."""
    return [m.name for m in pkgutil.iter_modules(__path__) if not m.name.endswith("_config")]


def load(name: str) -> Any:
    """The module of a method.

    Raises:
        UserError: there is none of that name, or it has no Settings and build.
    """
    package, _, module_name = name.partition(":")
    where = f"{package}.{module_name}" if module_name else f"{__name__}.{name}"
    try:
        module = importlib.import_module(where)
    except ImportError as error:
        if error.name is not None and not where.startswith(error.name):
            raise  # something that the module itself imports
        raise UserError(
            f"objective.method is {name!r}, and there is no module {where}. Fix: {_door(name)}one of "
            f"{', '.join(names())}, or package.module:NAME for one of your own."
        ) from None
    if not (hasattr(module, "Settings") and hasattr(module, "build")):
        raise UserError(f"objective.method is {name!r}; {where} has no Settings and build(args). Fix: add them.")
    return module


def _door(name: str) -> str:
    return f"accelerate launch -m llmdistill.{name}, which is a front door; or " if name in FRONT_DOORS else ""


@lru_cache
def config_class(name: str) -> type[DistillationConfig]:
    """The settings of a run with this method: those of training, and the method's own."""
    module = load(name)

    @dataclass
    class MethodConfig(module.Settings, DistillationConfig):  # type: ignore[name-defined,misc]
        __doc__ = module.Settings.__doc__
        method: str = setting(name, "the method: a file of llmdistill/methods, or package.module:NAME")

        def build(self) -> Any:
            """The composition these settings name."""
            return module.build(self)

    MethodConfig.__name__ = MethodConfig.__qualname__ = f"{name.rpartition(':')[2]}Config"
    globals()[MethodConfig.__name__] = MethodConfig  # where a checkpoint's training_args.bin names it
    return MethodConfig
