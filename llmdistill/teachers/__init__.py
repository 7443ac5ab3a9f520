"""What the teacher says about sequences: the Teacher protocol and its engines. Names are loaded when they are used."""

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "EnsembleTeacher": "llmdistill.teachers.mixture",
    "LocalTeacher": "llmdistill.teachers.local",
    "PlainVLLMTeacher": "llmdistill.teachers.openai",
    "RemoteTeacher": "llmdistill.teachers.remote",
    "RoutedTeacher": "llmdistill.teachers.mixture",
    "StoredTeacher": "llmdistill.teachers.stored",
    "Teacher": "llmdistill.teachers.base",
    "TeacherInfo": "llmdistill.teachers.base",
    "VLLMTeacher": "llmdistill.teachers.vllm",
    "connect": "llmdistill.teachers.connecting",
}
__all__ = sorted(_PUBLIC)

if TYPE_CHECKING:
    from llmdistill.teachers.base import Teacher as Teacher
    from llmdistill.teachers.base import TeacherInfo as TeacherInfo
    from llmdistill.teachers.connecting import connect as connect
    from llmdistill.teachers.local import LocalTeacher as LocalTeacher
    from llmdistill.teachers.mixture import EnsembleTeacher as EnsembleTeacher
    from llmdistill.teachers.mixture import RoutedTeacher as RoutedTeacher
    from llmdistill.teachers.openai import PlainVLLMTeacher as PlainVLLMTeacher
    from llmdistill.teachers.remote import RemoteTeacher as RemoteTeacher
    from llmdistill.teachers.stored import StoredTeacher as StoredTeacher
    from llmdistill.teachers.vllm import VLLMTeacher as VLLMTeacher


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
