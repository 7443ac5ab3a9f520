"""Classes of transformers that vLLM builds its engine from, when it has no implementation of its own.

It decorates the decoder's class for compilation, for good and for everybody: the student, an instance of the same class
in the same process, lacks what the decorated constructor would have given it, and can no longer be called. So the
decorated class becomes one of the engine's own, and transformers gets its class back, also when loading fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llmdistill.compat.patching import patched


@contextmanager
def classes_kept() -> Iterator[Callable[[Any], None]]:
    """Within it vLLM may decorate; afterwards transformers' classes are as they were.

    Yields a function to be called with a worker's model, whose modules keep the decorated behaviour.
    """
    from vllm.model_executor.models.transformers.base import Base

    before: dict[type, tuple[tuple[type, ...], dict[str, Any]]] = {}
    decorate = Base._decorate_cls_for_torch_compile

    def remembering(self: Any, cls: type, *args: Any, **kwargs: Any) -> None:
        before.setdefault(cls, (cls.__bases__, dict(vars(cls))))
        decorate(self, cls, *args, **kwargs)

    def give_own_classes(model: Any) -> None:
        own = {cls: _subclass(cls, bases, entries) for cls, (bases, entries) in before.items()}
        for module in model.modules():
            if type(module) in own:
                module.__class__ = own[type(module)]

    with patched(Base, "_decorate_cls_for_torch_compile", remembering):
        try:
            yield give_own_classes
        finally:
            for cls, (bases, entries) in before.items():
                _put_back(cls, bases, entries)


def _subclass(cls: type, bases: tuple[type, ...], entries: dict[str, Any]) -> type:
    """What decoration made of ``cls``, as a class below it."""
    added = {name: value for name, value in vars(cls).items() if entries.get(name) is not value}
    added = {name: value for name, value in added.items() if name not in ("__dict__", "__weakref__", "__doc__")}
    return type(cls.__name__, (cls, *(base for base in cls.__bases__ if base not in bases)), added)


def _put_back(cls: type, bases: tuple[type, ...], entries: dict[str, Any]) -> None:
    for name, value in list(vars(cls).items()):
        if name in ("__dict__", "__weakref__", "__bases__") or entries.get(name) is value:
            continue
        if name in entries:
            setattr(cls, name, entries[name])
        else:
            delattr(cls, name)
    cls.__bases__ = bases
