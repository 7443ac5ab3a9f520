"""Hidden tests of LiveCodeBench: JSON in a pickle in zlib in base64. A pickle is a program; this one is never run.

A string that was pickled is a string among the pickle's operations, which are listed without being carried out.
"""

from __future__ import annotations

import base64
import binascii
import json
import pickletools
import zlib
from typing import Any

LARGEST = 1 << 30  # bytes unpacked; the largest of the release are below 300 MB
_OF_A_STRING = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "STOP"}
_STRINGS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}


def unpacked(text: str) -> Any:
    """The tests: JSON as it stands, or packed.

    Raises:
        ValueError: neither, or a pickle of anything but one string.
    """
    if text.lstrip().startswith(("[", "{")):
        return json.loads(text)
    try:
        inflate = zlib.decompressobj()
        packed = inflate.decompress(base64.b64decode(text, validate=True), LARGEST)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"neither JSON nor packed: {error}") from error
    if inflate.unconsumed_tail:
        raise ValueError(f"more than {LARGEST} bytes unpacked")
    found = list[str]()
    for operation, argument, _ in pickletools.genops(packed):
        if operation.name in _STRINGS:
            found.append(str(argument))
        elif operation.name not in _OF_A_STRING:
            raise ValueError(f"a pickle that does more than hold a string ({operation.name})")
    if len(found) != 1:
        raise ValueError(f"a pickle of {len(found)} strings")
    return json.loads(found[0])
