"""Bearer tokens as an environment variable holds them: one or several, each for any host or for the one it names.

``SECRET`` goes to every url of the recipe, and nowhere else. ``SECRET@HOST`` or ``SECRET@HOST:PORT`` goes to that host
only, so a recipe that names another one gets nothing. Several stand with commas or spaces between them; a service takes
any of them, which is how one is replaced by the next without a moment at which none fits.
"""

from __future__ import annotations

import httpx

from llmdistill.errors import UserError


def secrets_of(text: str | None) -> list[str]:
    """All of them, for the side that is shown one."""
    return [secret for secret, _ in _entries(text)]


def token_for(text: str | None, url: str, section: str) -> str | None:
    """What is shown to the service at ``url``; None where there are no tokens at all.

    Raises:
        UserError: every token names a host, and none this one.
    """
    found = _entries(text)
    if not found:
        return None
    address = httpx.URL(url)
    own = {address.host.lower(), address.netloc.decode().lower()}
    for secret, host in sorted(found, key=lambda entry: not entry[1]):  # those that name a host first
        if not host or host in own:
            return secret
    raise UserError(
        f"{section}.url names {address.netloc.decode()}; the token is for {', '.join(host for _, host in found)} only. "
        f"Fix: another url, or a token for it in the variable that {section}.token_env names."
    )


def _entries(text: str | None) -> list[tuple[str, str]]:
    """(secret, host); the host is empty where none is named."""
    words = (text or "").replace(",", " ").split()
    return [(secret, host.lower()) for word in words for secret, _, host in (word.partition("@"),) if secret]
