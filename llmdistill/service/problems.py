"""What the service answers when it does not do what was asked."""

from __future__ import annotations

from typing import Any


class Problem(Exception):
    """An answer with an error status and a JSON body that names the field and the bound.

    Args:
        status: HTTP status.
        kind: one word for programs: "invalid", "limit", "token", "fingerprint", "reused_id", "busy", "draining", ...
        message: one line for people: what was found, what is needed.
        field: of the request, as ``sequences[3][17]``.
        limit: the bound that was passed, if it was one.
        retry_after_s: for 429 and 503.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        *,
        field: str | None = None,
        limit: int | float | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.message, self.field, self.limit = status, kind, message, field, limit
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        return {"error": {"type": self.kind, "field": self.field, "message": self.message, "limit": self.limit}}


def first_line(error: BaseException) -> str:
    """What an error says, briefly; never empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def invalid(field: str, message: str, limit: int | float | None = None) -> Problem:
    """400: ``field`` is wrong."""
    return Problem(400, "limit" if limit is not None else "invalid", f"{field} {message}", field=field, limit=limit)
