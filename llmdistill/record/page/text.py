"""Text and numbers made safe for the page. Prompts, completions and config values are hostile until they were here."""

from __future__ import annotations

import html
from typing import Any

from llmdistill.record.page.load import finite

# Control characters become their visible pictures; line breaks and tabs stay.
_CONTROLS = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | {
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}


def safe(value: object) -> str:
    """``value`` as text that is inert in an element or a quoted attribute."""
    text = str(value).replace("\r\n", "\n").translate(_CONTROLS)
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"))  # lone surrogates cannot be written


def clipped(value: object, limit: int, *, keep_end: bool = False) -> str:
    """Like :func:`safe`, of at most ``limit`` bytes once escaped; markup after it says how many characters were cut."""
    text = str(value)
    kept = _fitting(text, limit, keep_end)
    cut = len(text) - kept
    if not cut:
        return safe(text)
    note = f'<span class="cut">{cut:,} characters not shown</span>'
    return f"{note}… {safe(text[cut:])}" if keep_end else f"{safe(text[:kept])} …{note}"


def name(value: object, limit: int = 120) -> str:
    """A short text for attributes and one-line places: no markup, an ellipsis where it was cut."""
    text = str(value)
    kept = _fitting(text, limit, keep_end=False)
    return safe(text[:kept]) + ("…" if kept < len(text) else "")


def _fitting(text: str, limit: int, keep_end: bool) -> int:
    """How many characters from that end escape to at most ``limit`` bytes."""
    source = reversed(text) if keep_end else iter(text)
    kept, size = 0, 0
    for character in source:
        size += len(safe(character).encode("utf-8"))
        if size > limit:
            break
        kept += 1
    return kept


def show(value: float) -> str:
    """A number in three decimals where that tells enough of it, else three significant digits."""
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 0.01 or size == 0:
        return f"{value:.3f}"
    return f"{value:.2e}"


def exact(value: Any) -> str:
    """A number to read, with the unrounded one in the element's ``value``."""
    number = finite(value)
    if number is None:
        return "–" if value is None else safe(value)
    return f'<data value="{number!r}">{show(number)}</data>'


def duration(seconds: float) -> str:
    """``74.3 s``, ``12 min 5 s``, ``3 h 20 min``."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    return f"{minutes} min {int(seconds % 60)} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
