"""A name that stands for several machines: every address of it is a replica.

So a headless Kubernetes service, or a name with several A records, is a fleet that comes and goes, and one url in a
recipe. A machine of both address families is one machine: IPv6 addresses count where there are no others. Names that
mean this machine, or are left to a proxy to look up, stay as they are.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from socket import AF_INET, AF_INET6, SOCK_STREAM, getaddrinfo
from urllib.request import getproxies, proxy_bypass

import httpx

LOOK_AGAIN_S = 20.0  # whether a name means others by now


def is_loopback(url: str) -> bool:
    host = httpx.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def may_change(url: str) -> bool:
    """Whether what the url means is for a name server to say, and for this process to ask."""
    parsed = httpx.URL(url)
    try:
        ipaddress.ip_address(parsed.host)
        return False
    except ValueError:
        return not is_loopback(url) and (parsed.scheme not in getproxies() or bool(proxy_bypass(parsed.host)))


def located(url: str) -> Sequence[str]:
    """Urls of the machines that a url means: itself, or the addresses of its name where these are several.

    Raises:
        OSError: the name cannot be looked up.
    """
    if not may_change(url):
        return [url]
    parsed = httpx.URL(url)
    found = getaddrinfo(parsed.host, parsed.port or 0, type=SOCK_STREAM)
    of_family = {family: sorted({str(address[0]) for f, *_, address in found if f == family}) for family, *_ in found}
    addresses = of_family.get(AF_INET) or of_family.get(AF_INET6) or []
    if len(addresses) < 2:
        return [url]
    return [str(parsed.copy_with(host=address)).rstrip("/") for address in addresses]
