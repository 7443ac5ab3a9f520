"""Packages: which version is installed, and which extra of pyproject.toml brings one that is not."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

BROUGHT_BY = {
    **dict.fromkeys(("httpx",), "remote"),
    **dict.fromkeys(("fastapi", "uvicorn", "pydantic", "prometheus_client"), "server"),
    **dict.fromkeys(("evaluate", "sortedcontainers"), "eval"),
    **dict.fromkeys(("rapidfuzz", "py3langid"), "data"),
    **dict.fromkeys(("gguf", "reasoning_gym"), "quickstart"),
    "deepspeed": "deepspeed",
    "ray": "ray",
    "vllm": "vllm",
}
BASE = ("trl", "peft", "datasets", "rich", "pyarrow", "mpmath")  # of the base, and left out of a lean environment


def installed_version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def how_to_install(error: ModuleNotFoundError) -> str | None:
    """A line for the user; None where it is no package of ours."""
    name = (error.name or "").partition(".")[0]
    if name in BASE:
        return f"the package {name} is needed for this and not installed. Fix: pip install {name}."
    if name not in BROUGHT_BY:
        return None
    return (
        f"the package {name} is needed for this and not installed. Fix: pip install 'llmdistill[{BROUGHT_BY[name]}]'."
    )
