"""Which settings differ between two evaluations: field by field, with what each says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(field, what ``a`` says, what ``b`` says) by name; fields within a setting as "sampling.temperature"."""
    x, y = _flat(a), _flat(b)
    return [
        (key, _short(x.get(key)), _short(y.get(key))) for key in sorted(x.keys() | y.keys()) if x.get(key) != y.get(key)
    ]


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{inner}": found for inner, found in _flat(value).items()}
        else:
            flat[key] = value
    return flat


def _short(value: Any) -> str:
    """Its beginning where it is long; two that differ further on are told apart by their hashes."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:40]}... ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
